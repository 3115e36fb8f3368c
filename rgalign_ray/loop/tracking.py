"""A run's figures for those who watch many runs: lines of JSON always, TensorBoard and MLflow where asked for.

All is taken from the manifests, one stage at a time as it ends. So a run that is resumed tells what its killed tries
had not, and nothing twice; and a tracker that was away is told by the same command once it is back.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rgalign_ray import progress, storage
from rgalign_ray.config import Config
from rgalign_ray.errors import ConfigError, InfrastructureError, first_line

T = TypeVar("T")
FIGURES = "figures.jsonl"
TENSORBOARD = "tensorboard"
RUN_TAG = "rgalign.run_dir"
"""Of an MLflow run: which run directory it tells of."""
STAGE_TAG = "rgalign.stage."
"""With a stage's name: the key of what was told."""
NOT_IN_A_NAME = re.compile(r"[^\w\-. /]")
"""What MLflow refuses in the name of a metric."""
METRICS_A_REQUEST, PARAMETERS_A_REQUEST, CHARACTERS_A_PARAMETER = 1000, 100, 6000
"""At most, by MLflow's interface."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""MLflow's own would hold a run for many minutes when its server is away."""


@dataclass(frozen=True, slots=True)
class Point:
    """A number that a stage counted or measured."""

    name: str
    """As in rows/sessions, loss or gate/audit."""
    step: int
    """Number of the optimiser step or epoch, from 0; 0 for what is measured once."""
    value: float


def points(manifest: storage.Manifest) -> list[Point]:
    """All finite numbers of a manifest."""
    told = {"rows": manifest.rows, "seconds": manifest.seconds, "peak_memory_mb": manifest.peak_memory_mb}
    return list(_points("", told | manifest.figures))


def _points(name: str, value: Any) -> Iterator[Point]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _points(f"{name}/{key}" if name else str(key), inner)
    elif isinstance(value, list):
        for step, each in enumerate(value):
            if _is_number(each):
                yield Point(name, step, float(each))
    elif _is_number(value):
        yield Point(name, 0, float(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Sink(Protocol):
    """One place that is told."""

    def stage(self, manifest: storage.Manifest, found: list[Point]) -> None: ...

    def end(self) -> None:
        """All of the run is told."""


class Tracker:
    """Tells every sink of every stage. One that fails on the way is told no more, and the run goes on without it.

    Raises:
        ConfigError: for a tracker that is not installed.
        InfrastructureError: for a server that does not answer as the run begins.
    """

    def __init__(self, config: Config) -> None:
        kinds: dict[str, Callable[[Config], Sink]] = {"tensorboard": Tensorboard, "mlflow": Mlflow}
        self.sinks: dict[str, Sink] = {FIGURES: Lines(config.run_uri)}
        self.sinks |= {name: kinds[name](config) for name in config.tracking.to}

    def stage(self, manifest: storage.Manifest) -> None:
        found = points(manifest)
        self._each(lambda sink: sink.stage(manifest, found))

    def end(self) -> None:
        self._each(lambda sink: sink.end())

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                tell(sink)
            except Exception as error:  # of a tracker, whatever it is: it must not end hours of work
                if name == FIGURES:
                    raise
                del self.sinks[name]
                progress.note(
                    f"tracking: {name} is told no more ({first_line(error)}); all stands in {FIGURES}, and the same "
                    "command tells it later"
                )


class Lines:
    """`figures.jsonl` in the run directory: one line a number."""

    def __init__(self, run_uri: str) -> None:
        self.uri = storage.join(run_uri, FIGURES)
        self.lines: dict[str, list[str]] = {}

    def stage(self, manifest: storage.Manifest, found: list[Point]) -> None:
        head = {"stage": manifest.stage, "key": manifest.key}
        self.lines[manifest.stage] = [
            json.dumps(head | {"name": each.name, "step": each.step, "value": each.value}) for each in found
        ]
        text = "".join(f"{line}\n" for lines in self.lines.values() for line in lines)
        storage.write_bytes(self.uri, text.encode())

    def end(self) -> None:
        pass


class Tensorboard:
    """`tensorboard/` in the run directory: a folder a stage, so that equal figures of two rounds share a plot."""

    def __init__(self, config: Config) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise _missing("tensorboard") from None
        self.uri = storage.join(config.run_uri, TENSORBOARD)

    def stage(self, manifest: storage.Manifest, found: list[Point]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = storage.join(self.uri, manifest.stage)
        target = storage.join(folder, f"events.out.tfevents.{manifest.key}")
        if storage.exists(target):
            return
        storage.delete(folder)
        with tempfile.TemporaryDirectory(prefix="rgalign-tensorboard-") as work:
            with SummaryWriter(work) as writer:
                for each in found:
                    writer.add_scalar(each.name, each.value, each.step)
            (file,) = Path(work).iterdir()
            storage.write_bytes(target, file.read_bytes())

    def end(self) -> None:
        pass


class Mlflow:
    """A run of an MLflow experiment; found again by the run directory."""

    def __init__(self, config: Config) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise _missing("mlflow") from None
        address = config.tracking.mlflow_uri
        self.client = MlflowClient(tracking_uri=address)
        try:
            name = config.tracking.experiment
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.client.create_experiment(name)
            known = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{config.run_uri}'", max_results=1)
            tags = {RUN_TAG: config.run_uri}
            self.run = known[0] if known else self.client.create_run(experiment, tags=tags, run_name=config.name)
            if not known:
                settings = [Param(name, text[:CHARACTERS_A_PARAMETER]) for name, text in parameters(config)]
                for part in _parts(settings, PARAMETERS_A_REQUEST):
                    self.client.log_batch(self.run.info.run_id, params=part)
            self.told: dict[str, str] = dict(self.run.data.tags)
        except MlflowException as error:
            named = address or os.environ.get("MLFLOW_TRACKING_URI") or "the default address"
            raise InfrastructureError(f"tracking.mlflow_uri: {named} does not answer ({first_line(error)}).") from None

    def stage(self, manifest: storage.Manifest, found: list[Point]) -> None:
        from mlflow.entities import Metric

        tag, run = STAGE_TAG + manifest.stage, self.run.info.run_id
        if self.told.get(tag) == manifest.key:
            return
        now = int(time.time() * 1000)
        metrics = [
            Metric(NOT_IN_A_NAME.sub("_", f"{manifest.stage}/{each.name}"), each.value, now, each.step)
            for each in found
        ]
        for part in _parts(metrics, METRICS_A_REQUEST):
            self.client.log_batch(run, metrics=part)
        self.client.set_tag(run, tag, manifest.key)
        self.told[tag] = manifest.key

    def end(self) -> None:
        self.client.set_terminated(self.run.info.run_id)


def parameters(config: Config) -> list[tuple[str, str]]:
    """The settings, a line each, as in ranker.lr."""

    def lines(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from lines(f"{name}.{key}" if name else key, inner)
        else:
            yield NOT_IN_A_NAME.sub("_", name), value if isinstance(value, str) else json.dumps(value)

    return list(lines("", config.model_dump(mode="json")))


def _missing(name: str) -> ConfigError:
    return ConfigError(f"tracking.to: {name} is not installed; `pip install 'rgalign_ray[{name}]'`.")


def _parts(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (whole[start : start + size] for start in range(0, len(whole), size))
