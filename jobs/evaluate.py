"""A loop to its evaluation as a job, without the report.

    ray job submit --working-dir . -- python -m jobs.evaluate --config demo --run-dir URI

What an earlier job has finished is skipped.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("evaluate")
