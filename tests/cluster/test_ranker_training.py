"""Ranker training through Ray Data and Ray Train."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from safetensors.numpy import load_file

from rgalign_ray import config, schema, storage
from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.roles import fold_of
from rgalign_ray.ranker import scoring, training
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ray_train import Alive

pytestmark = pytest.mark.cluster

INTENTS, DIM, SESSIONS = 12, 16, 203
SETTINGS = config.Ranker(dim=8, heads=2, epochs=3, dropout=0.0, batch_sessions=32, whitened_dim=8, workers=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sessions of 203 users over several days, ragged candidates, and embeddings that tell the need."""
    root = tmp_path_factory.mktemp("ranker")
    draw = np.random.default_rng(0)
    ids = [f"i{i:02d}" for i in range(INTENTS)]
    columns = dict.fromkeys(("intent_id", "title", "description", "category"), ids)
    storage.write_table(str(root / "log/intents.parquet"), pa.table(columns, schema=schema.INTENTS))
    need = draw.integers(INTENTS, size=SESSIONS)
    days = [datetime.datetime(2026, 1, 1 + i % 5) for i in range(SESSIONS)]
    candidates = [
        sorted({int(need[i]), *draw.choice(INTENTS, size=draw.integers(4, 9), replace=False).tolist()})
        for i in range(SESSIONS)
    ]
    clicks = [[c == need[i] and i % 4 > 0 for c in row] for i, row in enumerate(candidates)]
    table = pa.table(
        {
            "session_id": [f"s{i}" for i in range(SESSIONS)],
            "user_id": [f"u{i}" for i in range(SESSIONS)],
            "ts": pa.array(days, schema.TIMESTAMP),
            "tier": [f"t{i % 3}" for i in range(SESSIONS)],
            "history": pa.array([[] for _ in range(SESSIONS)], pa.list_(schema.EVENT)),
            "candidates": [[ids[c] for c in row] for row in candidates],
            "shown": [[True] * len(row) for row in candidates],
            "clicks": clicks,
            "role": ["valid" if i % 6 == 0 else "test" if i % 7 == 0 else "rank" for i in range(SESSIONS)],
        }
    )
    for day in range(1, 6):
        chosen = np.flatnonzero([d.day == day for d in days])
        folder = f"log/sessions/dt=2026-01-{day:02d}/region=R1/part-00000.parquet"
        storage.write_table(str(root / folder), table.take(pa.array(chosen)))
    meaning = draw.normal(size=(INTENTS, DIM))
    vectors = meaning[need] + 0.2 * draw.normal(size=(SESSIONS, DIM))
    prompt = _embeddings(table["session_id"].to_pylist(), "prompt", vectors)
    query = _embeddings(table["session_id"].to_pylist()[::2], "query", vectors[::2])
    storage.write_table(str(root / "embeddings/part-00000.parquet"), pa.concat_tables([prompt, query]))
    storage.write_table(str(root / "items/part-00000.parquet"), _embeddings(ids, "item", meaning))
    return root


def _embeddings(ids: list[str], readout: str, vectors: np.ndarray) -> pa.Table:
    flat = pa.array(vectors.astype(np.float16).ravel())
    arrays = [ids, [readout] * len(ids), [-1] * len(ids), [None] * len(ids), ["r0"] * len(ids)]
    columns = [pa.array(a, t) for a, t in zip(arrays, schema.embeddings(DIM).types[:5], strict=True)]
    columns.append(pa.FixedSizeListArray.from_arrays(flat, DIM))
    return pa.table(columns, schema=schema.embeddings(DIM))


def _space(tiers: Sequence[str] = ("t0", "t1", "t2")) -> FeatureSpace:
    spec = FeatureSpec.model_validate({"fields": [{"name": "tier", "kind": "categorical"}], "history": {"length": 4}})
    table = pa.table({"tier": [*tiers] * 20, "ts": pa.array([None] * 60, schema.TIMESTAMP)})
    table = table.append_column("history", pa.array([[]] * 60, pa.list_(schema.EVENT)))
    return FeatureSpace.fit(spec, [table])


def _job(
    log: Path, out: Path, settings: config.Ranker = SETTINGS, shuffled: tuple[bool, ...] = (False,), local: bool = False
) -> training.RankerJob:
    specs = [
        training.RankerSpec(f"ranker{i}", "qe_rec", str(out / f"ranker{i}"), seed=3, shuffled=control)
        for i, control in enumerate(shuffled)
    ]
    return training.RankerJob(
        rankers=tuple(specs),
        log_uri=str(log / "log"),
        space=_space().to_dict(),
        settings=settings,
        storage_uri=str(out / "train"),
        run_name="run",
        embeddings_uris=(str(log / "embeddings"),),
        item_embeddings_uri=str(log / "items"),
        local=local,
    )


def _train(*args: object, **kwargs: object) -> training.TrainedRanker:
    return training.train(_job(*args, **kwargs))["ranker0"]  # type: ignore[arg-type]


def _weights(trained: training.TrainedRanker) -> dict[str, np.ndarray]:
    return load_file(storage.join(trained.uri, scoring.WEIGHTS))


def test_two_workers_repeat_to_the_bit_and_agree_with_one(ray_cluster: object, log: Path, tmp_path: Path) -> None:
    first = _train(log, tmp_path / "a")
    again = _train(log, tmp_path / "b")
    alone = _train(log, tmp_path / "c", local=True)
    assert first.version == again.version
    assert first.figures == again.figures
    roles = ["valid" if i % 6 == 0 else "test" if i % 7 == 0 else "rank" for i in range(SESSIONS)]
    assert first.figures["sessions"] == alone.figures["sessions"] == roles.count("rank")
    assert first.figures["validation_sessions"] == roles.count("valid")
    one = _weights(alone)
    for name, values in _weights(first).items():
        np.testing.assert_allclose(values, one[name], atol=2e-4, err_msg=name)
    assert not storage.exists(str(tmp_path / "a/train/run"))


def test_the_driver_trains_where_there_are_no_workers(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Ray, as one worker would, and telling of each epoch."""
    by_driver = _train(log, tmp_path / "a", SETTINGS.changed({"workers": 0}))
    told = capsys.readouterr().err.splitlines()
    alone = _train(log, tmp_path / "b", local=True)
    assert by_driver.figures == alone.figures and capsys.readouterr().err == ""
    for name, values in _weights(by_driver).items():
        np.testing.assert_array_equal(values, _weights(alone)[name], err_msg=name)
    assert len(told) == len(by_driver.figures["losses"]) and told[0].startswith("  ranker0: epoch 1/")


def test_artefact_scores_sessions_and_the_shuffled_control_learns_less(
    ray_cluster: object, log: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 12, "lr": 1e-2, "patience": 12})
    both = training.train(_job(log, tmp_path / "a", settings, shuffled=(False, True), local=True))
    trained, shuffled = both["ranker0"], both["ranker1"]
    assert trained.figures["best_gauc"] > shuffled.figures["best_gauc"] + 0.1
    ranker = scoring.load(trained.uri)
    table = storage.read_table(str(log / "log/sessions"))
    batch = examples(table, ranker.space, Catalogue.load(str(log / "log")))
    embeddings = Embeddings.load(str(log / "embeddings"))
    scores = scoring.score_sessions(ranker, batch, space_version=ranker.meta.space_version, embeddings=embeddings)
    assert (np.isneginf(scores) == (batch["candidates"] < 0)).all()
    assert ranker.meta.reasoner_version == "r0"


def test_a_process_that_is_nobodys_worker_trains_on_its_cpu(log: Path, tmp_path: Path) -> None:
    """It may be a task that has been given no GPU, where the workers of others have."""
    settings = SETTINGS.model_copy(update={"use_gpu": True, "epochs": 1})
    assert len(_train(log, tmp_path / "a", settings, local=True).figures["losses"]) == 1


def test_blocks_are_cut_by_the_sessions_that_are_read(log: Path, tmp_path: Path) -> None:
    job = _job(log, tmp_path)
    sessions = [i % 6 == 0 for i in range(SESSIONS)].count(True)
    few = replace(job, train_roles=())
    assert training._block_rows(few) == sessions // (job.settings.workers * training.BLOCKS_PER_WORKER)


def test_rankers_of_one_job_come_out_as_each_would_alone(ray_cluster: object, log: Path, tmp_path: Path) -> None:
    alone = _train(log, tmp_path / "a", local=True)
    second = training.train(_job(log, tmp_path / "b", shuffled=(True, False), local=True))["ranker1"]
    assert second.version == alone.version


def test_a_ranker_begins_with_the_weights_of_another(ray_cluster: object, log: Path, tmp_path: Path) -> None:
    learns = SETTINGS.model_copy(update={"text_match": False})  # these texts tell all before the first step
    start = _train(log, tmp_path / "a", learns, local=True)
    job = _job(log, tmp_path / "b", learns.model_copy(update={"workers": 1, "epochs": 1}))
    warm = replace(job, rankers=(replace(job.rankers[0], start_uri=start.uri),))
    on = training.train(warm)["ranker0"]
    assert on.figures["losses"][0] < start.figures["losses"][1]
    assert on.figures["best_gauc"] >= start.figures["best_gauc"]
    assert scoring.load(on.uri).meta.settings.epochs == 1
    wider = replace(warm, settings=learns.model_copy(update={"dim": 2 * SETTINGS.dim}))
    with pytest.raises(DataError, match=r"ranker0: its weights \(qe_rec\) have other shapes than those of the qe_rec"):
        training.train(wider)
    with pytest.raises(DataError, match="features are of space"):
        training.train(replace(warm, space=_space("abc").to_dict()))


def test_a_ranker_without_a_fold_is_that_of_a_log_without_its_users(
    ray_cluster: object, log: Path, tmp_path: Path
) -> None:
    job = _job(log, tmp_path / "a", shuffled=(False, False), local=True)
    specs = tuple(replace(spec, without=fold) for fold, spec in enumerate(job.rankers))
    crossed = training.train(replace(job, rankers=specs, folds=2))
    shutil.copytree(log, tmp_path / "part")
    for file in storage.list_files(str(tmp_path / "part/log/sessions"), ".parquet"):
        table = storage.read_table(file)
        fold = fold_of(table["user_id"].to_pylist(), 2)
        roles = [
            "none" if role == "rank" and at == 0 else role
            for role, at in zip(table["role"].to_pylist(), fold, strict=True)
        ]
        place = table.column_names.index("role")
        storage.write_table(file, table.set_column(place, "role", pa.array(roles)))
    part = _train(tmp_path / "part", tmp_path / "b", local=True)
    assert crossed["ranker0"].version == part.version != crossed["ranker1"].version
    learned = [crossed[f"ranker{fold}"].figures["sessions"] for fold in range(2)]
    assert sum(learned) == _train(log, tmp_path / "c", local=True).figures["sessions"]


@pytest.mark.fault
def test_a_worker_that_dies_resumes_from_the_checkpoint(
    ray_cluster: object, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(log, tmp_path / "a", local=True)
    flag = tmp_path / "died"

    def dies_once(worker_config: dict, alive: Alive) -> dict:  # runs in the worker, which imports the package afresh
        from rgalign_ray.ranker import training as inside

        report = inside._Keeper.__call__

        def report_and_die(self: inside._Keeper, fit: inside.Fit) -> None:
            self.saved = -1e9  # a checkpoint after every epoch
            report(self, fit)
            if fit.progress.epoch == 2 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if flag.exists():
                (flag.parent / f"epoch-{fit.progress.epoch}").touch()

        inside._Keeper.__call__ = report_and_die  # type: ignore[method-assign]
        return inside._worker(worker_config, alive)

    monkeypatch.setattr(training, "_worker", dies_once)
    one_worker = SETTINGS.model_copy(update={"workers": 1})
    resumed = _train(log, tmp_path / "b", one_worker)
    assert flag.exists()
    assert not (tmp_path / "epoch-1").exists()
    assert resumed.version == whole.version
    assert resumed.figures == whole.figures


def test_a_long_log_comes_in_larger_blocks_and_to_the_same_ranker(
    ray_cluster: object, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a small log are cut to be dealt evenly; those of a long one stay as its files have them."""
    cut = _train(log, tmp_path / "cut")
    monkeypatch.setattr(training, "MAX_BLOCK_ROWS", 16)
    whole = _train(log, tmp_path / "whole")
    assert whole.figures["sessions"] == cut.figures["sessions"]
    expected = _weights(cut)
    for name, values in _weights(whole).items():
        np.testing.assert_allclose(values, expected[name], atol=2e-4, err_msg=name)


def test_what_a_worker_holds_is_its_own(ray_cluster: object) -> None:
    """Rows that stayed in the object store would fill it, and be spilt to disk and read back."""
    table = pa.table({"a": pa.array(range(100_000)), "b": pa.array([[1.0, 2.0]] * 100_000)})
    lent = ray.get(ray.put(table))
    kept, *others = training.held([lent, lent.slice(0, 0)])
    assert not others and kept == table
    buffers = {
        name: {
            buffer.address
            for column in it.columns
            for chunk in column.chunks
            for buffer in chunk.buffers()
            if buffer is not None
        }
        for name, it in (("lent", lent), ("kept", kept))
    }
    assert buffers["kept"] and not buffers["kept"] & buffers["lent"]
    start = min(buffers["lent"])
    assert all(not start <= address < start + lent.nbytes for address in buffers["kept"])
