"""Entry points of Ray jobs: the command line's verbs, on the cluster that runs the job."""

from __future__ import annotations

import os
import sys

from rgalign_ray.cli import main
from rgalign_ray.ops.verbs import VERBS


def run(job: str) -> None:
    """Runs a job's verb of the command line with this process's arguments.

    A job's driver is told by RAY_ADDRESS which cluster it belongs to; without it Ray is started on this machine.
    """
    here = ["--set", "cluster.address=auto"] if "RAY_ADDRESS" in os.environ else []
    sys.argv[1:] = [*VERBS[job], *here, *sys.argv[1:]]
    main()
