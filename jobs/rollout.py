"""A loop up to the queries of a round as a job; `--until rollouts_2` goes on to the second.

    ray job submit --working-dir . -- python -m jobs.rollout --config demo --run-dir URI

What an earlier job has finished is skipped.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("rollout")
