"""The ladder's rows: what each ranker of a comparison is, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop.stage import Run, truth_inputs

UNTRAINED: tuple[config.Model, ...] = ("popularity", "cosine")


@dataclass(frozen=True)
class LadderRow:
    """One way to rank.

    Args:
        title: in the table.
        kind: the ranker.
        note: what the reader must know of it.
        reads: whose embeddings of the sessions it reads, if any: the reasoner's, the sentence encoder's, or (need)
            the sentence encoder's of the true need's text. Its intents' texts come from the same encoder.
        shuffled: trained and tested on embeddings of other users' sessions.
        control: stands there to unmask a gain, not to win.
        aligned: the alignment in `ALIGNMENTS` whose reasoner it reads, where that is not the frozen one.
        retrained: on the reasoner it reads; else it is the frozen ranker that teaches.
        warm: trained on from the ranker that teaches, instead of anew.
        more: it also learns from the sessions that reasoners are aligned on, as the method as a whole does.
        variant_of: the row that it differs from in one thing.
        readout: what it reads of a test session, where that is not what `evaluate.readout` says: e(x,q) (query), what
            the reasoner says of another user's session (other), what the frozen reasoner says, moved by the aligned
            one's mean way from there, the same for every session (shift), or what the aligned one says, moved back by
            that way (centred).
    """

    title: str
    kind: config.Model
    note: str = ""
    reads: Literal["reasoner", "sentence", "need"] | None = None
    shuffled: bool = False
    control: bool = False
    aligned: str | None = None
    retrained: bool = True
    warm: bool = False
    more: bool = False
    variant_of: config.RowName | None = None
    readout: Literal["query", "other", "shift", "centred"] | None = None

    @property
    def ranker_of(self) -> config.RowName | None:
        """The row whose rankers it takes, to read the test sessions otherwise than that row does."""
        return self.variant_of if self.retrained and self.readout else None

    @property
    def rival(self) -> bool:
        """A row without an LLM that has learned from clicks, a control or not: what QE-Rec must beat."""
        return self.reads in (None, "sentence") and self.kind not in UNTRAINED


ALIGNMENTS: dict[str, dict[str, Any]] = {
    "title": {"align": ["sft"], "select.method": "title"},
    "random": {"align": ["sft"], "select.method": "random"},
    "sft_2": {"align": ["sft"], "select.n": 2},
    "sft_4": {"align": ["sft"], "select.n": 4},
    "sft_8": {"align": ["sft"], "select.n": 8},
    "sft": {"align": ["sft"]},
    "dpo": {"align": ["dpo"]},
    "grpo": {"align": ["grpo"]},
    "contrastive": {"align": ["contrastive"]},
    "latent": {"align": ["latent"]},
    "gradient": {"align": ["gradient"], "gradient.text_weight": 0.0},
    "paper": {"align": ["sft", "contrastive"], "contrastive.text_weight": 0.0},
    "full": {},
    "leak": {"crossfit": 1},
}
"""Settings that make a reasoner of one round, by their full names; `full` aligns as configured, and so does `leak`, but
on sessions that the ranker learns from. `gradient` is the ranking loss alone and `paper` what is published, whatever is
configured."""


MORE = "learns from the sessions of role align as well"


def _aligned(title: str, alignment: str, note: str = "", **more: Any) -> LadderRow:
    return LadderRow(title, "qe_rec", note, "reasoner", aligned=alignment, **more)


ROWS: dict[config.RowName, LadderRow] = {
    "popularity": LadderRow("popularity", "popularity", "each intent's share of clicks", control=True),
    "lr": LadderRow("LR", "lr"),
    "deepfm": LadderRow("DeepFM", "deepfm"),
    "dcn_v2": LadderRow("DCN-v2", "dcn_v2"),
    "two_tower": LadderRow("AutoInt+MoE two-tower", "two_tower", "intents by id and text"),
    "din": LadderRow("DIN", "din"),
    "sasrec": LadderRow("SASRec encoder", "sasrec"),
    "bst": LadderRow("BST", "bst"),
    "din_text": LadderRow("DIN + intent text", "din_text"),
    "din_sentence": LadderRow("DIN + session text", "din_sentence", "read by a sentence encoder", "sentence"),
    "two_tower_more": LadderRow("AutoInt+MoE two-tower, more sessions", "two_tower", MORE, more=True),
    "din_more": LadderRow("DIN, more sessions", "din", MORE, more=True),
    "din_sentence_more": LadderRow("DIN + session text, more sessions", "din_sentence", MORE, "sentence", more=True),
    "cosine": LadderRow(
        "zero-shot cosine",
        "cosine",
        "of the session's and the intent's text",
        "sentence",
        control=True,
    ),
    "template": LadderRow(
        "QE-Rec, sentence encoder",
        "qe_rec",
        "the session's text by a sentence encoder instead of an LLM",
        "sentence",
        control=True,
    ),
    "qe_rec": LadderRow("QE-Rec", "qe_rec", "frozen reasoner", "reasoner"),
    "qe_rec_more": LadderRow("QE-Rec, more sessions", "qe_rec", f"frozen reasoner; {MORE}", "reasoner", more=True),
    "qe_rec_shuffled": LadderRow(
        "QE-Rec shuffled",
        "qe_rec",
        "trained and tested with queries shuffled across users",
        "reasoner",
        shuffled=True,
        control=True,
    ),
    "sft_title": _aligned("SFT on the clicked title", "title", "the same labels, no ranker, no sampling", control=True),
    "rg_sft_random": _aligned("RG-SFT, random of N", "random", "nothing is chosen", control=True),
    "rg_sft_2": _aligned("RG-SFT, best of 2", "sft_2", "of the first queries"),
    "rg_sft_4": _aligned("RG-SFT, best of 4", "sft_4", "of the first queries"),
    "rg_sft_8": _aligned("RG-SFT, best of 8", "sft_8", "of the first queries"),
    "rg_sft": _aligned("RG-SFT, best of N", "sft"),
    "rg_dpo": _aligned("RG-DPO", "dpo"),
    "rg_grpo": _aligned("RG-GRPO", "grpo"),
    "rg_cl": _aligned("RG-CL", "contrastive"),
    "latent": _aligned("RL on the embedding", "latent"),
    "gradient": _aligned("ranking gradient", "gradient", "the loss itself through the frozen ranker"),
    "rga_paper": _aligned("RGAlign-Rec as published", "paper", "RG-SFT, then RG-CL"),
    "rgalign": _aligned("RGAlign-Rec", "full", "the objectives of `align`, one after the other"),
    "rgalign_shuffled": _aligned(
        "RGAlign-Rec shuffled",
        "full",
        "trained and tested with queries shuffled across users",
        shuffled=True,
        control=True,
    ),
    "rgalign_leak": _aligned(
        "RGAlign-Rec, in sample",
        "leak",
        "aligned on sessions that the ranker learns from",
        control=True,
    ),
    "gradient_shuffled": _aligned(
        "ranking gradient shuffled",
        "gradient",
        "trained and tested with queries shuffled across users",
        shuffled=True,
        control=True,
    ),
    "true_need": LadderRow(
        "QE-Rec, true need as query", "qe_rec", "the ceiling: its query is the need's own text", "need", control=True
    ),
}


def _variant(of: config.RowName, what: str, note: str, **changes: Any) -> LadderRow:
    return replace(ROWS[of], title=f"{ROWS[of].title}, {what}", note=note, variant_of=of, **changes)


def _through_query(of: config.RowName) -> LadderRow:
    return _variant(of, "through its query", "the same ranker reads e(x,q)", readout="query")


def _other(of: config.RowName) -> LadderRow:
    """What is gained over it, what the reasoner says of this session brings. The null query would not do: where
    sessions without a click are not read (`encode.unclicked`), rankers have learned that it goes with no click.
    """
    note = "the same ranker, told of another user's session"
    return _variant(of, "another's query", note, readout="other", control=True)


def _warm(of: config.RowName) -> LadderRow:
    """As all go on from the same ranker, they differ by what they read and not by what a training draws."""
    note = "; ".join(filter(None, [ROWS[of].note, "trained on from the ranker that teaches"]))
    return _variant(of, "warm start", note, warm=True, control=ROWS[of].control or not ROWS[of].aligned)


def _not_retrained(of: config.RowName) -> LadderRow:
    note = "the ranker that taught the reasoner reads it"
    return _variant(of, "not retrained", note, retrained=False, control=True)


def _shift(of: config.RowName) -> LadderRow:
    """Control of a row that is not retrained: the share of what that gains that one vector brings, added to what the
    frozen reasoner says of every session, as a shift towards what is popular would.
    """
    row = _not_retrained(of)
    note = "the same, reading the frozen reasoner moved by one vector"
    title = f"{ROWS[of].title}, its mean movement alone"
    return replace(row, title=title, note=note, variant_of=f"{of}_not_retrained", readout="shift")


def _centred(of: config.RowName) -> LadderRow:
    """What it gains over the row that is not retrained is what the shift that is the same for all sessions costs."""
    row = _not_retrained(of)
    note = "the ranker that taught the reasoner reads it moved back by its mean way"
    title = f"{ROWS[of].title}, centred"
    return replace(row, title=title, note=note, variant_of=f"{of}_not_retrained", readout="centred")


MOVED = ("shift", "centred")
"""Readouts that are e(x) moved by one vector, and need the frozen reasoner's beside the aligned one's."""
ENDINGS: dict[str, Callable[[config.RowName], LadderRow]] = {
    "_query": _through_query,
    "_other": _other,
    "_warm": _warm,
    "_not_retrained": _not_retrained,
    "_shift": _shift,
    "_centred": _centred,
}
"""What a row does otherwise than the one whose name stands before the ending."""
ROWS["judge"] = replace(
    ROWS["qe_rec"],
    title="the judge",
    note="the ranker that teaches reads the frozen reasoner",
    control=True,
    retrained=False,
    variant_of="qe_rec",
)


def _ends(name: config.RowName) -> LadderRow:
    ending = next(ending for ending in ENDINGS if name.endswith(ending))
    return ENDINGS[ending](name.removesuffix(ending))


for _name in config.ROW_NAMES:
    if _name not in ROWS:
        ROWS[_name] = _ends(_name)


def slice_name(name: config.RowName, number: int) -> str:
    """The stage that trains and judges a row's ranker of a number (`compare.trainings`)."""
    return f"row_{name}-{number}" if number else f"row_{name}"


def rows_of(settings: config.Config) -> list[config.RowName]:
    """The rows that a comparison has, exploratory ones last; where it names none, all that need no alignment and whose
    truth its log knows.
    """
    known = (name for name in ROWS if ROWS[name].reads != "need" or truth_inputs(settings))
    rows = settings.compare.rows or [name for name in known if _asked_unnamed(ROWS[name], settings)]
    return list(dict.fromkeys([*rows, *settings.compare.exploratory]))


def rows_of_each(jobs: Sequence[Run], rows: Sequence[config.RowName]) -> list[tuple[Run, list[config.RowName]]]:
    """The runs of seeds, each with its rows: what is not exploratory, and what its own settings name as that."""
    explored = {name for job in jobs for name in job.config.compare.exploratory}
    own = ((job, explored.difference(job.config.compare.exploratory)) for job in jobs)
    return [(job, [name for name in rows if name not in others]) for job, others in own]


def jobs_of(name: config.RowName, jobs: Sequence[Run]) -> list[Run]:
    """The runs of those seeds that have a row."""
    return [job for job, rows in rows_of_each(jobs, [name]) if rows]


def _asked_unnamed(row: LadderRow, settings: config.Config) -> bool:
    more = settings.align and settings.roles.align
    return row.retrained and not (row.aligned or row.warm or row.ranker_of or (row.more and not more))


def check(rows: list[config.RowName], settings: config.Config) -> None:
    """Whether rows find what they take from others.

    Raises:
        ConfigError: for the first that does not.
    """
    teaches = any(ROWS[name].aligned for name in rows)
    for name in rows:
        taken = ROWS[name].ranker_of
        if ROWS[name].more and not settings.roles.align:
            raise ConfigError(
                f"compare.rows: {name} learns from role align as well; raise roles.align, or leave it out."
            )
        if not teaches and (ROWS[name].warm or not ROWS[name].retrained):
            what = "goes on from" if ROWS[name].warm else "is"
            raise ConfigError(
                f"compare.rows: {name} {what} the ranker that teaches; name a row whose reasoner it teaches."
            )
        if taken and taken not in rows:
            raise ConfigError(f"compare.rows: {name} takes the rankers of {taken}; name that row as well.")
        if ROWS[name].readout in MOVED and settings.evaluate.readout == "query":
            raise ConfigError(f"compare.rows: {name} moves e(x) alone; set evaluate.readout to prompt.")
        queries = settings.encode.test_queries or settings.evaluate.readout == "query"
        if ROWS[name].readout == "query" and not queries:
            raise ConfigError(
                f"compare.rows: {name} reads queries of test sessions; set encode.test_queries to true to have them."
            )
