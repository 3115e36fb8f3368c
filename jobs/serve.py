"""The online service as a Ray job: it runs until it is stopped.

    ray job submit --working-dir . --no-wait -- python -m jobs.serve --config demo --run-dir URI

Every node must see the run directory, and have the package and its requirements installed.
"""

from __future__ import annotations

from jobs import run

if __name__ == "__main__":
    run("serve")
