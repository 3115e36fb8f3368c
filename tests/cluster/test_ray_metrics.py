"""What docs/cluster.md says of Prometheus metrics is there to be read."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import ray

from rgalign_ray import ray_metrics

DOCS = Path(__file__).parents[2] / "docs/cluster.md"
DEADLINE_S = 90.0


def exported() -> str:
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def tags(name: str) -> dict[str, str]:
    return dict.fromkeys(ray_metrics.TAGS.get(name, ()), "it")


def test_every_metric_that_is_listed_is_exported(ray_cluster: object) -> None:
    for name in ray_metrics.COUNTERS:
        ray_metrics.counter(name).inc(3, tags=tags(name))
    for name in ray_metrics.GAUGES:
        ray_metrics.gauge(name).set(2, tags=tags(name))
    for name in ray_metrics.HISTOGRAMS:
        ray_metrics.histogram(name).observe(7, tags=tags(name))
    wanted = {f"ray_rgalign_{name}_total" for name in ray_metrics.COUNTERS}
    wanted |= {f"ray_rgalign_{name}" for name in ray_metrics.GAUGES}
    wanted |= {f"ray_rgalign_{name}_bucket" for name in ray_metrics.HISTOGRAMS}
    assert set(re.findall(r"`(ray_rgalign_\w+)`", DOCS.read_text())) == wanted
    until = time.monotonic() + DEADLINE_S
    while missing := wanted - {line.split("{")[0].split(" ")[0] for line in exported().splitlines()}:
        assert time.monotonic() < until, missing
        time.sleep(1.0)
