"""The truth behind a log of the simulated shop, for evaluation alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import storage
from rgalign_ray.errors import DataError
from rgalign_ray.world import clicks, kb


class Oracle:
    """True needs, and noise-free expectations under the world's own click model.

    Intents are indices into the ids in sorted order. With p_k = P(click at position k) and
    r_k = P(resolved | click at k) of `rgalign_ray.world.clicks`, positions being independent:

        ctr        = 1 − Π_k (1 − p_k)           P(at least one click)
        resolution = 1 − Π_k (1 − p_k · r_k)     P(a click that resolves)
    """

    def __init__(self, truth: pa.Table):
        self._ids = truth["session_id"].combine_chunks()
        self._need = pc.index_in(truth["need"], pa.array(list(kb.index()))).to_numpy()
        self._bias = truth["b_user"].to_numpy()

    @classmethod
    def load(cls, uri: str) -> Oracle:
        """The oracle of the log at `uri`.

        Raises:
            DataError: when the log has no truth.
        """
        folder = storage.join(uri, "truth")
        if not storage.exists(folder):
            raise DataError(f"{uri}: no folder 'truth'; only logs of the simulated shop have an oracle.")
        return cls(storage.read_table(folder))

    def needs(self, session_ids: list[str]) -> list[str]:
        """The true need (intent id) of each session."""
        ids = list(kb.index())
        return [ids[need] for need in self._need[self._rows(session_ids)]]

    def expected(self, session_ids: list[str], ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ctr [S], resolution [S]) where session s is shown `ranked[s]` (int [S, k]) at positions 0 … k−1."""
        rows = self._rows(session_ids)
        p = clicks.click_probability(self._need[rows], self._bias[rows], ranked)
        r = clicks.resolution_probability(self._need[rows], ranked)
        return 1.0 - np.prod(1.0 - p, axis=1), 1.0 - np.prod(1.0 - p * r, axis=1)

    def best(self, session_ids: list[str], k: int) -> np.ndarray:
        """int [S, k]: intents by relevance to the true need, equal ones by id."""
        relevance = kb.relevance()[self._need[self._rows(session_ids)]]
        return np.argsort(-relevance, axis=1, kind="stable")[:, :k]

    def ceiling(self, session_ids: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`expected` of the `best` ranking."""
        return self.expected(session_ids, self.best(session_ids, k))

    def _rows(self, session_ids: list[str]) -> np.ndarray:
        rows = pc.index_in(pa.array(session_ids, pa.string()), self._ids)
        if rows.null_count:
            unknown = session_ids[pc.index(pc.is_null(rows), True).as_py()]
            raise DataError(f"truth: no session '{unknown}'; is this oracle of another log?")
        return rows.to_numpy()
