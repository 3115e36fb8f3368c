"""A loop up to the aligned reasoner of a round as a job; `--until align_2` goes on to the second.

    ray job submit --working-dir . -- python -m jobs.align --config demo --run-dir URI

What an earlier job has finished is skipped.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("align")
