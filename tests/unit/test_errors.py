from __future__ import annotations

import errno

import pytest
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayTaskError
from ray.train import WorkerGroupError

from rgalign_ray.errors import InfrastructureError, is_full_store, is_no_space

FULL = OSError(errno.ENOSPC, "No space left on device")


def raised_from(cause: Exception) -> Exception:
    try:
        raise InfrastructureError("a unit failed") from cause
    except InfrastructureError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        raised_from(FULL),
        RayTaskError("run", "", FULL).as_instanceof_cause(),
        WorkerGroupError("1 worker failed", {1: RayTaskError("train", "", FULL)}),
        OutOfDiskError("an object that is put on disk"),
    ],
)
def test_a_full_disk_is_known_wherever_it_was_met(error: Exception) -> None:
    assert is_no_space(error)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_no_space(raised_from(FileNotFoundError(errno.ENOENT, "no such file")))
    assert not is_no_space(ObjectStoreFullError("x")) and not is_full_store(OutOfDiskError("x"))
    circle = InfrastructureError("its own cause")
    circle.__cause__ = circle
    assert not is_no_space(circle)


def test_a_full_object_store_is_known_wherever_it_was_met() -> None:
    full = ObjectStoreFullError("x")
    assert is_full_store(full) and is_full_store(raised_from(full))
    assert is_full_store(RayTaskError("run", "", full).as_instanceof_cause())
    assert not is_full_store(FULL)
