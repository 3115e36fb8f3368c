"""Stages of the auditor: a second frozen pair, which nothing is optimised for.

  role audit ──▶ frozen reasoner: a query each ──▶ sentence encoder: e(x), e(x,q) ──▶ auditor: a QE-Rec of its own

Other users, another encoder, another seed. It judges the same rollouts as the reward: a reward that grows while
the audit does not is a reward that is being hacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate.statistics import Estimate, paired_bootstrap
from rgalign_ray.logs import lists
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop.rank_stages import HOW_QUERIED, SENTENCE_READER, SENTENCE_SETTINGS, encode_pass, sentence_items
from rgalign_ray.loop.readers import engine_spec, sentence_engine
from rgalign_ray.loop.stage import Outcome, Run, Stage
from rgalign_ray.ranker import training
from rgalign_ray.ranker.training import RankerJob, RankerSpec
from rgalign_ray.reward.auditor import Auditor, AuditorSpec
from rgalign_ray.rollout.encode import EncodePlan, written_queries

ROLE = "audit"
AUDITOR = "auditor"
AUDITED = "audited.parquet"
UNDECIDED = (
    "{}: no clicked validation session has a valid query, so that early_stop cannot decide; raise roles.valid or "
    "rollout.max_new_tokens, or set early_stop to false."
)
SEED = 500
"""Added to the run's, apart from the seeds of judges and controls."""


def stages(config: Config) -> list[Stage]:
    """The intents' texts as the auditor knows them, and what it is made by; nothing where no session has its role."""
    return [sentence_items(), *making_stages(config)] if config.roles.audit else []


def making_stages(config: Config) -> list[Stage]:
    """What the auditor is made by, where the intents' texts are there for others as well."""
    if not config.roles.audit:
        return []
    return [
        Stage(
            "queries_audit",
            "sample a query for every audit session",
            ask,
            ("prompt", "reasoner", "encode", *HOW_QUERIED),
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


def queries_of(round_: int) -> str:
    """Name of the stage that holds a round's queries against the auditor."""
    return f"audited_{round_}"


def audited_stages(config: Config, round_: int) -> list[Stage]:
    """audited_r, where a later round depends on it."""
    if not config.early_stop or round_ >= config.align_slices:
        return []
    return [
        Stage(
            queries_of(round_),
            "hold the queries of validation sessions against the auditor",
            partial(audit, round_=round_),
            ("reward", *SENTENCE_READER),
            ("sessions", "features", f"embeddings_{round_}", AUDITOR),
        )
    ]


def audit(run: Run, out: str, round_: int) -> Outcome:
    """Writes `audited.parquet`: the auditor's reward of each clicked validation session's query, where it is valid.

    Raises:
        DataError: when there is none.
    """
    written = written_queries(run.uri(f"embeddings_{round_}"))
    table = storage.read_table(run.uri("sessions", "sessions"), filters=pc.field("role") == "valid")
    clicked = lists.any_true(table["clicks"])
    asked = np.array([i in written for i in table["session_id"].to_pylist()], dtype=bool) & clicked
    kept = table.filter(pa.array(asked)).sort_by("session_id")
    ids = kept["session_id"].to_pylist()
    if not ids:
        raise DataError(UNDECIDED.format(queries_of(round_)))
    auditor = Auditor(auditor_spec(run))
    catalogue = Catalogue.load(run.uri("sessions"))
    reward = auditor.rewards(kept, [written[i] for i in ids], catalogue, run.config.reward)[:, 0]
    judged = np.isfinite(reward)
    if not judged.any():
        raise DataError(
            f"{queries_of(round_)}: no validation session has two clicks, so that the auditor has none of its own; set "
            "reward.halves to false."
        )
    table = kept.select(["session_id", "user_id"]).append_column("reward", pa.array(reward)).filter(pa.array(judged))
    storage.write_table(storage.join(out, AUDITED), table)
    return Outcome({"sessions": int(clicked.sum()), "judged": table.num_rows}, {"audit": float(reward[judged].mean())})


def gain(run: Run, round_: int) -> Estimate:
    """What the auditor sees in a round's queries above those of the round before, over the validation sessions that
    have both; the same random numbers drew them.

    Raises:
        DataError: when there is no such session.
    """
    before, after = (
        storage.read_table(run.uri(queries_of(r), AUDITED)).sort_by("session_id") for r in (round_ - 1, round_)
    )
    both = before.join(after, "session_id", join_type="inner", right_suffix="_after").sort_by("session_id")
    if not both.num_rows:
        raise DataError(UNDECIDED.format(queries_of(round_)))
    settings = run.config.evaluate
    return paired_bootstrap(
        both["reward_after"].to_numpy(),
        both["reward"].to_numpy(),
        both["user_id"].to_pylist(),
        repetitions=settings.bootstrap,
        confidence=settings.confidence,
    )


def hearing_sentence(auditors: Sequence[storage.Manifest]) -> str:
    """Whether the auditors can judge at all: what they read from e(x), in a sentence."""
    readouts = [auditor.figures["gauc_by_readout"] for auditor in auditors]
    reads = float(np.mean([gauc["prompt"] - gauc["null"] for gauc in readouts]))
    said = f"The auditor reads {reads:+.4f} GAUC from e(x) (validation)"
    return f"{said}." if reads > 0 else f"{said}: it hears nothing, so what it does not confirm is not refuted."


def auditor_spec(run: Run) -> AuditorSpec:
    """How to start the auditor."""
    reads = run.config.compare
    template = Template.load(run.config.prompt.template)
    by = run.config.reward.rank_by
    return AuditorSpec(run.uri(AUDITOR, AUDITOR), reads.encoder, reads.max_text_tokens, template, by)


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
        storage_uri=run.records,
        run_name=AUDITOR,
        embeddings_uris=(run.uri("embeddings_audit"),),
        item_embeddings_uri=run.uri("items_sentence"),
        train_roles=(ROLE,),
    )
    return Outcome(figures=training.train(job)[AUDITOR].figures)
