"""The truth behind a log of the simulated shop, for evaluation alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import schema, storage
from rgalign_ray.errors import DataError
from rgalign_ray.world import clicks, kb
from rgalign_ray.world.draws import Draws


class Oracle:
    """True needs, and noise-free expectations under the click model that made the log.

    Intents are indices into the ids in sorted order. With p_k = P(click at position k) and
    r_k = P(resolved | click at k) of `rgalign_ray.world.clicks`, for the position model:

        ctr        = 1 − Π_k (1 − p_k)           P(at least one click)
        resolution = 1 − Π_k (1 − p_k · r_k)     P(a click that resolves)

    and for the cascade, with attraction a_k, and s and c the shares that go on after a skip and after a click:

        ctr        = Σ_k a_k · Π_{j<k} (1 − a_j) s
        resolution = Σ_k a_k r_k · Π_{j<k} ((1 − a_j) s + a_j (1 − r_j) c)
    """

    def __init__(self, truth: pa.Table):
        """
        Raises:
            DataError: when the truth lacks a column, or is not of one click model that this version knows.
        """
        schema.check(truth.schema, schema.TRUTH, "truth")
        self._ids = truth["session_id"].combine_chunks()
        self._need = _indices(truth["need"])
        self._bias = truth["b_user"].to_numpy()
        self._uniform = truth["uniform"].to_numpy()
        self.click_model = _click_model(truth)
        self._clicks = clicks.MODELS[self.click_model]

    @classmethod
    def load(cls, uri: str) -> Oracle:
        """The oracle of the log at `uri`.

        Raises:
            DataError: when the log has no truth, or one that cannot be read.
        """
        folder = storage.join(uri, "truth")
        if not storage.exists(folder):
            raise DataError(f"{uri}: no folder 'truth'; only logs of the simulated shop have an oracle.")
        return cls(storage.read_table(folder))

    def needs(self, session_ids: list[str]) -> list[str]:
        """The true need (intent id) of each session."""
        ids = list(kb.index())
        return [ids[need] for need in self._need[self._rows(session_ids)]]

    def uniform(self, session_ids: list[str]) -> np.ndarray:
        """bool [S]: sessions whose slate was drawn uniformly, so that clicks do not follow the old ranker."""
        return self._uniform[self._rows(session_ids)]

    def expected(self, session_ids: list[str], ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ctr [S], resolution [S]) where session s is shown `ranked[s]` (int [S, k]) at positions 0 … k−1."""
        rows = self._rows(session_ids)
        return self._clicks.expected(self._need[rows], self._bias[rows], ranked)

    def expected_clicks(self, session_ids: list[str], ranked: np.ndarray) -> np.ndarray:
        """float64 [S], the expected number of clicks where session s is shown `ranked[s]` (int [S, k])."""
        rows = self._rows(session_ids)
        return self._clicks.expected_clicks(self._need[rows], self._bias[rows], ranked)

    def draw(self, session_ids: list[str], ranked: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """bool [S, k] each: clicked, and clicked with the need resolved; the same for equal seeds and sessions."""
        rows = self._rows(session_ids)
        return self._clicks.draw(Draws(seed), rows.astype(np.uint64), self._need[rows], self._bias[rows], ranked)

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


def _indices(needs: pa.ChunkedArray) -> np.ndarray:
    found = pc.index_in(needs, pa.array(list(kb.index())))
    if found.null_count:
        unknown = needs.filter(pc.is_null(found))[0]
        raise DataError(f"truth: need '{unknown}' is not in the knowledge base; generate the log anew.")
    return found.to_numpy()


def _click_model(truth: pa.Table) -> str:
    """The one click model of a truth's sessions."""
    names = pc.unique(truth["click_model"]).to_pylist()
    if len(names) != 1:
        raise DataError(
            f"truth: sessions of {len(names)} click models ({names}) instead of one; generate the log anew."
        )
    if names[0] not in clicks.MODELS:
        raise DataError(f"truth: click model '{names[0]}' is not one of {sorted(clicks.MODELS)}.")
    return str(names[0])
