"""Stages that read the log with a reasoner and train rankers on it: items, embeddings, rankers and controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from rgalign_ray import progress, storage
from rgalign_ray.config import Baseline, Config, Ranker
from rgalign_ray.errors import InfrastructureError, first_line
from rgalign_ray.evaluate.examples import example_sessions
from rgalign_ray.evaluate.hit_rate import hit_rate_sessions
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template
from rgalign_ray.logs.roles import align_roles
from rgalign_ray.loop.log_stages import check_templates
from rgalign_ray.loop.readers import engine_spec, keep_reader, reasoner_stage, sentence_engine
from rgalign_ray.loop.stage import Outcome, Run, Stage, truth_inputs
from rgalign_ray.ranker import training
from rgalign_ray.ranker.training import RankerJob, RankerSpec
from rgalign_ray.reasoner.engine import EngineSpec, Prompts
from rgalign_ray.rollout import encode

ITEMS_DEADLINE_S = 1800.0
ENCODED = ("rank", "valid", "test")
"""Roles that the encode pass reads; align is read by the rollout workers."""
HOW_QUERIED = ("rollout.temperature", "rollout.top_p", "rollout.max_new_tokens")
"""How the encode pass samples a session's query."""
WHICH_QUERIED = (
    *("evaluate.readout", "evaluate.examples", "evaluate.first_example", "evaluate.hit_rate_sessions"),
    "early_stop",
)
"""Which sessions get one."""


def reading_stages(config: Config, round_: int) -> list[Stage]:
    """embeddings_r by reasoner r; round 0 also reads the knowledge base."""
    reasoner = reasoner_stage(config, round_)
    who = "frozen reasoner" if round_ == 0 else f"aligned reasoner {round_}"
    embeddings = Stage(
        f"embeddings_{round_}",
        f"read sessions with the {who}",
        partial(encode_sessions, round_=round_),
        ("prompt", "reasoner", "encode", *HOW_QUERIED, *WHICH_QUERIED),
        ("sessions", *truth_inputs(config), *((reasoner,) if reasoner else ())),
        ray=True,
        units=True,
    )
    if round_ > 0:
        return [embeddings]
    items = Stage("items", "read the knowledge base", encode_items, ("prompt", "reasoner"), ("sessions",), ray=True)
    return [items, embeddings]


def more_stage() -> Stage:
    """What the frozen reasoner says of role align, for a ranker that learns from what reasoners are aligned on."""
    return Stage(
        "embeddings_more",
        "read role align with the frozen reasoner",
        partial(encode_sessions, round_=0, roles=tuple(align_roles(1))),
        ("prompt", "reasoner", "encode", *HOW_QUERIED),
        ("sessions",),
        ray=True,
        units=True,
    )


def rankers_stage(config: Config, round_: int) -> Stage:
    """rankers_r, trained on embeddings_r."""
    before = [f"rankers_{round_ - 1}"] if is_warm(config, round_) else []
    return Stage(
        f"rankers_{round_}",
        "train " + ", ".join(spec.name for spec in ranker_specs(config, round_, "")),
        partial(train_rankers, round_=round_),
        ("ranker", "reward.judge_seeds", "baselines", "crossfit", *(["retrain"] if before else [])),
        ("sessions", "features", "items", f"embeddings_{round_}", *before),
        ray=True,
    )


def control_stages(config: Config, round_: int) -> list[Stage]:
    """trained_on_r, where rankers have a warm start: QE-Rec trained on as often on the frozen reasoner; else more
    training would look like a gain of alignment.
    """
    if not is_warm(config, round_):
        return []
    return [
        Stage(
            f"trained_on_{round_}",
            "train QE-Rec on without alignment",
            partial(train_on, round_=round_),
            ("ranker", "retrain"),
            ("sessions", "features", "items", "embeddings_0", _control_before(round_)),
            ray=True,
        )
    ]


def _control_before(round_: int) -> str:
    return f"trained_on_{round_ - 1}" if round_ > 1 else "rankers_0"


def is_warm(config: Config, round_: int) -> bool:
    """Whether rankers of a round begin with those of the round before."""
    return round_ > 0 and config.retrain.start == "previous"


def warm_settings(config: Config) -> Ranker:
    """Ranker settings of a warm start."""
    return config.ranker.changed({"lr": config.ranker.lr * config.retrain.lr_scale})


def warm_sentence(round_: int, figures: Mapping[str, Any], margin: float) -> str:
    """What became of the ranker of a round that began with the weights of the round before, by its figures."""
    anew = ", with another weight beside the match of texts" if "shown_weight" in figures else ""
    same = f"QE-Rec of round {round_} is that of round {round_ - 1}{anew}"
    if "over_start" not in figures:
        return f"{same}: validation prefers no epoch that it learned on."
    seen = figures["over_start"]
    found = f"{seen['gauc']:+.4f} GAUC ± {seen['standard_error']:.4f} (standard error)"
    if figures["best_epoch"]:
        return f"QE-Rec of round {round_} learned on: validation prefers it to that of round {round_ - 1}, {found}."
    return f"{same}: validation prefers what was learned on by {found}, not by more than {margin:g} of them."


def pair_stage(config: Config) -> Stage:
    """rankers_0 with nothing but the reward's judges, where others stand elsewhere."""
    return Stage(
        "rankers_0",
        "train the reward: " + ", ".join(name for folds in judge_names(config) for name in folds),
        partial(train_rankers, round_=0, judges_alone=True),
        ("ranker", "reward.judge_seeds", "crossfit"),
        ("sessions", "features", "items", "embeddings_0"),
        ray=True,
    )


def ranker_specs(config: Config, round_: int, out: str) -> list[RankerSpec]:
    """Rankers of a round: QE-Rec and its control on shuffled queries; before an alignment the reward's other judges; in
    round 0 the baselines.

    None depends on whether the round is the last, which `early_stop` decides later.
    """

    def spec(
        name: str,
        kind: Literal["qe_rec"] | Baseline,
        seed: int = 0,
        shuffled: bool = False,
        without: int | None = None,
    ) -> RankerSpec:
        return RankerSpec(name, kind, storage.join(out, name), ranker_seed(config, round_, seed), shuffled, without)

    judges = [
        spec(name, "qe_rec", seed, without=fold if len(folds) > 1 else None)
        for seed, folds in enumerate(judge_names(config) if round_ < config.align_slices else [])
        for fold, name in enumerate(folds)
        if name != "qe_rec"
    ]
    return [
        *(spec(name, name) for name in (config.baselines if round_ == 0 else ())),
        spec("qe_rec", "qe_rec"),
        *judges,
        spec("shuffled", "qe_rec", shuffled=True),
    ]


def ranker_seed(config: Config, round_: int, number: int) -> int:
    """Of the initial weights, order and dropout of a round's ranker; no ranker of a round has those of one that taught
    before, or an alignment to that one's accidents would look like one to the clicks.
    """
    return config.seed * 1000 + round_ * 100 + number


def judge_names(config: Config) -> list[list[str]]:
    """The rankers that score rollouts, a list a judge: the reward's own first, then those of other seeds.

    With `crossfit` a judge is a ranker a fold, which has learned from all others.
    """
    seeds = range(config.reward.judge_seeds)
    if config.crossfit > 1:
        return [[f"judge_{seed}_fold_{fold}" for fold in range(config.crossfit)] for seed in seeds]
    return [[f"judge_{seed}" if seed else "qe_rec"] for seed in seeds]


def reward_names(config: Config) -> list[str]:
    """The rankers whose mean is the reward, as objectives ask for it while they learn. With `crossfit` none can: each
    has learned from some of the sessions.
    """
    return [] if config.crossfit > 1 else [name for (name,) in judge_names(config)[:-1]]


SENTENCE_READER = ("prompt", "compare.encoder", "compare.max_text_tokens")
"""What decides how a sentence encoder reads one text,"""
SENTENCE_SETTINGS = (*SENTENCE_READER, "encode")
"""and how it reads many."""


def sentence_items() -> Stage:
    return Stage(
        "items_sentence",
        "read the knowledge base with a sentence encoder",
        partial(encode_items, sentence=True),
        SENTENCE_SETTINGS,
        ("sessions",),
        ray=True,
    )


def sentence_stages() -> list[Stage]:
    """The same texts read by a sentence encoder, for rankers without an LLM."""
    return [
        sentence_items(),
        Stage(
            "embeddings_sentence",
            "read sessions with a sentence encoder",
            encode_sentences,
            SENTENCE_SETTINGS,
            ("sessions",),
            ray=True,
            units=True,
        ),
    ]


def encode_items(run: Run, out: str, sentence: bool = False) -> Outcome:
    """Text embeddings of the intents by the base model: one version for all rankers, so that items compare.

    An intent is read where a session's text stands, so that both lie in one space.
    """
    catalogue = Catalogue.load(run.uri("sessions"))
    template = Template.load(run.config.prompt.template)
    settings = run.config.encode
    task = ray.remote(encode.encode_items).options(
        num_cpus=settings.cpus_per_worker,
        num_gpus=settings.gpus_per_worker,
        label_selector=settings.node_labels,
        max_retries=3,
    )
    done = task.remote(
        sentence_engine(run.config) if sentence else engine_spec(run, 0),
        catalogue.ids,
        Prompts(template.prefix, template.items(catalogue.intents), template.suffix),
        settings.batch_size,
        storage.join(out, "items.parquet"),
    )
    try:
        ray.get(done, timeout=ITEMS_DEADLINE_S)
    except RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except RayError as error:  # its deadline, or deaths
        raise InfrastructureError(
            f"items: the knowledge base was not read ({first_line(error)}); the same command tries again."
        ) from None
    return Outcome(rows={"intents": catalogue.size})


def encode_sessions(run: Run, out: str, round_: int, roles: tuple[str, ...] = ENCODED) -> Outcome:
    config = run.config
    plan = encode.EncodePlan(
        log_uri=run.uri("sessions"),
        template=Template.load(config.prompt.template),
        roles=roles,
        queries_for=queried(config),
        query_sessions=(
            *example_sessions(run.uri("sessions"), run.truth, config.evaluate),
            *hit_rate_sessions(run.uri("sessions"), run.truth, config.evaluate),
        ),
        encode=config.encode,
        sampling=config.rollout,
        run_seed=config.seed if run.reading_seed is None else run.reading_seed,
    )
    engine = engine_spec(run, round_)
    counts = encode_pass(run, out, plan, engine)
    plan.template.keep(out)
    keep_reader(engine, out)
    return Outcome(rows=counts, figures={"valid_rate": counts["valid"] / max(counts["sampled"], 1)})


def queried(config: Config) -> tuple[str, ...]:
    """Roles all of whose sessions get a query: those that a ranker reads through it, and those that the auditor asks
    for.
    """
    if config.evaluate.readout == "query":
        return ("valid", "test")
    if config.encode.test_queries:  # what a comparison says of e(x,q) on test sessions, it can say of validation, too
        return ("valid", "test")
    return ("valid",) if config.early_stop else ()


def encode_sentences(run: Run, out: str) -> Outcome:
    config = run.config
    plan = encode.EncodePlan(
        log_uri=run.uri("sessions"),
        template=Template.load(config.prompt.template),
        roles=(*ENCODED, *align_roles(config.align_slices)),  # rankers without an LLM may learn from these as well
        queries_for=(),
        query_sessions=(),
        encode=config.encode.model_copy(update={"query_share": 0.0, "unclicked": True}),
        sampling=config.rollout,
        run_seed=config.seed,
    )
    return Outcome(rows={"sessions": encode_pass(run, out, plan, sentence_engine(config))["sessions"]})


def encode_pass(run: Run, out: str, plan: encode.EncodePlan, engine: EngineSpec) -> dict[str, int]:
    """Runs one encode pass with its progress."""
    check_templates(run)
    ingested = run.manifest("sessions").figures
    roles = ingested["roles"]
    if not plan.encode.unclicked:
        roles = roles | {role: ingested["clicked"].get(role, 0) for role in roles if role not in encode.JUDGING}
    if engine.weights is None:  # an aligned reasoner's name says nothing outside its run
        plan = replace(plan, kept_uri=run.config.encode.kept)
    sessions = sum(roles.get(role, 0) for role in plan.roles)
    with progress.track("encode", sessions, "sessions", idle=partial(encode.room, plan.encode)) as advance:
        return encode.encode(plan, engine, out, advance)


def train_rankers(run: Run, out: str, round_: int, judges_alone: bool = False) -> Outcome:
    specs = ranker_specs(run.config, round_, out)
    if judges_alone:
        wanted = {"qe_rec", *(name for folds in judge_names(run.config) for name in folds)}
        specs = [spec for spec in specs if spec.name in wanted]
    before = f"rankers_{round_ - 1}" if is_warm(run.config, round_) else None
    return _train(run, f"rankers_{round_}", specs, f"embeddings_{round_}", before)


def train_on(run: Run, out: str, round_: int) -> Outcome:
    specs = [spec for spec in ranker_specs(run.config, round_, out) if spec.name == "qe_rec"]
    return _train(run, f"trained_on_{round_}", specs, "embeddings_0", _control_before(round_))


def _train(run: Run, name: str, specs: list[RankerSpec], embeddings: str, before: str | None) -> Outcome:
    """Trains rankers on one artefact of embeddings, each with the weights of its namesake of `before`, if named."""
    if before:
        margin = run.config.retrain.margin
        specs = [replace(spec, start_uri=run.uri(before, spec.name), margin=margin) for spec in specs]
    job = RankerJob(
        rankers=tuple(specs),
        log_uri=run.uri("sessions"),
        space=storage.read_json(run.uri("features", "features.json")),
        settings=warm_settings(run.config) if before else run.config.ranker,
        storage_uri=run.records,
        run_name=name,
        embeddings_uris=(run.uri(embeddings),),
        item_embeddings_uri=run.uri("items"),
        shuffle_seed=run.config.seed,
        folds=run.config.crossfit,
    )
    trained = training.train(job)
    return Outcome({"rankers": len(trained)}, {name: ranker.figures for name, ranker in trained.items()})
