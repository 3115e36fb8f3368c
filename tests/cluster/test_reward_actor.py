"""The reward model as an actor: what it says does not depend on whether it lives, and its silence is told."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle
from test_reward_model import SESSIONS, place, sessions_table, unit

from rgalign_ray import config, ray_stacks, storage
from rgalign_ray.errors import InfrastructureError
from rgalign_ray.reward import actor

__all__ = ["place"]  # a fixture

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

UNITS = [SESSIONS[:1], SESSIONS[1:3], SESSIONS[2:], SESSIONS[::2], SESSIONS]


class Silent:
    """Hangs in its first unit."""

    def score(self, sessions: pa.Table, rollouts_uri: str, embeddings_uri: str) -> None:
        time.sleep(600)


def write(
    folder: Path, place: Path, workers: int, in_flight: int, after_a_unit: Callable[[], object] = lambda: None
) -> list[bytes]:
    """What reward models say to `UNITS`, as the files that it becomes."""
    requests = []
    for number, ids in enumerate(UNITS):
        files = unit(folder / str(number), ids)[:2]
        requests.append((sessions_table(ids), *files))
    rankers = [[str(place / name)] for name in "ab"]
    models = [actor.remote(rankers, str(place / "log"), config.Reward()) for _ in range(workers)]
    said = []
    for (_, rollouts, _), scored in actor.score_all(models, requests, in_flight):
        storage.write_table(f"{rollouts}.scored", scored)
        said.append(Path(f"{rollouts}.scored").read_bytes())
        if len(said) == 2:
            after_a_unit()
    for model in models:
        ray.kill(model)
    return said


@pytest.mark.fault
@pytest.mark.parametrize(("workers", "in_flight"), [(1, 1), (1, 4), (2, 2)])
def test_a_reward_model_that_is_killed_between_two_units_says_the_same(
    place: Path, tmp_path: Path, workers: int, in_flight: int
) -> None:
    """With one in flight it has nothing in hand when it dies, with more the units that follow."""
    killed: list[int] = []
    quiet = write(tmp_path / "quiet", place, 1, 1)
    dead = write(tmp_path / "killed", place, workers, in_flight, lambda: killed.append(kills.kill("RewardModel")))
    assert dead == quiet
    assert len(quiet) == len(UNITS) and len(killed) == 1


def test_what_a_silent_reward_model_was_at_is_told() -> None:
    model: Any = ray_stacks.actor(Silent, "score", 8.0).remote()
    ray.get(model.place.remote(), timeout=60)
    requests = [(sessions_table(), "rollouts", "embeddings")]
    with pytest.raises(InfrastructureError, match=r"gave no answer for 8 s(.|\n)*line \d+ in score"):
        list(actor.score_all([model], requests, deadline_s=8.0))
    ray.kill(model)
