"""One setting over several values: which comparisons are run, and what is said of the control."""

from __future__ import annotations

from pathlib import Path

import pytest

from rgalign_ray import config
from rgalign_ray.errors import ConfigError
from rgalign_ray.evaluate.report import Comparison, Estimate, Report, Row
from rgalign_ray.loop import compare, sweep
from rgalign_ray.ops import runs

KEY = "world.text_share"


def compared(gain: float, high: float) -> Report:
    """A comparison whose first claim is QE-Rec's gain over DIN."""
    claims = [("QE-Rec", "DIN", gain, high), ("QE-Rec", "popularity", 0.5, 0.6)]
    return Report(
        title="",
        rows=[Row(name="QE-Rec", metrics={"GAUC": Estimate(value=0.9)})],
        facts={"log": "shop", "seeds": "2"},
        comparisons=[
            Comparison(
                better=better,
                worse=worse,
                metric="GAUC",
                difference=Estimate(value=value, low=value - 0.01, high=top),
                separated=True,
            )
            for better, worse, value, top in claims
        ],
    )


def test_every_value_is_compared_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[config.Config] = []

    def record(settings: config.Config) -> Report:
        seen.append(settings)
        return compared(0.02, 0.03)

    monkeypatch.setattr(compare, "run", record)
    settings = config.validate({"run_dir": str(tmp_path)})
    made = sweep.run(settings, KEY, ["0", "0.5", "1"], "0.0")
    assert [it.world.text_share for it in seen] == [0, 0.5, 1]
    assert len({it.run_uri for it in seen}) == 3
    assert [row.metrics["GAUC"].value for row in made.rows] == [0.02] * 3, "the first claim, not the last"
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.html", "sweep.md", "sweep.json", "settled.json"}
    assert tmp_path.name in [run.name for run in runs.list_runs(str(tmp_path.parent))], "`rgalign runs` finds it"


@pytest.mark.parametrize(
    ("high", "verdict"), [(0.0009, "no gain"), (0.002, "not shown to be none"), (-0.001, "no gain")]
)
def test_the_control_gains_nothing_where_its_upper_end_is_a_twentieth_of_the_gain(high: float, verdict: str) -> None:
    made = {"0": compared(high - 0.01, high), "0.5": compared(0.02, 0.03)}
    (line,) = sweep.sweep_report(config.Config(), KEY, made, "0").summary
    assert f": {verdict} (below 5%)" in line


def test_without_a_gain_nothing_is_said_of_the_control() -> None:
    made = {"0": compared(0.0, 0.01), "0.5": compared(-0.02, 0.03)}
    (line,) = sweep.sweep_report(config.Config(), KEY, made, "0").summary
    assert "nothing can be said" in line


@pytest.mark.parametrize(
    ("key", "values", "control", "says"),
    [
        ("world.text", ["0", "1"], None, "world.text: no such setting; the nearest is world.text_share"),
        (KEY, ["0.5", ".50"], None, "a value stands twice in 0.5, .50"),
        (KEY, ["0.5", "1"], "0", "--control 0: not one of 0.5, 1"),
        (KEY, ["0.5", "3"], None, "world.text_share"),
        (KEY, ["0.5", "["], None, r"world\.text_share: '\[' is not a valid value"),
        ("world.seed", ["0", "1"], None, r"sets it by compare\.first_seed"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    key: str, values: list[str], control: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run", lambda settings: pytest.fail("nothing may run"))
    with pytest.raises(ConfigError, match=says):
        sweep.run(config.Config(), key, values, control)


def test_what_models_were_tuned_to_is_not_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run", lambda settings: pytest.fail("nothing may run"))
    tuned = config.validate({"compare": {"tuned": {"qe_rec": {"dropout": 0.5}}}})
    with pytest.raises(ConfigError, match=r"compare\.tuned has it for qe_rec, which would be the same at every value"):
        sweep.run(tuned, "ranker.dropout", ["0.1", "0.5"])


@pytest.mark.parametrize("rows", [["lr", "din"], ["popularity", "qe_rec"]])
def test_a_sweep_without_the_two_that_it_compares_is_refused(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "run", lambda settings: pytest.fail("nothing may run"))
    with pytest.raises(ConfigError, match="what qe_rec gains over a rival"):
        sweep.run(config.validate({"compare": {"rows": rows}}), KEY, ["0", "1"])
