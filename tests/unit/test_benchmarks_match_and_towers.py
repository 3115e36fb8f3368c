"""A ranker's scores taken apart: towers and match are what each says where the other is silent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from logs_data import SPEC, session, table
from ranker_data import sizes

from benchmarks.match_and_towers import Parts
from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate.ladder import Rung
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.qe_rec import QERec

TOWERS = np.array([[0.5, -1.0, -np.inf], [2.0, 0.0, 1.0]], np.float32)
TEXTS = np.array([[1.0, 3.0, 0.0], [-1.0, 0.5, 2.0]], np.float32)


@dataclass
class Sessions:
    """Scores that are the towers' and, by a ranker's own weight, the texts'."""

    mask = np.isfinite(TOWERS)

    def score(self, rung: Rung, rank_by: config.RankBy) -> np.ndarray:
        gate = scoring.load(rung.ranker, rank_by).model.match.gate  # type: ignore[union-attr]
        return TOWERS + float(gate) * TEXTS


def _ranker(place: Path, match_dim: int) -> Rung:
    model = QERec(sizes(match_dim=match_dim), config.Ranker(dim=8, heads=2, whitened_dim=8))
    with torch.no_grad():
        model.match.gate.fill_(0.25)  # type: ignore[union-attr]
    space = FeatureSpace.fit(SPEC, [table(session())])
    ids = [str(intent) for intent in range(model.sizes.num_intents)]
    meta = scoring.meta_of(model, space=space.to_dict(), intent_ids=ids, reasoner_version="r0", seed=0, figures={})
    scoring.save(model, str(place), meta)
    return Rung("qe_rec", str(place))


def test_what_towers_and_texts_say_is_told_apart_and_the_ranker_left_as_it_was(tmp_path: Path) -> None:
    rung = _ranker(tmp_path, match_dim=5)
    parts = Parts.of(Sessions(), rung)  # type: ignore[arg-type]
    np.testing.assert_array_equal(parts.towers, TOWERS)
    np.testing.assert_allclose(parts.match, np.where(Sessions.mask, 0.25 * TEXTS, 0.0), atol=1e-6)
    assert float(scoring.load(rung.ranker).model.match.gate) == 0.25  # type: ignore[union-attr]


def test_a_ranker_that_compares_no_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compares no texts"):
        Parts.of(Sessions(), _ranker(tmp_path, match_dim=0))  # type: ignore[arg-type]
