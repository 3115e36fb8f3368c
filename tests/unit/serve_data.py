"""A gateway over models that answer as they are told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rgalign_ray import config, storage
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.prompts import Template
from rgalign_ray.schema import EVENT, TIMESTAMP
from rgalign_ray.serve import api
from rgalign_ray.serve.gateway import Gateway
from rgalign_ray.serve.session_reader import SessionReader
from rgalign_ray.serve.variants import Variant, Variants

SPEC = FeatureSpec.model_validate(
    {
        "fields": [
            {"name": "region", "kind": "categorical"},
            {"name": "hour", "kind": "numeric"},
            {"name": "coins", "kind": "numeric"},
            {"name": "cards", "kind": "multi"},
        ]
    }
)
TEMPLATE = Template(
    version="t", prefix="", session="{{ tab }}: {{ history | map(attribute='text') | join(', ') }}", suffix="", item=""
)
SESSION = {"user_id": "u1", "region": "SG", "features": {"tab": "open", "hour": 3, "cards": ["visa"]}}
INTENTS = [f"i{number}" for number in range(6)]
VECTOR = np.ones(4, np.float16)


def read_as(folder: Path) -> SessionReader:
    columns = {
        "tab": pa.string(),
        "hour": pa.float32(),
        "coins": pa.int32(),
        "cards": pa.list_(pa.string()),
        "ts": TIMESTAMP,
        "history": pa.list_(EVENT),
    }
    log = pa.schema(list(columns.items())).empty_table()
    storage.write_table(str(folder / "sessions/dt=2026-01-01/region=SG/0.parquet"), log)
    return SessionReader(str(folder), SPEC, TEMPLATE, SPEC.history.length)


class Models:
    """What the gateway waits for."""

    def __init__(self, slow_s: float = 0.0, fails: Exception | None = None, slow_ranker_s: float = 0.0) -> None:
        self.slow_s, self.fails, self.slow_ranker_s = slow_s, fails, slow_ranker_s
        self.read_texts: list[str] = []
        self.scored: list[tuple[dict[str, Any], list[int], bool]] = []

    async def read(self, text: str, seed: int | None) -> tuple[np.ndarray, str | None]:
        self.read_texts.append(text)
        await asyncio.sleep(self.slow_s)
        if self.fails:
            raise self.fails
        return VECTOR, None if seed is None else "where is it?"

    async def score(self, row: dict[str, Any], candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        self.scored.append((row, candidates.tolist(), vector is not None))
        await asyncio.sleep(self.slow_ranker_s)
        return -candidates.astype(np.float32)

    async def parts(self, row: dict[str, Any], candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        return np.stack([-candidates - 6.0, *np.ones((2, len(candidates))), np.full(len(candidates), 4.0)], axis=1)


def variant(reader: SessionReader, models: Models, name: str = "default", weight: float = 1.0, **more: Any) -> Variant:
    intents = pa.table(dict.fromkeys(("intent_id", "title", "description", "category"), INTENTS))
    version = api.ServedVersion(
        name=name,
        share=1.0,
        version=f"v-{name}",
        reasoner="r",
        ranker="k",
        round=1,
        intents=6,
        features=reader.features,
        read=["tab"],
    )
    catalogue = Catalogue(intents)
    return Variant(name, weight, version, reader, catalogue, models.read, models.score, models.parts, **more)


def gateway(reader: SessionReader, models: Models, store: Any = None, feedback: Any = None, **settings: Any) -> Gateway:
    """With time enough, unless told otherwise, for models that answer at once on a machine with much else to do."""
    it = config.Serve.model_validate({"budget_ms": 30_000.0} | settings)
    return Gateway(it, Variants([variant(reader, models, store=store)]), feedback)
