"""Stages of the auditor: a second frozen pair, which nothing is optimised for.

  role audit ──▶ frozen reasoner: a query each ──▶ sentence encoder: e(x), e(x,q) ──▶ auditor: a QE-Rec of its own

Other users, another encoder, another seed. It judges the same rollouts as the reward: a reward that grows while
the audit does not is a reward that is being hacked.
"""

from __future__ import annotations

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.rank_stages import SENTENCE_SETTINGS, encode_pass, engine_spec, sentence_engine, sentence_items
from rgalign_ray.loop.stage import TRAIN_RECORDS, Outcome, Run, Stage
from rgalign_ray.ranker import training
from rgalign_ray.ranker.training import RankerJob, RankerSpec
from rgalign_ray.rollout.encode import EncodePlan

ROLE = "audit"
AUDITOR = "auditor"
SEED = 500
"""Added to the run's, apart from the seeds of judges and controls."""


def stages(config: Config) -> list[Stage]:
    """The intents' texts as the auditor knows them, and what it is made by; nothing where no session has its role."""
    return [sentence_items(config), *making_stages(config)] if config.roles.audit else []


def making_stages(config: Config) -> list[Stage]:
    """What the auditor is made by, where the intents' texts are there for others as well."""
    if not config.roles.audit:
        return []
    return [
        Stage(
            "queries_audit",
            "sample a query for every audit session",
            ask,
            ("prompt", "reasoner", "encode", "rollout"),
            ("sessions",),
            ray=True,
            units=True,
        ),
        Stage(
            "embeddings_audit",
            "read audit sessions and queries with the sentence encoder",
            read,
            SENTENCE_SETTINGS,
            ("sessions", "queries_audit"),
            ray=True,
            units=True,
        ),
        Stage(
            AUDITOR,
            "train the auditor",
            train,
            ("ranker",),
            ("sessions", "features", "items_sentence", "embeddings_audit"),
            ray=True,
        ),
    ]


def ask(run: Run, out: str) -> Outcome:
    counts = encode_pass(run, out, _plan(run, (ROLE,)), engine_spec(run, 0))
    return Outcome(counts, {"valid_rate": counts["valid"] / max(counts["sampled"], 1)})


def read(run: Run, out: str) -> Outcome:
    plan = _plan(run, (ROLE, "valid"), run.uri("queries_audit"))
    return Outcome(encode_pass(run, out, plan, sentence_engine(run.config)))


def _plan(run: Run, roles: tuple[str, ...], written: str | None = None) -> EncodePlan:
    config = run.config
    return EncodePlan(
        log_uri=run.uri("sessions"),
        template=Template.load(config.prompt.template),
        roles=roles,
        queries_for=(ROLE,),
        query_sessions=(),
        encode=config.encode,
        sampling=config.rollout,
        run_seed=config.seed,
        written_uri=written,
    )


def train(run: Run, out: str) -> Outcome:
    job = RankerJob(
        rankers=(RankerSpec(AUDITOR, "qe_rec", storage.join(out, AUDITOR), run.config.seed * 1000 + SEED),),
        log_uri=run.uri("sessions"),
        space=storage.read_json(run.uri("features", "features.json")),
        settings=run.config.ranker,
        storage_uri=run.uri(TRAIN_RECORDS),
        run_name=AUDITOR,
        embeddings_uri=run.uri("embeddings_audit"),
        item_embeddings_uri=run.uri("items_sentence"),
        train_roles=(ROLE,),
    )
    return Outcome(figures=training.train(job)[AUDITOR].figures)
