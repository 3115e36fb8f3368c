"""The ladder's rows: what each ranker of a comparison is, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rgalign_ray import config
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
    """

    title: str
    kind: config.Model
    note: str = ""
    reads: Literal["reasoner", "sentence", "need"] | None = None
    shuffled: bool = False
    control: bool = False

    @property
    def rival(self) -> bool:
        """A row without an LLM that QE-Rec must beat."""
        return self.reads in (None, "sentence") and not self.control


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
    "true_need": LadderRow(
        "QE-Rec, true need as query", "qe_rec", "the ceiling: its query is the need's own text", "need", control=True
    ),
}


def rows_of(settings: config.Config) -> list[config.RowName]:
    """The rows that a comparison has; where it names none, all but those whose truth its log does not know."""
    named = settings.compare.rows
    return list(named) if named else [name for name in ROWS if ROWS[name].reads != "need" or truth_inputs(settings)]
