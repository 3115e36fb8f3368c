"""What does a reasoner's alignment bring through the match of texts, and whose towers must stand beside it?

    rgalign compare --config alignment --run-dir runs/alignment --set compare.seeds=1 \\
        --set 'compare.rows=[judge,rgalign_not_retrained,qe_rec,rgalign]'
    python -m benchmarks.match_and_towers runs/alignment/seed_0

A ranker's score is w·towers + match, where the match holds no more of its training than one weight. So the match of one
ranker can stand beside the towers of another: the judge's match, of the frozen reasoner and of the aligned one moved
back by its mean way, beside no towers, the judge's, those of QE-Rec (trained anew on the frozen reasoner) and those of
RGAlign-Rec (anew on the aligned one). True CTR@k on test sessions; intervals are of 95 %, over users.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import command
from rgalign_ray import config, storage
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate.ladder import Rung, TestSessions
from rgalign_ray.evaluate.statistics import bootstrap, paired_bootstrap
from rgalign_ray.ranker import scoring


@dataclass(frozen=True)
class Parts:
    """Of a ranker's scores on the test sessions, float32 [S, C] both; of padding -inf and 0."""

    towers: np.ndarray
    """As they weigh where intents are ranked by clicks."""
    match: np.ndarray

    @classmethod
    def of(cls, test: TestSessions, rung: Rung) -> Parts:
        """Of a rung's scores.

        Raises:
            ConfigError: for a ranker that compares no texts.
        """
        ranker = scoring.load(rung.ranker)
        if not ranker.model.match or not ranker.model.match.dim:
            raise ConfigError(f"{rung.ranker}: compares no texts; make the run with ranker.text_match=true.")
        with tempfile.TemporaryDirectory() as silent:
            with torch.no_grad():
                ranker.model.match.gate.zero_()
            scoring.save(ranker.model, silent, ranker.meta)
            alone = Rung(rung.name, silent, rung.embeddings, moved_from=rung.moved_from, any_version=True)
            towers = test.score(alone, "click")
        whole = test.score(rung, "click")
        return cls(towers, np.subtract(whole, towers, out=np.zeros_like(whole), where=test.mask))


def measure(
    run_dir: Annotated[str, typer.Argument(help="Of a comparison's seed, with the rows qe_rec and rgalign.")],
) -> None:
    """Print the true CTR of the frozen and the aligned reasoner's match beside each ranker's towers."""
    made = storage.join(run_dir, "config.json")
    if not storage.exists(made):
        raise ConfigError(f"{run_dir}: no seed's folder of a comparison; name one, as runs/alignment/seed_0.")
    settings = config.Config.model_validate(storage.read_json(made))
    truth, aligned = storage.join(run_dir, "log"), storage.join(run_dir, "aligned_full")
    test = TestSessions(storage.join(run_dir, "sessions"), truth, settings.evaluate)
    read = [storage.join(run_dir, "embeddings_0"), storage.join(aligned, "embeddings_1")]
    judge = storage.join(run_dir, "rankers_0", "qe_rec")
    places = {"QE-Rec's": (run_dir, "row_qe_rec", read[0]), "RGAlign-Rec's": (aligned, "row_rgalign", read[1])}
    for place, row, _ in places.values():
        if not storage.exists(storage.join(place, row, "ranker", scoring.META)):
            raise ConfigError(f"{run_dir}: holds no row {row.removeprefix('row_')}; name it in compare.rows.")
    frozen = Parts.of(test, Rung("judge", judge, read[0]))
    match = {
        "frozen": frozen.match,
        "aligned": Parts.of(test, Rung("judge", judge, read[0], moved_from=read[1], any_version=True)).match,
    }
    towers = {"none": np.where(test.mask, 0.0, -np.inf), "the judge's": frozen.towers}
    for title, (place, row, embeddings) in places.items():
        towers[title] = Parts.of(test, Rung(title, storage.join(place, row, "ranker"), embeddings)).towers
    metric = f"true CTR@{settings.evaluate.k}"

    def true(scores: np.ndarray) -> np.ndarray:
        return test.judge(scores).values[metric]

    table = Table("towers beside it", "frozen", "aligned", "difference", title=f"{metric} by the match of texts")
    for title, beside in towers.items():
        values = [true(beside + it) for it in match.values()]
        means = (bootstrap(it, test.users) for it in values)
        gain = paired_bootstrap(values[1], values[0], test.users)
        table.add_row(
            title,
            *(f"{it.mean:.3f} [{it.users[0]:.3f}, {it.users[1]:.3f}]" for it in means),
            f"{gain.mean:+.3f} [{gain.users[0]:+.3f}, {gain.users[1]:+.3f}]",
        )
    Console().print(table)


if __name__ == "__main__":
    command.run(measure)
