"""Where sessions come from: sources, ingest, and what features and prompts make of them."""
