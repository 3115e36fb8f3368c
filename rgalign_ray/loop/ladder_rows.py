"""The ladder's rows: what each ranker of a comparison is, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.loop.stage import truth_inputs


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
        ranker_of: the row whose rankers it takes, to read the test sessions otherwise than that row does.
        readout: what it reads of a test session, where that is not what `evaluate.readout` says: e(x,q) (query), what
            the reasoner says of another user's session (other), or what the frozen reasoner says, moved by the aligned
            one's mean way from there, the same for every session (shift).
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
    ranker_of: config.RowName | None = None
    readout: Literal["query", "other", "shift"] | None = None

    @property
    def rival(self) -> bool:
        """A row without an LLM that QE-Rec must beat."""
        return self.reads in (None, "sentence") and not self.control


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
    "gradient": {"align": ["gradient"]},
    "paper": {"align": ["sft", "contrastive"]},
    "full": {},
    "leak": {"crossfit": 1},
}
"""Settings that make a reasoner of one round, by their full names; `full` aligns as configured, and so does `leak`, but
on sessions that the ranker learns from."""


TAUGHT = "the ranker that taught the reasoner reads it"
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
        "QE-Rec, template query",
        "qe_rec",
        "the session's text by a sentence encoder instead of an LLM",
        "sentence",
        control=True,
    ),
    "qe_rec": LadderRow("QE-Rec", "qe_rec", "frozen reasoner", "reasoner"),
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
    "rga_paper": _aligned("RG-SFT, RG-CL", "paper", "the published objectives, one after the other"),
    "rgalign": _aligned("RGAlign-Rec", "full", "all objectives as configured, ranker retrained"),
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

WARM: dict[config.RowName, config.RowName] = {
    "qe_rec_warm": "qe_rec",
    "sft_title_warm": "sft_title",
    "rg_sft_random_warm": "rg_sft_random",
    "rg_sft_warm": "rg_sft",
    "rg_cl_warm": "rg_cl",
    "gradient_warm": "gradient",
    "gradient_warm_shuffled": "gradient_shuffled",
    "rga_paper_warm": "rga_paper",
    "rgalign_warm": "rgalign",
    "rgalign_warm_shuffled": "rgalign_shuffled",
}
"""Rows whose rankers begin with the weights of the one that teaches, by name, with those that begin anew. As all go on
from the same ranker, they differ by what they read and not by what a training draws.
"""
ROWS |= {
    name: replace(
        ROWS[row],
        title=f"{ROWS[row].title}, warm start",
        note="; ".join(filter(None, [ROWS[row].note, "trained on from the ranker that teaches"])),
        control=ROWS[row].control or not ROWS[row].aligned,
        warm=True,
    )
    for name, row in WARM.items()
}

THROUGH_QUERY: dict[config.RowName, config.RowName] = {
    "qe_rec_query": "qe_rec",
    "sft_title_query": "sft_title",
    "rg_sft_random_query": "rg_sft_random",
    "rg_sft_query": "rg_sft",
    "gradient_query": "gradient",
    "rgalign_query": "rgalign",
}
"""Rows that read the test sessions through a latent query, by name, with the rows whose rankers they take."""
OTHERS_QUERY: dict[config.RowName, config.RowName] = {
    "qe_rec_other": "qe_rec",
    "gradient_other": "gradient",
    "rgalign_other": "rgalign",
    "qe_rec_warm_other": "qe_rec_warm",
    "gradient_warm_other": "gradient_warm",
    "rgalign_warm_other": "rgalign_warm",
}
"""Likewise, of rows whose rankers are told of another user's session: what is gained over them, what the reasoner says
of this session brings. The null query would not do: where sessions without a click are not read (`encode.unclicked`),
rankers have learned that it goes with no click.
"""
OTHERWISE: tuple[tuple[dict[config.RowName, config.RowName], Literal["query", "other"], str, str], ...] = (
    (THROUGH_QUERY, "query", "through its query", "the same rankers read e(x,q)"),
    (OTHERS_QUERY, "other", "another's query", "the same rankers, told of another user's session"),
)
ROWS |= {
    name: replace(
        ROWS[row],
        title=f"{ROWS[row].title}, {what}",
        note=note,
        control=ROWS[row].control or readout == "other",
        ranker_of=row,
        readout=readout,
    )
    for taking, readout, what, note in OTHERWISE
    for name, row in taking.items()
}

NOT_RETRAINED: dict[config.RowName, config.RowName] = {
    "rg_sft_not_retrained": "rg_sft",
    "rg_sft_random_not_retrained": "rg_sft_random",
    "sft_title_not_retrained": "sft_title",
    "rg_cl_not_retrained": "rg_cl",
    "gradient_not_retrained": "gradient",
    "rga_paper_not_retrained": "rga_paper",
    "rgalign_not_retrained": "rgalign",
}
"""Rows in which the ranker that taught a reasoner, frozen, reads it as it is now; by name, with those that retrain."""
JUDGED: dict[config.RowName, tuple[config.RowName, Literal["query"] | None]] = {
    cast(config.RowName, f"{name}_query" if readout else name): (row, readout)
    for name, row in {"judge": "qe_rec", **NOT_RETRAINED}.items()
    for readout in (None, "query")
}
"""Rows of the frozen ranker that teaches, by name: whose reasoner it reads, and through what."""
SHIFTED: dict[config.RowName, config.RowName] = {
    cast(config.RowName, f"{row}_shift"): name for name, row in NOT_RETRAINED.items()
}
"""Controls of rows that are not retrained, by name: the share of what such a row gains that one vector brings, added to
what the frozen reasoner says of every session, as a shift towards what is popular would.
"""
ROWS |= {
    name: replace(
        ROWS[row],
        title=("the judge" if row == "qe_rec" else f"{ROWS[row].title}, not retrained")
        + (", through its query" if readout else ""),
        note="the ranker that teaches reads the frozen reasoner" if row == "qe_rec" else TAUGHT,
        control=True,
        retrained=False,
        readout=readout,
    )
    for name, (row, readout) in JUDGED.items()
}
ROWS |= {
    shifted: replace(
        ROWS[row],
        title=f"{ROWS[NOT_RETRAINED[row]].title}, its mean movement alone",
        note="the same, reading the frozen reasoner moved by one vector",
        readout="shift",
    )
    for shifted, row in SHIFTED.items()
}


def slice_name(name: config.RowName, number: int) -> str:
    """The stage that trains and judges a row's ranker of a number (`compare.trainings`)."""
    return f"row_{name}-{number}" if number else f"row_{name}"


def rows_of(settings: config.Config) -> list[config.RowName]:
    """The rows that a comparison has; where it names none, all that need no alignment and whose truth its log knows."""
    if settings.compare.rows:
        return list(settings.compare.rows)
    known = (name for name in ROWS if ROWS[name].reads != "need" or truth_inputs(settings))
    return [name for name in known if _asked_unnamed(ROWS[name], settings)]


def _asked_unnamed(row: LadderRow, settings: config.Config) -> bool:
    return row.retrained and not (row.aligned or row.warm or row.ranker_of or (row.more and not settings.align))


def check(rows: list[config.RowName], settings: config.Config) -> None:
    """Whether rows find what they take from others.

    Raises:
        ConfigError: for the first that does not.
    """
    teaches = any(ROWS[name].aligned for name in rows)
    for name in rows:
        taken = ROWS[name].ranker_of
        if not teaches and (ROWS[name].warm or not ROWS[name].retrained):
            what = "goes on from" if ROWS[name].warm else "is"
            raise ConfigError(
                f"compare.rows: {name} {what} the ranker that teaches; name a row whose reasoner it teaches."
            )
        if taken and taken not in rows:
            raise ConfigError(f"compare.rows: {name} takes the rankers of {taken}; name that row as well.")
        if ROWS[name].readout == "shift" and settings.evaluate.readout == "query":
            raise ConfigError(f"compare.rows: {name} moves e(x) alone; set evaluate.readout to prompt.")
        queries = settings.encode.test_queries or settings.evaluate.readout == "query"
        if ROWS[name].readout == "query" and not queries:
            raise ConfigError(
                f"compare.rows: {name} reads queries of test sessions; set encode.test_queries to true to have them."
            )
