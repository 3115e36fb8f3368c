"""The auditor: a second frozen pair, of other users, another encoder and another seed. Nothing is optimised for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rgalign_ray import config
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.prompts import Template
from rgalign_ray.ranker import scoring
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.sentence_encoder import SentenceEncoder, joined
from rgalign_ray.reward import functions
from rgalign_ray.reward.judging import judge_queries

BATCH = 32


@dataclass(frozen=True, slots=True)
class AuditorSpec:
    """All that a process needs to start the auditor."""

    ranker: str
    """Ranker artefact."""
    encoder: config.Reasoner
    max_text_tokens: int
    template: Template
    """How sessions are written as text."""
    rank_by: config.RankBy = "click"
    """As `reward.rank_by`."""


class Auditor:
    """Its ranker, and how it reads a session's queries."""

    def __init__(self, spec: AuditorSpec) -> None:
        self.ranker = scoring.load(spec.ranker, spec.rank_by)
        self.encoder = SentenceEncoder(spec.encoder, spec.max_text_tokens)
        self.template = spec.template
        self.ranker.require(reasoner_version=self.encoder.version)

    def embeddings(self, sessions: pa.Table, queries: list[str]) -> np.ndarray:
        """e(x,q) float16 [S, N, H] of S sessions and their S·N queries, session by session."""
        texts = self.template.sessions(sessions)
        n = len(queries) // len(texts)
        both = joined(queries, [text for text in texts for _ in range(n)])
        parts = [self.encoder.embed(Prompts("", both[i : i + BATCH], "")) for i in range(0, len(both), BATCH)]
        return np.concatenate(parts).reshape(len(texts), n, -1)

    def rewards(
        self, sessions: pa.Table, queries: list[str], catalogue: Catalogue, settings: config.Reward
    ) -> np.ndarray:
        """float64 [S, N], what it finds S sessions' N queries each worth; nan for sessions that it cannot judge by."""
        n = len(queries) // len(sessions)
        parts = []
        for start in range(0, len(sessions), BATCH):
            part = sessions.slice(start, BATCH)
            arrays = examples(part, self.ranker.space, catalogue)
            labels = functions.Labels.of(settings, part, arrays, catalogue, "auditor")
            read = self.embeddings(part, queries[start * n : (start + BATCH) * n])
            parts.append(judge_queries(self.ranker, arrays, labels, read, settings)[0])
        return np.concatenate(parts)
