"""A pool over a cluster of three nodes, bound to two of them, of which one may die: run by test_nodes.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from rgalign_ray import config
from rgalign_ray.config import Config
from rgalign_ray.loop import connection
from rgalign_ray.reasoner.engine import Group, Prompts, Sample
from rgalign_ray.rollout.pool import RolloutPool
from rgalign_ray.rollout.worker import Instruction, Unit

LABELS = {"rgalign": "rollout"}
UNITS = 16
NODE_DIES_AFTER = 3


@dataclass(frozen=True)
class Engine:
    """Both the spec and the engine: it tells the seeds, and notes on which node it is."""

    notes: str

    version = "fake-1"
    hidden_size = 1

    def start(self) -> Engine:
        return self

    def sample(self, prompts: Prompts, seeds: Sequence[Sequence[int]], sampling: config.Sampling) -> list[Group]:
        Path(self.notes, ray.get_runtime_context().get_node_id()).touch()
        time.sleep(0.5)
        vector = np.ones(1, np.float16)
        return [
            Group([1], vector, [Sample(f"query {seed}", [5, 2], [-1.0] * 2, "stop", seed, vector) for seed in row])
            for row in seeds
        ]


def main(folder: Path, dies: bool) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, labels=LABELS) for _ in range(2)]
    cluster.wait_for_nodes()
    rollout = config.Rollout(n=2, workers=4, cpus_per_worker=0.5, node_labels=LABELS, deadline_s=120.0)
    connection.connect(Config(cluster=config.Cluster(address=cluster.address), rollout=rollout))
    (folder / "notes").mkdir(parents=True)
    pool = RolloutPool(
        rollout,
        {
            "engine": Engine(str(folder / "notes")),
            "instruction": Instruction("", "", "v1"),
            "settings": rollout,
            "run_seed": 3,
            "round_": 1,
            "out_uri": str(folder / "out"),
        },
    )
    units = (Unit([f"s{number}"], [f"text {number}"]) for number in range(UNITS))
    for done, _ in enumerate(pool.run(units, "context"), 1):
        if dies and done == NODE_DIES_AFTER:
            cluster.remove_node(nodes[0], allow_graceful=False)
    pool.close()
    bound = [node["NodeID"] for node in ray.nodes() if LABELS.items() <= node["Labels"].items()]
    (folder / "told.json").write_text(json.dumps({"deaths": pool.deaths, "bound": bound}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "dies")
