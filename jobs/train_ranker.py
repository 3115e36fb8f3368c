"""A loop up to the first ranker as a job: encode, train QE-Rec and its controls.

    ray job submit --working-dir . -- python -m jobs.train_ranker --config demo --run-dir URI

What an earlier job has finished is skipped.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("train_ranker")
