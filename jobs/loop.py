"""The closed loop as a Ray job.

    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m jobs.loop --config demo --run-dir URI

The job's driver joins the cluster it was submitted to. Every node must see the run directory, and have the
package and its requirements installed.
"""

from __future__ import annotations

import sys

from rgalign_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:] = ["loop", "--set", "cluster.address=auto", *sys.argv[1:]]
    main()
