"""Rankers without a query, one file per model, behind the interface of `ranker.base`."""
