"""Training a ranker with Ray Train, fed by Ray Data.

```
<log>/sessions ─ read, prune ─▶ examples ⋈ e(x), e(x,q) ─ split ─▶ worker 0 ┐
   (Parquet)        Ray Data tasks, streamed, in order        └───▶ worker 1 ┴─ epochs in memory (fit.py)
```

The log is streamed once: each worker holds its part of the sessions as arrays (about 2.5 kB a session at
80 candidates and 576 numbers an embedding), so an epoch costs no Ray Data work. Ray Data deals blocks to
the worker with the fewest rows, in the order of the log (`preserve_order`), hence equally whenever it is
repeated on the same machine; and whatever it deals, `fit` makes the same global batches of it. Blocks are
not equalised, since that would drop rows.

Without workers (`ranker.workers` 0) the driver reads the log and trains by itself.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray.data
import ray.train
import torch
from ray.train import DataConfig

from rgalign_ray import config, ray_metrics, ray_train, storage
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.logs import stream
from rgalign_ray.logs.catalogue import CANDIDATE_SETS_FILE, INTENTS_FILE, Catalogue
from rgalign_ray.logs.examples import column_names, columns
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.progress import clock
from rgalign_ray.ranker.base import Ranker
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group, pack, unpack
from rgalign_ray.ranker.models import MODELS
from rgalign_ray.ranker.rows import from_tables, reading, training_table
from rgalign_ray.ranker.scoring import Meta, load, meta_of, save
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.text_match import MAX_DIM

VALID_ROLE = "valid"
DATASET = "sessions"
MAX_BLOCK_ROWS = 4096
"""Rows of a block, where blocks are cut."""
MAX_BLOCK_BYTES = 8 * 2**20
"""Of a large log; some thousand rows, so that workers' loads stay near each other."""
BLOCKS_PER_WORKER = 4
"""Blocks are dealt whole, so that workers' loads differ by at most one of this many."""
CHECKPOINT_EVERY_S = 30.0
"""At most one checkpoint in this time, at the end of an epoch: a killed worker costs that, and the epoch in work."""
STATE = "state.pt"


@dataclass(frozen=True)
class RankerSpec:
    """One ranker of a job.

    Args:
        name: unique in the job.
        kind: the model.
        out_uri: folder that receives the artefact.
        seed: of initialisation, order, dropout and query inputs.
        shuffled: the control in which every session reads the embeddings of another user's session.
        without: the fold of users that it does not learn from, if any.
        start_uri: the artefact of a ranker to begin with, of the same kind and sizes (a warm start); None begins anew.
        margin: standard errors by which validation must prefer what a warm start has learned to what it began with.
    """

    name: str
    kind: config.Model
    out_uri: str
    seed: int
    shuffled: bool = False
    without: int | None = None
    start_uri: str | None = None
    margin: float = 0.0


@dataclass(frozen=True)
class RankerJob:
    """Rankers to train one after another by one group of workers, over one pass of the log.

    Args:
        rankers: at least one.
        log_uri: an ingested log.
        space: `FeatureSpace.to_dict` of the feature space.
        settings: the rankers' part of the configuration.
        storage_uri: folder for Ray Train's own checkpoints; what this run leaves there is removed at its end.
        run_name: a job that died is resumed by the same name.
        embeddings_uris: e(x) and e(x,q) of the sessions, by one version of a reasoner; required by qe_rec.
        item_embeddings_uri: text embeddings of the intents (readout item).
        shuffle_seed: of the control's permutation.
        local: train in this process whatever `settings.workers`, and show no progress: whoever calls does.
        train_roles: whose sessions are learned from.
        folds: into how many users are cut, where rankers leave one out.
    """

    rankers: tuple[RankerSpec, ...]
    log_uri: str
    space: dict[str, Any]
    settings: config.Ranker
    storage_uri: str
    run_name: str
    embeddings_uris: tuple[str, ...] = ()
    item_embeddings_uri: str | None = None
    shuffle_seed: int = 0
    local: bool = False
    train_roles: tuple[str, ...] = ("rank",)
    folds: int = 0


@dataclass(frozen=True)
class TrainedRanker:
    uri: str
    version: str
    figures: dict[str, Any]


def train(job: RankerJob) -> dict[str, TrainedRanker]:
    """Trains rankers on `train_roles`, choosing each one's epoch on role valid, and writes their artefacts.

    Returns:
        by name of the spec.

    Raises:
        ConfigError: for a QE-Rec without embeddings.
        DataError: for a log without clicks in those roles or valid, embeddings that do not belong to it, or a ranker
            to begin with that cannot be gone on from.
        InfrastructureError: when workers died more than `settings.retries` times.
    """
    reading = [spec for spec in job.rankers if MODELS[spec.kind].reads_queries]
    if reading and not job.embeddings_uris:
        raise ConfigError("ranker: qe_rec reads query embeddings; encode the sessions first.")
    catalogue = _catalogue(job.log_uri)
    intent_ids = Catalogue(*catalogue).ids
    embeddings = Embeddings.load(*job.embeddings_uris) if reading else None
    items = Embeddings.load(job.item_embeddings_uri).items(intent_ids) if job.item_embeddings_uri else None
    item_dim = min(job.settings.whitened_dim, items.shape[1], len(intent_ids) - 1) if items is not None else 0
    match_dim = 0
    if items is not None and embeddings is not None and items.shape[1] == embeddings.dim:  # one encoder has read both
        match_dim = min(MAX_DIM, embeddings.dim, len(intent_ids) - 1)
    sizes = Sizes.of(
        FeatureSpace.from_dict(job.space),
        num_intents=len(intent_ids),
        embedding_dim=embeddings.dim if embeddings else 0,
        item_dim=item_dim,
        match_dim=match_dim,
    )
    # a process that is nobody's worker has been given no GPU
    settings = job.settings.model_copy(update={"use_gpu": False}) if job.local else job.settings
    worker_config = {
        "rankers": [asdict(spec) for spec in job.rankers],
        "sizes": asdict(sizes),
        "settings": settings.model_dump(),
        "items": items,
        "starts": {
            spec.name: _start(spec.start_uri, job, intent_ids, MODELS[spec.kind](sizes, job.settings))
            for spec in job.rankers
            if spec.start_uri
        },
    }
    if job.local or not job.settings.workers:
        reporter = _silent if job.local else partial(_Reporter, time.monotonic())
        results = _train_all(_tables(job, catalogue, embeddings), worker_config, reporter=reporter)
    else:
        results = _fit(job, _dataset(job, catalogue, embeddings), worker_config)
    if "data_error" in results:
        raise DataError(results["data_error"])
    trained = {}
    for spec in job.rankers:
        result = results[spec.name]
        model = MODELS[spec.kind](sizes, job.settings)
        model.load_state_dict(unpack(result["weights"]))
        meta: Meta = meta_of(
            model,
            space=job.space,
            intent_ids=intent_ids,
            reasoner_version=embeddings.reasoner_version if embeddings else None,
            seed=spec.seed,
            figures=result["figures"],
        )
        version = save(model, spec.out_uri, meta).version
        trained[spec.name] = TrainedRanker(spec.out_uri, version, result["figures"])
    storage.delete(storage.join(job.storage_uri, job.run_name))
    return trained


def _start(uri: str, job: RankerJob, intent_ids: list[str], model: Ranker) -> bytes:
    """The weights that `model` begins with, packed."""
    found = load(uri)
    found.require(space_version=FeatureSpace.from_dict(job.space).version, intent_ids=intent_ids)
    weights = found.model.state_dict()
    shapes, wanted = ({name: tensor.shape for name, tensor in it.items()} for it in (weights, model.state_dict()))
    if shapes != wanted:
        raise DataError(
            f"{uri}: its weights ({found.meta.kind}) have other shapes than those of the {model.kind} that would begin "
            "with them; train that one anew, or with the settings of this one."
        )
    return pack(weights)


def _fit(job: RankerJob, dataset: ray.data.Dataset, worker_config: dict[str, Any]) -> dict[str, Any]:
    settings = job.settings
    outcome = ray_train.run(
        _worker,
        worker_config,
        settings,
        section="ranker",
        storage_uri=job.storage_uri,
        name=job.run_name,
        datasets={DATASET: dataset},
        dataset_config=_WholeBlocks(),
    )
    assert isinstance(outcome, dict), "rank 0 returns weights and figures, or a failure"
    return outcome


class _WholeBlocks(DataConfig):
    """Splits a dataset over workers by whole blocks: uneven, but without a row lost."""

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options = copy.deepcopy(dataset.context.execution_options)
            dataset.context.execution_options.preserve_order = True
            for rank, split in enumerate(dataset.streaming_split(world_size, equal=False)):
                output[rank][name] = split
        return output


def _worker(worker_config: dict[str, Any], alive: ray_train.Alive) -> dict[str, Any]:
    """Runs in every worker; only rank 0's return value is used."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells of every checkpoint otherwise
    started = time.monotonic()
    shard = ray.train.get_dataset_shard(DATASET)
    blocks = held(shard.iter_batches(batch_size=None, batch_format="pyarrow"), alive)
    return _train_all(blocks, worker_config, _checkpoint(), reporter=partial(_Keeper, started), alive=alive)


def held(batches: Iterable[pa.Table], alive: ray_train.Alive = lambda: None) -> list[pa.Table]:
    """The batches in memory of this process, but for empty ones.

    What Ray hands out lies in the object store: kept there, it would fill the store and have the rest spilt to disk.
    """
    found = []
    for batch in batches:
        alive()
        if batch.num_rows:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_table(batch)
            found.append(pa.ipc.open_stream(sink.getvalue()).read_all())
    return found


def _train_all(
    blocks: list[pa.Table],
    worker_config: dict[str, Any],
    checkpoint: dict[str, Any] | None = None,
    *,
    reporter: Callable[[str, dict[str, Any]], Callable[[Fit], None]],
    alive: ray_train.Alive = lambda: None,
) -> dict[str, Any]:
    """Trains one ranker after another on this process's blocks.

    Returns:
        by ranker, its packed weights and figures; or `data_error`, which a retry would not mend.
    """
    checkpoint = checkpoint or {}
    sizes = Sizes(**worker_config["sizes"])
    settings = config.Ranker.model_validate(worker_config["settings"])
    specs = [RankerSpec(**spec) for spec in worker_config["rankers"]]
    rows = from_tables(blocks, sizes, any(spec.shuffled for spec in specs))
    group = Group()
    device = "cuda" if settings.use_gpu else "cpu"
    results: dict[str, Any] = checkpoint.get("results", {})
    with _one_thread():
        for spec in specs:
            if spec.name in results:
                continue
            own = reading(rows, spec.shuffled, spec.without)
            try:
                start = unpack(worker_config["starts"][spec.name]) if spec.start_uri else None
                items, seed = worker_config["items"], spec.seed
                fit = Fit(spec.kind, sizes, settings, own, items, seed, group, device, start, spec.margin)
            except DataError as error:  # from summed counts, hence the same in all workers
                return {"data_error": str(error)}
            if checkpoint.get("name") == spec.name:
                fit.resume(checkpoint["fit"])
            fit.after_step = alive
            figures = fit.run(reporter(spec.name, results))
            results[spec.name] = {"weights": pack(fit.model.cpu().state_dict()), "figures": figures}
    return results


def _silent(name: str, results: dict[str, Any]) -> Callable[[Fit], None]:
    return lambda fit: None


class _Reporter:
    """After each epoch: a line from rank 0."""

    def __init__(self, started: float, name: str, results: dict[str, Any]) -> None:
        self.name, self.started, self.results = name, started, results
        self.began = time.monotonic()
        self.epochs = 0

    def __call__(self, fit: Fit) -> None:
        progress, now = fit.progress, time.monotonic()
        self.epochs += 1  # of this attempt; a resumed one starts further on
        if fit.group.rank > 0:
            return
        left = (now - self.began) / self.epochs * (fit.settings.epochs - progress.epoch)
        line = f"  {self.name}: epoch {progress.epoch}/{fit.settings.epochs}, loss {progress.losses[-1]:.4f}, "
        line += f"validation GAUC {progress.gaucs[-1]:.4f} (best {progress.best_gauc:.4f}), "
        line += f"{clock(now - self.started)}" + ("" if fit.finished else f", at most {clock(left)} more")
        print(line, file=sys.stderr, flush=True)
        ray_metrics.counter("ranker_epochs").inc(tags={"ranker": self.name})
        ray_metrics.gauge("ranker_gauc").set(progress.gaucs[-1], tags={"ranker": self.name})


class _Keeper(_Reporter):
    """Now and then a checkpoint as well, of all workers' common state."""

    def __init__(self, started: float, name: str, results: dict[str, Any]) -> None:
        super().__init__(started, name, results)
        self.saved = self.began

    def __call__(self, fit: Fit) -> None:
        super().__call__(fit)
        first, now = fit.group.rank == 0, time.monotonic()
        due = first and now - self.saved >= CHECKPOINT_EVERY_S
        if not fit.group.sum(np.array([due]))[0]:
            return
        self.saved = now
        with tempfile.TemporaryDirectory() as folder:
            if first:
                state = {"results": self.results, "name": self.name, "fit": fit.state()}
                Path(folder, STATE).write_bytes(pack(state))
            checkpoint = ray.train.Checkpoint.from_directory(folder) if first else None
            ray.train.report({"gauc": fit.progress.gaucs[-1]}, checkpoint=checkpoint)


def _checkpoint() -> dict[str, Any]:
    """What an attempt that died had reached: results of finished rankers, name and state of the one in work."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        return unpack(Path(folder, STATE).read_bytes())


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads decides the order of float additions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _catalogue(log_uri: str) -> tuple[pa.Table, pa.Table | None]:
    sets = storage.join(log_uri, CANDIDATE_SETS_FILE)
    intents = storage.read_table(storage.join(log_uri, INTENTS_FILE))
    return intents, storage.read_table(sets) if storage.exists(sets) else None


def _shuffled(job: RankerJob, embeddings: Embeddings | None) -> Embeddings | None:
    """The control's embeddings, where a ranker of the job wants them."""
    if embeddings is None or not any(spec.shuffled for spec in job.rankers):
        return None
    table = storage.read_table(storage.join(job.log_uri, "sessions"), ["session_id", "user_id"], _trains(job))
    return embeddings.shuffled(table["session_id"].to_pylist(), table["user_id"].to_pylist(), job.shuffle_seed)


def _dataset(
    job: RankerJob, catalogue: tuple[pa.Table, pa.Table | None], embeddings: Embeddings | None
) -> ray.data.Dataset:
    sessions = stream.sessions(job.log_uri, columns=_columns(job), roles=[*job.train_roles, VALID_ROLE])
    sessions.context.enable_progress_bars = False  # one line an epoch is this stage's progress
    sessions.context.target_max_block_size = MAX_BLOCK_BYTES
    rows = _block_rows(job)
    if rows < MAX_BLOCK_ROWS:  # a small log may be one block, which one worker would get
        sessions = sessions.repartition(target_num_rows_per_block=rows)
    # without it, and with no batch size, reading and encoding are one task, and no block goes between them
    return sessions.map_batches(
        training_table, fn_kwargs=_reading(job, catalogue, embeddings), batch_size=None, batch_format="pyarrow"
    )


def _tables(
    job: RankerJob, catalogue: tuple[pa.Table, pa.Table | None], embeddings: Embeddings | None
) -> list[pa.Table]:
    """What `_dataset` streams, in memory; block by block, since a block is padded to its longest list on the way."""
    sessions = storage.read_table(storage.join(job.log_uri, "sessions"), _columns(job), _trains(job))
    arguments = _reading(job, catalogue, embeddings)
    starts = range(0, sessions.num_rows, MAX_BLOCK_ROWS)
    return [training_table(sessions.slice(start, MAX_BLOCK_ROWS), **arguments) for start in starts]


def _columns(job: RankerJob) -> list[str]:
    read = columns(FeatureSpace.from_dict(job.space), column_names(job.log_uri))
    return [*read, "role", *(["user_id"] if job.folds else [])]


def _trains(job: RankerJob) -> ds.Expression:
    return pc.field("role").isin([*job.train_roles, VALID_ROLE])


def _reading(
    job: RankerJob, catalogue: tuple[pa.Table, pa.Table | None], embeddings: Embeddings | None
) -> dict[str, Any]:
    """Arguments of `training_table` besides the sessions."""
    return {
        "space": job.space,
        "catalogue": catalogue,
        "embeddings": embeddings,
        "shuffled": _shuffled(job, embeddings),
        "valid_role": VALID_ROLE,
        "folds": job.folds,
    }


def _block_rows(job: RankerJob) -> int:
    fs, path = storage.filesystem(storage.join(job.log_uri, "sessions"))
    rows = ds.dataset(path, filesystem=fs, format="parquet").count_rows(filter=_trains(job))
    return min(MAX_BLOCK_ROWS, max(1, rows // (job.settings.workers * BLOCKS_PER_WORKER)))
