"""Rankers side by side over seeds, as a job.

    ray job submit --working-dir . -- python -m jobs.compare --config ladder --run-dir URI

The same command resumes.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("compare")
