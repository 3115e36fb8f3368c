"""The sizes of a ranker, known without torch."""

from __future__ import annotations

from dataclasses import dataclass

from rgalign_ray.logs.features import FeatureSpace


@dataclass(frozen=True)
class Sizes:
    """Everything a model's shape depends on, besides its settings."""

    field_size: int
    num_fields: int
    multi_size: int
    num_multi: int
    multi_length: int
    history_size: int
    history_length: int
    num_intents: int
    embedding_dim: int
    """De, length of a session's embedding; 0 where the ranker reads none."""
    item_dim: int
    """Numbers of an intent's (whitened) text embedding; 0 where intents have none."""
    match_dim: int = 0
    """Directions in which texts of sessions and intents are compared; 0 where no one encoder has read both."""

    @classmethod
    def of(
        cls, space: FeatureSpace, *, num_intents: int, embedding_dim: int, item_dim: int, match_dim: int = 0
    ) -> Sizes:
        return cls(
            field_size=space.field_size,
            num_fields=space.num_fields,
            multi_size=space.multi_size,
            num_multi=space.num_multi,
            multi_length=space.multi_length,
            history_size=space.history_size,
            history_length=space.history_length,
            num_intents=num_intents,
            embedding_dim=embedding_dim,
            item_dim=item_dim,
            match_dim=match_dim,
        )
