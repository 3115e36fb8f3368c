"""What each job is on the command line."""

from __future__ import annotations

VERBS: dict[str, tuple[str, ...]] = {
    "prepare": ("loop", "--until", "features"),
    "train_ranker": ("loop", "--until", "rankers_0"),
    "rollout": ("loop", "--until", "rollouts_1"),
    "align": ("loop", "--until", "align_1"),
    "evaluate": ("loop", "--until", "evaluation"),
    "loop": ("loop",),
    "compare": ("compare",),
    "serve": ("serve",),
}
"""By the name of the job, a verb of `rgalign` with what it is told."""
