"""The closed loop as a Ray job.

    ray job submit --working-dir . -- python -m jobs.loop --config demo --run-dir URI

Every node must see the run directory, and have the package and its requirements installed. The same command resumes.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("loop")
