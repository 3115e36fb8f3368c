"""What a report says of queries."""

from __future__ import annotations

import pytest

from rgalign_ray import config, storage
from rgalign_ray.evaluate.report import Comparison, Estimate
from rgalign_ray.loop import alignments, compare, summary
from rgalign_ray.loop.stage import Run


def manifest(stage: str, figures: dict | None = None, **rows: int) -> storage.Manifest:
    return storage.Manifest(stage=stage, key="k", rows=rows, figures=figures or {})


def test_queries_that_were_not_judged_are_counted_by_reason() -> None:
    of_rounds = [{"loop": 3, "over_length": 10}, {"over_length": 2}]
    rollouts = [manifest("rollouts", {"faults": faults}, rollouts=60) for faults in of_rounds]
    assert summary.unjudged(rollouts) == ["Not judged of 120 sampled queries: 12 over length, 3 loop."]
    assert summary.unjudged([manifest("rollouts", {"faults": {}}, rollouts=60)]) == []


@pytest.mark.parametrize(
    ("model", "said"), [(None, "2 policy + 1 formal, all of one LLM"), ("tiny", "2 policy + 1 formal")]
)
def test_prompts_that_stand_for_several_teachers_are_said_to(model: str | None, said: str) -> None:
    teachers = [{"name": "formal", "n": 1, "model": model}]
    assert summary._sources(config.validate({"rollout": {"n": 2}, "teachers": teachers})) == said


def test_what_becomes_of_the_text_is_said_of_every_reasoner() -> None:
    settings = config.validate({"run_dir": "memory://run", "compare": {"exploratory": ["rg_dpo"], "seeds": 2}})
    jobs = compare.runs(settings, ["qe_rec", "rg_sft", "rg_dpo"])
    wrote, found = {"embeddings_0": (90, 90), "aligned_sft": (99, 97), "aligned_dpo": (50, 0)}, {}
    for number, job in enumerate(jobs):
        found[job.uri("embeddings_0")] = wrote["embeddings_0"][number]
        for name in ("sft", "dpo"):
            found[alignments.run_of(job, name).uri("embeddings_1")] = wrote[f"aligned_{name}"][number]

    class Told(Run):
        def manifest(self, name: str) -> storage.Manifest:
            return manifest(name, sampled=100, valid=found[self.uri(name)])

    told = [Told(job.config) for job in jobs]
    (line,) = alignments.still_written(told, ["qe_rec", "rg_sft", "rg_dpo"])
    assert line.endswith("frozen reasoner 90.0%, RG-SFT, best of N 98.0%, RG-DPO 50.0%.")


def test_two_rows_are_told_apart_in_all_metrics_at_once() -> None:
    def found(metric: str, value: float, separated: bool) -> Comparison:
        width = Estimate(value=value, low=value - 0.02, high=value + 0.02)
        return Comparison(better="A", worse="B", metric=metric, difference=width, separated=separated)

    sure, chance = found("true CTR@3", 0.05, True), found("GAUC", -0.01, False)
    told = "GAUC -0.0100 (-0.0300 to +0.0100), true CTR@3 +0.0500 (+0.0300 to +0.0700)"
    assert summary.sentence([chance, sure], "separated over users") == (
        f"A over B: {told}; separated over users in true CTR@3 alone."
    )
    assert summary.sentence([sure], "separated over users").endswith("; separated over users.")
    assert summary.sentence([chance], "separated over users").endswith("; not separated.")
