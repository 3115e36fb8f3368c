from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rgalign_ray.evaluate import metric_names, plots, report_page
from rgalign_ray.evaluate.report import (
    Breakdown,
    Calibration,
    Comparison,
    Curves,
    Diagnosis,
    Estimate,
    Example,
    Ingest,
    QueryWorth,
    Report,
    RewardGate,
    Row,
    Stage,
    Written,
)
from rgalign_ray.evaluate.report_page import render
from rgalign_ray.evaluate.report_text import comparisons, examples, headline, markdown

EVIL = "<script>alert('x')</script> & \"quotes\" --> ]]> $a_b$ [red]"


def report(text: str = "plain", **changes: Any) -> Report:
    """A report with every part filled, `text` wherever text can stand."""
    figures = Estimate(value=0.7, low=0.6, high=0.8)
    parts: dict[str, Any] = {
        "title": text,
        "summary": [text],
        "facts": {text: text},
        "config": {text: {"inner": text}},
        "metrics": {text: text},
        "rows": [
            Row(name=text, metrics={text: figures, "GAUC": Estimate(value=0.91234)}, note=text),
            Row(name="aligned", metrics={text: Estimate(value=0.75), "GAUC": Estimate(value=0.95)}, seconds=20.0),
            Row(name="base rate", metrics={"GAUC": Estimate(value=0.99)}, control=True),
        ],
        "comparisons": [
            Comparison(
                better=text,
                worse="frozen",
                metric="GAUC",
                difference=Estimate(value=-0.003, low=-0.01, high=0.004),
                separated=False,
            )
        ],
        "query_variance": {text: 0.25},
        "examples": [
            Example(
                session=text,
                query_before=text,
                query_after="Where is my parcel?",
                intents_before=["Cancel an order"],
                intents_after=["Speed up parcel delivery", text],
                wanted=["Speed up parcel delivery"],
                wanted_is=text,
            )
        ],
        "reward": RewardGate(
            spread=0.1,
            noise=0.05,
            reliability=0.75,
            spread_by_session=[0.1, 0.2, math.nan],
            noise_by_session=[0.05, 0.04],
            best_of_n=[-3.0, -2.9],
            valid_rate=0.9,
        ),
        "worth": QueryWorth(
            metric=text,
            sessions=40,
            by_reward=[figures] * 2,
            held_out=[figures] * 2,
            by_truth=[figures] * 2,
            null=figures,
        ),
        "diagnoses": [
            Diagnosis(
                name=text,
                informative=0.0123,
                informative_error=0.004,
                queries=300,
                queries_changed=0.4,
                moved=0.31,
                common=0.4,
                read=-0.0021,
            )
        ],
        "written": [Written(session=text, queries={text: text, "frozen": None})],
        "curves": [Curves(title=text, x=text, y=text, lines={text: [0.1, 0.2], "other": [0.3]})],
        "breakdowns": [
            Breakdown(metric=text, by=text, groups=[text, "SG"], rows={text: [figures, None], "other": [figures] * 2})
        ],
        "calibration": [Calibration(name=text, expected=[0.01, 0.4], observed=[0.0, 0.5])],
        "stages": [Stage(name=text, seconds=75.0, peak_mb=1234.0), Stage(name="evaluate", seconds=3.0)],
        "ingest": Ingest(sessions=2500, roles={text: 1500}, quarantined={text: 3, "duplicate": 2}),
    }
    return Report(**{**parts, **changes})


class Page(HTMLParser):
    """Collects a page's elements, attributes and visible text, and checks that tags close in order."""

    VOID = frozenset({"meta", "path", "use"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(renderable: object) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


@pytest.fixture(scope="module")
def page_text() -> str:
    return render(report())


def test_the_page_holds_every_figure(page_text: str) -> None:
    page = Page(page_text)
    assert page.open == []
    for figure in (
        "0.9123",
        ".600 … .800",
        "−0.0030",
        "−.010 … +.004",
        "25 %",
        "0.7500",
        "1 min 15 s",
        "1,234 MiB",
    ):
        assert figure in page.text, figure
    assert "2,500 sessions came in; 5 were set aside" in page.text
    for figure in ("+0.0123", "± 0.0040", "0.3100", "−0.0021"):
        assert figure in page.text, figure
    assert "Best of N, in truth" in page.text


def test_the_page_loads_nothing_and_runs_nothing(page_text: str) -> None:
    page = Page(page_text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), (name, value)
    assert "@import" not in page_text
    assert not re.search(r"url\((?!#)", page_text)


def test_every_text_is_escaped() -> None:
    text = render(report(EVIL))
    page = Page(text)
    assert "script" not in page.tags
    assert page.open == []
    assert EVIL in page.text
    assert "<script" not in text


@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_any_text_leaves_the_page_well_formed(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            plots,
            "all_of",
            lambda _: {"headline": [], "differences": [], "reward": [], "curves": [], "looks": [], "stages": []},
        )
        page, plain = Page(render(report(text))), Page(render(report()))
    assert page.open == []
    assert page.tags == plain.tags


def test_a_report_of_rows_alone_has_no_empty_sections() -> None:
    page = Page(render(Report(title="bare", rows=[Row(name="only", metrics={"GAUC": Estimate(value=0.5)})])))
    assert page.tags.count("section") == 1


def test_markdown_holds_intervals_where_there_are_some() -> None:
    found = markdown(report()).splitlines()
    assert "| plain | 0.7000 (0.6000 … 0.8000) | 0.9123 |" in found
    assert "| plain − frozen | GAUC | −0.0030 | −0.0100 … +0.0040 | not separated |" in found
    bare = markdown(Report(title="bare", rows=[Row(name="only", metrics={"GAUC": Estimate(value=0.5)})]))
    assert "difference" not in bare


def test_element_ids_are_unique_and_references_resolve(page_text: str) -> None:
    page = Page(page_text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value[1:] for name, value in page.attributes if name == "xlink:href"]
    clips = re.findall(r"url\(#([^)]+)\)", page_text)
    assert set(references + clips) <= set(ids)


def test_plots_take_every_colour_from_the_page(page_text: str) -> None:
    text = "".join(re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL))
    assert "var(--ink)" in text
    assert "var(--series-1)" in text
    assert re.findall(r"#[0-9a-f]{6}\b", text) == []
    assert "mathdefault" not in text, "an axis is labelled by formulas that nobody renders"


def test_one_difference_far_off_leaves_the_others_their_scale() -> None:
    def found(value: float, worse: str) -> Comparison:
        width = Estimate(value=value, low=value - 0.01, high=value + 0.01)
        return Comparison(better="a", worse=worse, metric="GAUC", difference=width, separated=value > 0.01)

    near = [found(0.01 * number, f"w{number}") for number in range(-2, 5)]
    drawn = plots.differences(
        "GAUC", [*near, found(0.5, "the ceiling"), found(0.9, "w").model_copy(update={"metric": "x"})]
    )
    assert "+0.500 →" in drawn and "the ceiling" in drawn, "told in figures"
    ticks = [float(text.replace("−", "-")) for text in re.findall(r">([−0-9.]+)</text>", drawn)]
    assert len(ticks) >= 3 and max(map(abs, ticks)) < 0.06, "the axis is the others'"


def test_equal_reports_give_equal_pages(page_text: str) -> None:
    assert render(report()) == page_text


def test_figures_that_are_no_numbers_are_dashes() -> None:
    rows = [Row(name=name, metrics={"GAUC": Estimate(value=math.nan)}) for name in ("a", "b")]
    it = report(rows=rows)
    assert "nan" not in Page(render(it)).text
    assert "nan" not in shown(headline(it))


def test_only_competing_rows_are_marked_as_best(page_text: str) -> None:
    assert re.findall(r'class="best">([\d.]+)', page_text) == ["0.7500", "0.9500"]


def test_write_report_writes_the_page_whole(tmp_path: Path, page_text: str) -> None:
    target = str(tmp_path / "deep" / "report.html")
    assert report_page.write(target, report()) == target
    assert Path(target).read_text() == page_text
    assert [path.name for path in Path(target).parent.iterdir()] == ["report.html"]


def test_a_report_survives_a_round_trip_through_json() -> None:
    it = report(reward=None)
    assert Report.model_validate_json(it.model_dump_json()) == it


def test_the_terminal_shows_rows_intervals_and_controls_last() -> None:
    rows = report().rows
    text = shown(headline(report(rows=[rows[2], rows[0], rows[1]])))
    assert ".600 … .800" in text
    assert "0.9123" in text
    assert text.index("aligned") < text.index("base rate")


@pytest.mark.parametrize("render_part", [headline, examples, comparisons])
def test_texts_are_no_markup_in_the_terminal(render_part: Any) -> None:
    assert "[red]" in shown(render_part(report("a [red] b [/] c")))


def test_the_terminal_marks_the_wanted_intent_and_the_unseparated_difference() -> None:
    assert "✓ Speed up parcel delivery" in shown(examples(report()))
    assert "✓ Cancel" not in shown(examples(report()))
    assert "−0.0030 │" in shown(comparisons(report()))
    separated = report().comparisons[0].model_copy(update={"separated": True})
    assert "−0.0030* │" in shown(comparisons(report(comparisons=[separated])))


def test_a_pair_of_rows_is_one_line_of_differences_and_what_no_row_has_stands_below() -> None:
    gauc = report().comparisons[0]
    plain = gauc.model_copy(update={"metric": "plain", "difference": Estimate(value=0.25, low=0.1, high=0.4)})
    hits = gauc.model_copy(update={"better": "aligned reasoner", "metric": "Intent Hit Rate", "separated": True})
    it = report(comparisons=[gauc, plain, hits])
    text = shown(comparisons(it))
    (line,) = [line for line in text.splitlines() if "−0.0030 │" in line]
    assert "+0.2500" in line and "│ plain" in line
    assert "│ − frozen" in text and "+.100 … +.400" in text
    assert "Intent Hit Rate: aligned reasoner − frozen" in text and "−0.0030*" in text
    page = render(it)
    assert page.count('class="chance">−0.0030') == 1 and page.count('class="claimed">−0.0030') == 1
    assert "Intent Hit Rate" in page


def test_a_short_interval_leaves_out_the_nought_alone() -> None:
    assert Estimate(value=10, low=0.6014, high=10.5).short_interval == ".601 … 10.500"
    assert Estimate(value=0, low=-0.0104, high=20).short_signed_interval == "−.010 … +20.000"
    assert (
        Estimate(value=0).short_interval == "" and Estimate(value=0, low=math.nan, high=1).short_interval == "– … 1.000"
    )


def test_a_terminal_tells_differences_of_the_truth_where_it_is_known() -> None:
    known = ["GAUC shown", "GAUC", "need Recall@3", "true CTR@3", "resolved@3", "GAUC uniform"]
    assert metric_names.in_short(known) == ["GAUC shown", "need Recall@3", "true CTR@3", "resolved@3"]
    assert metric_names.in_short(["need Recall@3", "true CTR@3"]) == ["need Recall@3", "true CTR@3"]
    assert metric_names.in_short(["GAUC", "Recall@3"]) == ["GAUC", "Recall@3"]
