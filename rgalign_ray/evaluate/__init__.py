"""Whether a ranker is better than another, by how much, and how sure that is."""
