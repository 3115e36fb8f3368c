"""Users' situations read ahead, without the cluster that reads them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from serve_data import SPEC, TEMPLATE, VECTOR, read_as

from rgalign_ray import config
from rgalign_ray.logs.prompts import Template
from rgalign_ray.schema import EVENT
from rgalign_ray.serve import read_ahead
from rgalign_ray.serve.pair import PairSpec
from rgalign_ray.serve.session_reader import SessionReader

NOON = datetime(2026, 1, 2, 12)


class Reasoner:
    """Notes what it reads."""

    def __init__(self, _: Any) -> None:
        self.texts: list[str] = []

    def read(self, texts: list[str]) -> list[np.ndarray]:
        self.texts += texts
        return [VECTOR] * len(texts)


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.timestamp("ns", "Asia/Singapore")])
def test_a_situation_is_of_its_moment_in_whatever_zone_the_log_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(read_ahead, "FrozenReasoner", Reasoner)
    read_as(tmp_path)
    template = Template.model_validate(TEMPLATE.model_dump() | {"session": "{{ ts.hour }} {{ history | length }}"})
    spec = SimpleNamespace(reader=lambda: SessionReader(str(tmp_path), SPEC, template, 5))
    made = read_ahead.Reader(cast(PairSpec, spec), config.Encode())
    ts = pa.array([NOON], pa.timestamp("us")).cast(pa.timestamp("us", "UTC")).cast(kind)
    history = pa.array([[{"event": "chat", "text": "hi", "ts": NOON}]], pa.list_(EVENT))
    found = made(pa.table({"user_id": ["u1"], "ts": ts, "history": history}))
    assert found["ts"].to_pylist() == [NOON]
    assert cast(Reasoner, made.reasoner).texts == ["12 1"], "and so it is read"
