"""RGAlign-Rec on Ray: align a reasoner LLM to a frozen ranker, retrain the ranker on it, repeat."""

__version__ = "0.1.0"
