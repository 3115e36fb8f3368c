"""The reward: what a latent query is worth to the frozen ranker, and which queries to learn from."""
