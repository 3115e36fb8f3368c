"""What is reported, and which rows a comparison has."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from rgalign_ray.config.base import Count, Distinct, Positive, Settings, sentence
from rgalign_ray.config.ranking import Model, RankBy, Ranker
from rgalign_ray.config.reasoning import Reasoner


class Evaluate(Settings):
    readout: Literal["prompt", "query"] = "prompt"
    """What rankers read of test sessions: e(x), or e(x,q) of a query that is sampled for it."""
    rank_by: RankBy = "click"
    """What rankers that compare texts rank by, here and where they serve. click: which intent is clicked if shown. log:
    which is shown and clicked, as the log has it, where an old ranker chose what was shown; logged GAUC rewards that.
    It changes no training."""
    k: Count = 3
    """Intents that a user is shown: the cut-off of Recall, NDCG, CTR and resolved."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the users, for every interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Of every interval."""
    examples: Annotated[int, Field(ge=0)] = 5
    """Test sessions shown with their latent query before and after alignment."""
    hit_rate_sessions: Annotated[int, Field(ge=0)] = 0
    """Test sessions of the shop that get a latent query each, for the Intent Hit Rate before and after alignment; it is
    read by `compare.encoder`."""
    first_example: str | None = None
    """Intent whose session is shown first: one whose true need it is, or that clicked it."""


FROZEN_ROWS = (
    *("popularity", "lr", "deepfm", "dcn_v2", "two_tower", "din", "sasrec", "bst", "din_text", "din_sentence"),
    *("two_tower_more", "din_more", "din_sentence_more", "qe_rec_more"),
    *("cosine", "template", "qe_rec", "qe_rec_shuffled", "true_need"),
)
"""Rows of the ladder that read no aligned reasoner,"""
ALIGNED_ROWS = (
    *("sft_title", "rg_sft_random", "rg_sft_2", "rg_sft_4", "rg_sft_8", "rg_sft", "rg_dpo", "rg_grpo", "rg_cl"),
    *("latent", "gradient", "rga_paper", "rgalign", "rgalign_leak"),
)
"""those that do,"""
SHUFFLED_ROWS = ("rgalign_shuffled", "gradient_shuffled")
"""their controls on other users' queries,"""
READ_OTHERWISE = ("", "_query", "_other")
ROW_NAMES = (
    *(*FROZEN_ROWS, *ALIGNED_ROWS, *SHUFFLED_ROWS),
    *(f"{row}{reads}" for row in ("qe_rec", *ALIGNED_ROWS) for reads in READ_OTHERWISE if reads),
    *(f"{row}_warm{reads}" for row in ("qe_rec", *ALIGNED_ROWS) for reads in READ_OTHERWISE),
    *(f"judge{reads}" for reads in READ_OTHERWISE),
    *(f"{row}_not_retrained{reads}" for row in ALIGNED_ROWS for reads in READ_OTHERWISE),
    *(f"{row}_{moved}" for row in ALIGNED_ROWS for moved in ("shift", "centred")),
)
"""and those that differ from one of them in what their names end with (`loop/ladder_rows.py` says how)."""


def _row(name: str) -> str:
    if name not in ROW_NAMES:
        raise ValueError(f"no such row as '{name}'; the nearest is {get_close_matches(name, ROW_NAMES, 1, 0.0)[0]}")
    return name


RowName = Annotated[str, AfterValidator(_row)]


class Compare(Settings):
    """`rgalign compare` and `rgalign tune`: rankers side by side, over several seeds."""

    rows: Annotated[list[RowName], Field(min_length=1), Distinct] | None = None
    """Of the ladder (docs/the-ladder.md). None: every row that the log allows and that needs no alignment."""
    exploratory: Annotated[list[RowName], Distinct] = []
    """Further rows, run under the first seed alone, since they are slow or not expected to win; tables mark them. A
    study of several parts may have some in each."""
    seeds: Count = 5
    """Each draws its own world, initialisation and samples."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """The seeds are this one and those after it; a study of the shop may be run in parts, in one run directory (a real
    log would be read again in each)."""
    trainings: Count = 1
    """Rankers that a row trains under a seed, of different initial weights, order and dropout; its figures are their
    mean. Training is cheap beside reading, and its noise may be as large as a gain. More may be added later."""
    tuned: dict[Model, dict[str, Any]] = {}
    """Ranker settings of one model that differ from `ranker`, as `rgalign tune` found them."""
    trials: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=8)] = [{}]
    """Ranker settings that `rgalign tune` tries for every model alike; {} is `ranker` as it stands."""
    tuning_seed: Annotated[int, Field(ge=0)] = 1000
    """World of the trials; none of those that are judged."""
    encoder: Reasoner = Reasoner(model="minilm", engine="sentence", dtype="float32")
    """What rows without an LLM read texts with."""
    max_text_tokens: Count = 128
    """Tokens of a session text that the encoder reads."""
    cpus_per_slice: Positive = 1.0
    """CPUs of one row under one seed; as many run at a time as the cluster holds."""
    slice_deadline_s: Positive = 9000.0
    """Longest wait for any of the slices in work to be done."""

    @model_validator(mode="after")
    def _once(self) -> Compare:
        if twice := set(self.rows or []) & set(self.exploratory):
            raise ValueError(f"'{min(twice)}' stands in rows and in exploratory; name it once")
        return self

    @model_validator(mode="after")
    def _of_the_ranker(self) -> Compare:
        for changes in (*self.tuned.values(), *self.trials):
            try:
                Ranker().changed(changes)
            except ValidationError as error:
                raise ValueError(
                    f"tuned and trials hold settings of ranker; {sentence(error, Ranker).rstrip('.')}"
                ) from None
        if self.tuning_seed in self.judged_seeds:
            raise ValueError(f"tuning_seed ({self.tuning_seed}) is one of the {self.seeds} seeds that are judged")
        return self

    @property
    def judged_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)
