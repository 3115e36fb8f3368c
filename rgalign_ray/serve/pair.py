"""The frozen pair of one version, as the service runs it: a reasoner that reads sessions, a ranker that scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.fit import to_batch
from rgalign_ray.reasoner.engine import EngineSpec, Prompts
from rgalign_ray.reward.functions import fault
from rgalign_ray.rollout.worker import Instruction
from rgalign_ray.serve.session_reader import Row, SessionReader


@dataclass(frozen=True, slots=True)
class PairSpec:
    """Where a version's parts are; plain data, so that every process of the service can load its own."""

    sessions_uri: str
    ranker_uri: str
    engine: EngineSpec
    prompt: str
    """Name or path of the template."""
    round_: int


class FrozenRanker:
    """Scores sessions with the item tower computed once.

    Raises:
        DataError: when ranker and catalogue are not of one run, or the reasoner is not the one it was trained on.
    """

    def __init__(self, spec: PairSpec, reader: SessionReader) -> None:
        torch.set_num_threads(spec.engine.reasoner.threads)
        self.loaded = scoring.load(spec.ranker_uri)
        self.loaded.require(intent_ids=Catalogue.load(spec.sessions_uri).ids)
        self.reader = reader
        self.dim = self.loaded.meta.sizes["embedding_dim"]
        with torch.inference_mode():
            self.items = self.loaded.model.items()

    @torch.inference_mode()
    def score(
        self, rows: Sequence[Row], candidates: Sequence[np.ndarray], vectors: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        """Scores of each session's candidates.

        Args:
            rows: as `SessionReader.row` makes them.
            candidates: int [C_b], indices into the catalogue.
            vectors: e(x), float16 [H]; None reads the null query.

        Returns:
            float32 [C_b] each.
        """
        width = max(len(each) for each in candidates)
        padded = np.full((len(rows), width), -1, np.int32)
        for row, each in zip(padded, candidates, strict=True):
            row[: len(each)] = each
        batch = to_batch({**self.loaded.space.transform(self.reader.table(rows)), "candidates": padded})
        nothing = np.zeros(self.dim, np.float16)
        embedding = np.stack([nothing if vector is None else vector for vector in vectors]).astype(np.float32)
        is_null = torch.tensor([vector is None for vector in vectors])
        model = self.loaded.model
        z = model.queries(torch.from_numpy(embedding), is_null)
        scores = model.score(model.users(batch), self.items, batch["candidates"], z).numpy()
        return [scores[number, : len(each)] for number, each in enumerate(candidates)]


class FrozenReasoner:
    """Reads session texts.

    Raises:
        DataError: when its weights are not those that the ranker was trained on.
    """

    def __init__(self, spec: PairSpec, reader: SessionReader, reasoner_version: str | None) -> None:
        template = reader.template
        self.engine = spec.engine.start()
        self.instruction = Instruction(template.prefix, template.suffix, template.version)
        if reasoner_version is not None and self.engine.version != reasoner_version:
            raise DataError(
                f"the reasoner is of version '{self.engine.version}', but the ranker was trained on "
                f"'{reasoner_version}'; serve the round whose ranker was trained on it."
            )

    def prompts(self, texts: Sequence[str]) -> Prompts:
        return self.instruction.prompts(list(texts))

    def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """e(x), float16 [H] each."""
        return list(self.engine.embed(self.prompts(texts)))

    def write(
        self, texts: Sequence[str], seeds: Sequence[int], temperature: float, top_p: float, max_new_tokens: int
    ) -> list[tuple[np.ndarray, str | None]]:
        """e(x) and a latent query each, None where what was sampled is no valid one."""
        groups = self.engine.sample(
            self.prompts(texts),
            [[seed] for seed in seeds],
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
        )
        return [
            (group.embedding, group.samples[0].query if fault(group.samples[0]) is None else None) for group in groups
        ]
