"""The reasoner: an LLM that reads a session and writes a latent query. No Ray in here."""
