from __future__ import annotations

import json
import math
import weakref

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs_data import SPEC, event, session, table

from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.logs import features
from rgalign_ray.logs.feature_spec import HIDDEN, FeatureSpec, FieldSpec
from rgalign_ray.logs.features import MISSING, UNKNOWN, FeatureSpace

STATUSES = st.sampled_from(["paid", "shipped", "delivered", None])
NUMBERS = st.one_of(st.none(), st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf))


@st.composite
def tables(draw):
    rows = [
        session(
            number,
            status=draw(STATUSES),
            days_late=draw(NUMBERS),
            tags=draw(st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c"]), max_size=4))),
            history=[
                event(draw(st.sampled_from("xyz")), hours) for hours in draw(st.lists(st.floats(-5, 50), max_size=6))
            ],
        )
        for number in range(draw(st.integers(1, 12)))
    ]
    return table(*rows)


@settings(deadline=None, max_examples=30)
@given(tables(), tables(), st.integers(1, 4))
def test_ids_stay_inside_their_tables_for_seen_and_unseen_rows(fitted: pa.Table, other: pa.Table, length: int) -> None:
    space = FeatureSpace.fit(SPEC, [fitted], length)
    for rows in (fitted, other):
        out = space.transform(rows)
        assert out["fields"].shape == (rows.num_rows, space.num_fields)
        assert out["fields"].dtype == np.int32
        assert out["multi"].shape == (rows.num_rows, space.num_multi, space.multi_length)
        assert out["history"].shape == (rows.num_rows, length) == (rows.num_rows, space.history_length)
        assert out["fields"].min() >= 0
        assert out["fields"].max() < space.field_size
        assert out["multi"].min() >= 0
        assert out["multi"].max() < space.multi_size
        assert out["history"].min() >= 0
        assert out["history"].max() < space.history_size
        starts = np.cumsum([0, *space._sizes])
        for position in range(space.num_fields):
            ids = out["fields"][:, position]
            assert (starts[position] <= ids).all() and (ids < starts[position + 1]).all(), "fields share no id"


@settings(deadline=None, max_examples=30)
@given(tables(), st.integers(1, 5))
def test_the_cut_into_batches_changes_nothing(rows: pa.Table, size: int) -> None:
    whole = FeatureSpace.fit(SPEC, [rows], 3)
    parts = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
    assert FeatureSpace.fit(SPEC, parts, 3).version == whole.version
    joined = [whole.transform(part) for part in parts]
    for name, values in whole.transform(rows).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in joined]), values)


@settings(deadline=None, max_examples=30)
@given(tables(), tables())
def test_a_space_survives_json(fitted: pa.Table, rows: pa.Table) -> None:
    space = FeatureSpace.fit(SPEC, [fitted], 3)
    again = FeatureSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again.version == space.version
    for name, values in space.transform(rows).items():
        np.testing.assert_array_equal(again.transform(rows)[name], values)


@pytest.mark.parametrize("part", ["vocabularies", "edges"])
def test_vocabularies_and_buckets_of_another_spec_are_refused(part: str) -> None:
    own = fit(session()).to_dict()
    fields = (FieldSpec(name="tier", kind="categorical"), FieldSpec(name="age", kind="numeric"))
    rows = table(session()).append_column("tier", pa.array(["a"])).append_column("age", pa.array([1.0]))
    other = FeatureSpace.fit(FeatureSpec(fields=fields), [rows]).to_dict()
    with pytest.raises(DataError, match=r"of another spec \(they differ in .*(tier|age)") as error:
        FeatureSpace.from_dict({**own, part: other[part]})
    assert str(error.value).startswith("features: ") and str(error.value).endswith("fit them on this one.")


def test_fitting_takes_one_pass_over_a_stream() -> None:
    """A generator can be read once, and each batch is let go before the next is made."""
    alive: list[weakref.ref] = []

    def stream():
        for start in range(0, 30, 10):
            assert sum(batch() is not None for batch in alive) <= 1, "at most the batch before is held"
            batch = table(*(session(i, days_late=float(i)) for i in range(start, start + 10)))
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    space = FeatureSpace.fit(SPEC, stream())
    assert len(alive) == 3
    assert space.version == fit(*(session(i, days_late=float(i)) for i in range(30)), length=20).version


def fit(*rows: dict, spec: FeatureSpec = SPEC, length: int = 3) -> FeatureSpace:
    return FeatureSpace.fit(spec, [table(*rows)], length)


def test_history_is_newest_last_and_knows_nothing_after_the_entry() -> None:
    space = fit(session(history=[event("a", 5), event("b", 3), event("c", 1), event("later", 2)]))
    rows = table(
        session(0, history=[event("b", 3), event("a", 5)]),
        session(1, history=[event("a", 9), event("b", 8), event("c", 7), event("a", 6)]),
        session(2, history=[event("c", 1), event("later", -1)]),
        session(3, history=[event("unheard of", 1)]),
    )
    a, b, c, _ = (space.events.index(name) + 2 for name in ("a", "b", "c", "later"))
    expected = [[0, a, b], [b, c, a], [0, 0, c], [0, 0, UNKNOWN]]
    assert space.transform(rows)["history"].tolist() == expected


def test_missing_unknown_and_non_finite_values_have_ids_of_their_own() -> None:
    space = fit(session(0, status="paid"), session(1, status="shipped", days_late=3.0))
    rows = [
        session(0, status=None, days_late=None),
        session(1, status="lost", days_late=math.nan),
        session(2, status="paid", days_late=math.inf),
        session(3, status="shipped", days_late=-1e9),
        session(4, status="shipped", days_late=1e9),
    ]
    status, late = space.transform(table(*rows))["fields"].T
    late = late - space._sizes[0]
    assert status.tolist() == [MISSING, UNKNOWN, 2, 3, 3]
    assert late[:3].tolist() == [MISSING] * 3
    assert late[3] == 2
    assert late[4] == space._sizes[1] - 1


def test_a_rare_number_among_few_has_a_bucket_of_its_own() -> None:
    space = fit(*(session(i, days_late=float(i == 0)) for i in range(1000)))
    ids = space.transform(table(session(0, days_late=0.0), session(1, days_late=1.0)))["fields"][:, 1]
    assert ids[0] != ids[1]


def test_buckets_hold_equal_shares() -> None:
    values = np.random.default_rng(0).lognormal(size=8000)
    spec = FeatureSpec(fields=(FieldSpec(name="days_late", kind="numeric", buckets=8),))
    base = table(*(session(i) for i in range(100)))
    rows = pa.concat_tables([base] * 80).set_column(base.column_names.index("days_late"), "days_late", pa.array(values))
    space = FeatureSpace.fit(spec, [rows])
    shares = np.bincount(space.transform(rows)["fields"][:, 0])[2:] / len(values)
    assert len(shares) == 8
    np.testing.assert_allclose(shares, 1 / 8, atol=0.002)


def test_quantiles_come_from_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SAMPLE_ROWS", 2000)
    spec = FeatureSpec(fields=(FieldSpec(name="days_late", kind="numeric", buckets=2),))
    base = table(*(session(i) for i in range(500)))
    place = base.column_names.index("days_late")
    batches = [base.set_column(place, "days_late", pa.array(np.linspace(b, b + 1, 500))) for b in range(40)]
    fitting = features._Fitting(spec)
    for batch in batches:
        fitting.add(batch)
        assert sum(len(values) for _, values in fitting._held) <= 2 * 2000
    assert fitting.edges()["days_late"][0] == pytest.approx(20, abs=1.5), (
        "the median of 0 to 40, drawn from all batches"
    )


def test_the_sample_is_the_rows_with_the_smallest_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SAMPLE_ROWS", 100)
    spec = FeatureSpec(fields=(FieldSpec(name="days_late", kind="numeric"),))
    values, drawn = np.random.default_rng(5).normal(size=1500), np.random.default_rng(0).random(1500)
    base = table(*(session(i) for i in range(30)))
    place = base.column_names.index("days_late")
    fitting = features._Fitting(spec)
    for start in range(0, 1500, 30):
        fitting.add(base.set_column(place, "days_late", pa.array(values[start : start + 30])))
    assert sorted(fitting._cut()[:, 0]) == sorted(values[np.argsort(drawn)[:100]])


def test_values_below_the_count_floor_are_unknown() -> None:
    spec = SPEC.model_copy(update={"min_count": 2})
    space = fit(*(session(i, status="paid", history=[]) for i in range(3)), session(9, status="rare"), spec=spec)
    assert space.vocabularies["status"] == ["paid"]
    assert space.events == []


def test_multi_values_are_cut_padded_and_apart_from_other_fields() -> None:
    spec = FeatureSpec(
        fields=(FieldSpec(name="tags", kind="multi", length=3), FieldSpec(name="labels", kind="multi", length=2)),
        min_count=1,
    )
    fitted = table(session(tags=["x", "y"])).append_column("labels", pa.array([["x"]]))
    space = FeatureSpace.fit(spec, [fitted])
    rows = table(session(0, tags=["y", "new"]), session(1, tags=None))
    rows = rows.append_column("labels", pa.array([["x", "x", "x"], ["y"]]))
    assert space.transform(rows)["multi"].tolist() == [[[3, UNKNOWN, 0], [4, 4, 0]], [[0, 0, 0], [UNKNOWN, 0, 0]]]


def test_whole_numbers_and_booleans_are_values_too() -> None:
    rows = table(session(0), session(1))
    rows = rows.append_column("tier", pa.array([1, 2])).append_column("new", pa.array([True, False]))
    fields = (*(FieldSpec(name=n, kind="categorical") for n in ("tier", "new")), FieldSpec(name="new", kind="numeric"))
    space = FeatureSpace.fit(FeatureSpec(fields=fields[:2], min_count=1), [rows])
    assert space.vocabularies == {"tier": ["1", "2"], "new": ["false", "true"]}
    space = FeatureSpace.fit(FeatureSpec(fields=fields[2:]), [rows])
    assert space.edges == {"new": [0.0]}


def test_a_session_is_read_alike_alone_in_pieces_and_under_other_types() -> None:
    names = {"categorical": ["plain", "other", "flag", "count"], "numeric": ["days", "coins", "whole"]}
    spec = FeatureSpec(fields=[FieldSpec(name=name, kind=kind) for kind, own in names.items() for name in own])
    columns = {
        "plain": pa.array(["a", None, "b", "a"]),
        "other": pa.array(["b", "c", "b", None]),
        "flag": pa.array([True, False, None, True]),
        "count": pa.array([7, 8, 7, None], pa.int16()),
        "days": pa.array([0.5, None, math.nan, 3.0], pa.float32()),
        "coins": pa.array([1.0, 2.0, 5.0, None]),
        "whole": pa.array([None, 2, 3, 9], pa.int32()),
    }
    whole = table(*(session(number) for number in range(4)))
    for name, column in columns.items():
        whole = whole.append_column(name, column)
    space = FeatureSpace.fit(spec, [whole])
    read = space.transform(whole)["fields"]
    assert len(np.unique(read)) > 12
    for row in range(4):
        assert (space.transform(whole.slice(row, 1))["fields"] == read[row]).all()
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 0), whole.slice(1)])
    assert (space.transform(pieces)["fields"] == read).all()
    encoded = whole
    for name in ("plain", "other"):  # whose dictionaries differ
        encoded = encoded.set_column(encoded.schema.get_field_index(name), name, whole[name].dictionary_encode())
    assert (space.transform(encoded)["fields"] == read).all()
    assert space.transform(whole.slice(0, 0))["fields"].shape == (0, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop_columns(["status"]), "'status' is missing"),
        (
            lambda t: t.set_column(t.column_names.index("days_late"), "days_late", pa.array(["7"])),
            "'days_late' is string",
        ),
        (lambda t: t.set_column(t.column_names.index("tags"), "tags", pa.array(["late"])), "'tags' is string"),
        (lambda t: t.set_column(t.column_names.index("status"), "status", pa.array([0.5])), "'status' is double"),
        (lambda t: t.slice(0, 0), "no session to fit"),
    ],
)
def test_a_table_that_does_not_fit_the_spec_is_refused(change, words: str) -> None:
    with pytest.raises(DataError, match=words):
        FeatureSpace.fit(SPEC, [change(table(session()))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fields: []", "fields"),
        ("fields: [{name: a, kind: number}]", "fields.0.kind"),
        (
            "fields: [{name: a, kind: numeric, bucket: 3}]",
            "fields.0.bucket: no such setting; the nearest is fields.buckets",
        ),
        ("fields: [{kind: numeric}]", "fields.0.name: must be set"),
        ("fields: [{name: a, kind: numeric}, {name: a, kind: multi}]", "'a' is listed twice"),
        ("fields: [", "not valid YAML"),
    ],
)
def test_a_faulty_spec_names_its_fault(tmp_path, text: str, words: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        FeatureSpec.load(str(tmp_path / "spec.yaml"))
    assert str(error.value).startswith("features.spec: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", sorted(HIDDEN))
def test_a_spec_that_reads_what_a_feature_must_not_see_is_refused(column: str, tmp_path) -> None:
    (tmp_path / "spec.yaml").write_text(f"fields: [{{name: a, kind: numeric}}, {{name: {column}, kind: multi}}]")
    with pytest.raises(ConfigError, match=f"^features.spec: .*'{column}' is a label.*must not see"):
        FeatureSpec.load(str(tmp_path / "spec.yaml"))


def test_specs_of_the_package_are_found_by_name() -> None:
    assert "favourite_genres" in FeatureSpec.load("movielens").columns
    with pytest.raises(ConfigError, match="movielens"):
        FeatureSpec.load("nothing")
