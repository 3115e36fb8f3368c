"""The first part of a loop as a job: the log, validated, with roles, and the feature space.

    ray job submit --working-dir . -- python -m jobs.prepare --config demo --run-dir URI

Any later job of the same configuration and run directory goes on from there.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("prepare")
