"""Alignment of the reasoner to the frozen ranker: one file per objective, one for the engines they share."""
