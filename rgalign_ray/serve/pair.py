"""The frozen pair of one version, as the service runs it: a reasoner that reads sessions, a ranker that scores them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, TypeVar
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import ValidationError

from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.readers import engine_of_run
from rgalign_ray.loop.stage import Run
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.batches import to_batch
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.reasoner.engine import EngineSpec, Prompts
from rgalign_ray.reward.functions import fault
from rgalign_ray.rollout.worker import Instruction
from rgalign_ray.serve.drift import Drift
from rgalign_ray.serve.session_reader import Row, SessionReader

Model = TypeVar("Model")
IDLE_S = 60.0
"""A version that is followed by another is kept as long as somebody has asked for it within this time."""
EXAMPLE_FILES = 100
DRIFT_SESSIONS, DRIFT_FILES = 20_000, 50
"""Training sessions that live ones are compared with, and files they are taken from, at most."""


@dataclass(frozen=True, slots=True)
class PairSpec:
    """Where a version's parts are; plain data, so that every process of the service can load its own."""

    run_uri: str
    sessions_uri: str
    ranker_uri: str
    engine: EngineSpec
    prompt: Template
    """That the pair was made with."""
    round_: int
    meta: scoring.Meta
    """Of the ranker."""
    simulated: bool
    """Whether its users are nobody."""
    rank_by: config.RankBy
    """What its ranker's scores are for."""

    @property
    def version(self) -> str:
        return f"{self.meta.reasoner_version}-{self.meta.version}"

    @property
    def reads(self) -> str:
        """Who reads what of a session: vectors of one reader mean nothing to a ranker that learned from another's."""
        return f"{self.meta.reasoner_version}-{storage.content_key(self.prompt.key, self.engine.max_session_tokens)}"

    @property
    def source(self) -> Source:
        return Source(self.run_uri, self.round_, self.version)

    @property
    def dim(self) -> int:
        """H, of e(x)."""
        return self.meta.sizes["embedding_dim"]

    def reader(self) -> SessionReader:
        length = self.meta.space["history_length"]
        return SessionReader(self.sessions_uri, self.meta.feature_spec, self.prompt, length)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a version is read from, and which; small, since it goes with every request."""

    run_uri: str
    round_: int
    version: str


def find(run_uri: str, round_: int | None = None, here: config.Reasoner | None = None) -> PairSpec:
    """The pair that a run directory holds: that of a round, or of the last round that is whole.

    Args:
        here: whose device and threads count where the pair is served, all else being the run's; None: the run's too.

    Raises:
        ConfigError: where there is no such run, or the round is not whole.
    """
    place = storage.join(run_uri, "config.json")
    if not storage.exists(place):
        raise ConfigError(f"run_dir: {run_uri} holds no run; `rgalign loop` makes one.")
    made = config.validate(storage.read_json(place))
    run = Run(made.model_copy(update={"run_dir": run_uri}))
    rounds = range(made.rounds, -1, -1) if round_ is None else [round_]
    whole = [at for at in rounds if storage.read_manifest(run.uri(f"rankers_{at}")) is not None]
    missing = f"rankers_{rounds[-1]}" if not whole else "sessions"
    if not whole or storage.read_manifest(run.uri("sessions")) is None:
        raise ConfigError(f"serve.round: {run_uri} has no whole {missing}; `rgalign loop` makes it.")
    ranker_uri, embeddings = run.uri(f"rankers_{whole[0]}", "qe_rec"), run.uri(f"embeddings_{whole[0]}")
    engine = engine_of_run(run, whole[0])
    if here is not None:
        its = engine.reasoner.model_copy(update={"device": here.device, "threads": here.threads})
        engine = replace(engine, reasoner=its)
    return PairSpec(
        run_uri=run_uri,
        sessions_uri=run.uri("sessions"),
        ranker_uri=ranker_uri,
        engine=engine,
        prompt=Template.of_run(embeddings),
        round_=whole[0],
        meta=scoring.load_meta(ranker_uri),
        rank_by=made.evaluate.rank_by,
        simulated=made.log.source == "shop",
    )


def variants_of(settings: config.Serve) -> list[config.Variant]:
    """Those that are named; or one, of the configuration's own run."""
    return settings.variants or [config.Variant(name="default")]


def pairs(settings: config.Config) -> dict[str, PairSpec]:
    """What is to be served by now, by the name of its variant.

    Raises:
        ConfigError: as `find`.
        DataError: where a run directory is damaged.
    """
    found = {}
    for variant in variants_of(settings.serve):
        run_uri = settings.model_copy(update={"run_dir": variant.run_dir or settings.run_dir}).run_uri
        round_ = settings.serve.round if variant.round is None else variant.round
        found[variant.name] = find(run_uri, round_, settings.reasoner)
    return found


class Versions(Generic[Model]):
    """Models of one kind in one process, by their source: loaded once each, and kept while they are asked for.

    Args:
        make: loads one.
        here: as for `find`.
    """

    def __init__(self, make: Callable[[PairSpec], Model], here: config.Reasoner) -> None:
        self._make, self._here = make, here
        self._models: dict[Source, Model] = {}
        self._wanted: list[Source] = []
        self._used: dict[Source, float] = {}
        self._lock = threading.Lock()

    def get(self, source: Source) -> Model:
        """The model of a version, loaded where it is not there yet.

        Raises:
            DataError: where the run directory holds another version by now, or its parts do not belong together.
        """
        self._used[source] = time.monotonic()
        model = self._models.get(source)
        if model is not None:  # without the lock, which whoever loads another holds for seconds
            return model
        with self._lock:
            if source not in self._models:
                spec = find(source.run_uri, source.round_, self._here)
                if spec.version != source.version:
                    raise DataError(
                        f"{source.run_uri} holds version {spec.version} of round {source.round_}, not {source.version}."
                    )
                self._models = {**self._models, source: self._make(spec)}
            return self._models[source]

    def loaded(self) -> list[Model]:
        """Those that are wanted by now."""
        models = self._models
        return [models[source] for source in self._wanted if source in models]

    def keep(self, wanted: list[Source]) -> None:
        """Loads these, and lets go of others that nobody has asked for in a while."""
        for source in wanted:
            self.get(source)
        with self._lock:
            self._wanted = wanted
            idle = time.monotonic() - IDLE_S
            self._models = {
                source: model for source, model in self._models.items() if source in wanted or self._used[source] > idle
            }


class FrozenRanker:
    """Scores sessions with the item tower computed once.

    Raises:
        DataError: when ranker and catalogue are not of one run, or the reasoner is not the one it was trained on.
    """

    def __init__(self, spec: PairSpec) -> None:
        torch.set_num_threads(spec.engine.reasoner.threads)
        self.version = spec.version
        self.loaded = scoring.load(spec.ranker_uri, spec.rank_by)
        self.loaded.require(intent_ids=Catalogue.load(spec.sessions_uri).ids)
        self.reader = spec.reader()
        self.dim = spec.dim
        space = self.loaded.space
        self.drift = Drift(space.single_fields, space.transform(_learned_from(spec, space.columns)))
        with torch.inference_mode():
            self.items = self.loaded.model.items()

    @torch.inference_mode()
    def score(
        self, rows: Sequence[Row], candidates: Sequence[np.ndarray], vectors: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        """Scores of each session's candidates.

        Args:
            rows: as `SessionReader.row` makes them.
            candidates: int [C_b], indices into the catalogue.
            vectors: e(x), float16 [H]; None reads the null query.

        Returns:
            float32 [C_b] each.
        """
        features = self.loaded.space.transform(self.reader.table(rows))
        self.drift.add(features)
        return self._answers(features, candidates, vectors, self.loaded.model.score)

    @torch.inference_mode()
    def parts(
        self, rows: Sequence[Row], candidates: Sequence[np.ndarray], vectors: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        """As `score`, but float32 [C_b, 4] each, whose sums are the scores: `api.ScoreParts`."""
        model = self.loaded.model
        assert isinstance(model, QERec), "a pair's ranker"
        features = self.loaded.space.transform(self.reader.table(rows))
        return self._answers(features, candidates, vectors, model.parts)

    def _answers(
        self,
        features: Mapping[str, np.ndarray],
        candidates: Sequence[np.ndarray],
        vectors: Sequence[np.ndarray | None],
        answer: Callable[..., torch.Tensor],
    ) -> list[np.ndarray]:
        width = max(len(each) for each in candidates)
        padded = np.full((len(candidates), width), -1, np.int32)
        for row, each in zip(padded, candidates, strict=True):
            row[: len(each)] = each
        batch = to_batch({**features, "candidates": padded})
        nothing = np.zeros(self.dim, np.float16)
        embedding = np.stack([nothing if vector is None else vector for vector in vectors]).astype(np.float32)
        is_null = torch.tensor([vector is None for vector in vectors])
        model = self.loaded.model
        z = model.queries(torch.from_numpy(embedding), is_null)
        found = answer(model.users(batch), self.items, batch["candidates"], z).numpy()
        return [found[number, : len(each)] for number, each in enumerate(candidates)]


def example_sessions(spec: PairSpec, number: int) -> list[Row]:
    """Sessions of test users with what their clients would send, for people to try: those who said most.

    What the API would refuse, as a longer text or a column that is no JSON, is left out.
    """
    if not number:
        return []
    reader = spec.reader()
    columns = ["session_id", "user_id", *reader.schema.names]
    found: list[Row] = [row for table in _sessions(spec, "test", columns, EXAMPLE_FILES) for row in table.to_pylist()]
    said = [sum(len(event["text"] or "") for event in row["history"] or []) for row in found]
    order = sorted(range(len(found)), key=lambda at: (-said[at], found[at]["session_id"]))
    return list(islice((found[at] for at in order if _can_be_asked(reader, found[at])), number))


def _can_be_asked(reader: SessionReader, row: Row) -> bool:
    try:
        reader.session(row)
    except ValidationError:
        return False
    return True


def _learned_from(spec: PairSpec, columns: list[str]) -> pa.Table:
    """Some of the sessions that the ranker learned from, of all days and regions alike."""
    parts = list(_sessions(spec, "rank", columns, DRIFT_FILES))
    return pa.concat_tables(part.slice(0, DRIFT_SESSIONS // len(parts)) for part in parts)


def _sessions(spec: PairSpec, role: str, columns: list[str], files: int) -> Iterator[pa.Table]:
    """A role's sessions of about so many files, taken evenly over days and regions."""
    found = storage.list_files(storage.join(spec.sessions_uri, "sessions"), ".parquet")
    stored = [name for name in columns if name != "region"]
    for file in found[:: max(1, len(found) // files)]:
        table = storage.read_table(file, columns=stored, filters=pc.field("role") == role)
        region = unquote(storage.pure_path(file).parent.name.removeprefix("region="))
        yield table.append_column("region", pa.repeat(region, len(table))).select(columns)


class FrozenReasoner:
    """Reads session texts.

    Raises:
        DataError: when its weights are not those that the ranker was trained on.
    """

    def __init__(self, spec: PairSpec) -> None:
        template, reasoner_version = spec.prompt, spec.meta.reasoner_version
        self.engine = spec.engine.start()
        self.instruction = Instruction(template.prefix, template.suffix, template.version)
        if reasoner_version is not None and self.engine.version != reasoner_version:
            raise DataError(
                f"the reasoner is of version '{self.engine.version}', but the ranker was trained on "
                f"'{reasoner_version}'; serve the round whose ranker was trained on it."
            )

    def prompts(self, texts: Sequence[str]) -> Prompts:
        return self.instruction.prompts(list(texts))

    def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """e(x), float16 [H] each."""
        return list(self.engine.embed(self.prompts(texts)))

    def write(
        self, texts: Sequence[str], seeds: Sequence[int], sampling: config.Sampling
    ) -> list[tuple[np.ndarray, str | None]]:
        """e(x) and a latent query each, None where what was sampled is no valid one."""
        groups = self.engine.sample(self.prompts(texts), [[seed] for seed in seeds], sampling)
        return [
            (group.embedding, group.samples[0].query if fault(group.samples[0]) is None else None) for group in groups
        ]
