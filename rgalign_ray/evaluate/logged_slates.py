"""The slates of a log's sessions, as off-policy evaluation reads them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rgalign_ray.errors import DataError
from rgalign_ray.evaluate.policy_value import LoggedSlates
from rgalign_ray.logs import lists
from rgalign_ray.logs.catalogue import Catalogue


def read(table: pa.Table, catalogue: Catalogue) -> LoggedSlates:
    """The slates of a table of sessions with `position` (from 0, −1 where not shown) and conditional `propensity`.

    The logging policy's marginal propensities are not part of a log; `dataclasses.replace(slates, marginal=…)`
    adds them where its scores are known.

    Raises:
        DataError: when a column is missing, a session has no slate, two of its candidates share a position, or a
            shown one has no propensity.
    """
    for name in ("position", "propensity"):
        if name not in table.column_names:
            raise DataError(
                f"sessions: no column '{name}'; off-policy evaluation needs what was shown where, and how likely."
            )
    candidates = catalogue.candidates(table)
    position = _padded(table["position"], candidates.shape[1], -1)
    row, column = np.nonzero(position >= 0)
    place = position[row, column].astype(np.int64)
    slots = int(place.max(initial=-1)) + 1
    shown = np.full((len(table), slots), -1)
    shown[row, place] = column
    if (shown >= 0).sum() < len(row):
        wrong = row[np.argmax(shown[row, place] != column)]
        raise DataError(f"position: session '{table['session_id'][int(wrong)]}' shows two candidates at one position.")
    if not (shown >= 0).any(axis=1).all():
        wrong = int(np.argmin((shown >= 0).any(axis=1)))
        raise DataError(
            f"position: session '{table['session_id'][wrong]}' has none; leave sessions without a slate out."
        )
    return LoggedSlates(
        candidates=candidates,
        shown=shown,
        propensity=_of(_padded(table["propensity"], candidates.shape[1], 0.0), shown),
        clicks=_of(catalogue.padded(table["clicks"], candidates), shown),
        users=np.array(table["user_id"].to_pylist()),
    )


def _padded(column: pa.ChunkedArray, width: int, fill: float) -> np.ndarray:
    values = lists.flat(column).fill_null(fill).to_numpy(zero_copy_only=False)
    return lists.padded(lists.lengths(column), values, width, fill)


def _of(values: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """[S, K], values [S, C] of the shown columns; 0 in empty slots."""
    return np.where(shown >= 0, np.take_along_axis(values, np.maximum(shown, 0), axis=1), 0)
