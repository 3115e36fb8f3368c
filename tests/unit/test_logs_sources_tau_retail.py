from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rgalign_ray import storage
from rgalign_ray.config import Log, Roles, TauRetail, load
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.logs.feature_spec import FeatureSpec
from rgalign_ray.logs.features import FeatureSpace
from rgalign_ray.logs.ingest import ingest
from rgalign_ray.logs.prompts import Template
from rgalign_ray.logs.sources import tau_retail

SETTINGS = TauRetail()
DEFECTS = ("Initiate Refund", "Update Refund", "Refund Status", "Return Due to Stain", "Return Due to Size")
BITEXT = ("cancel_order", "change_order", "change_shipping_address", "track_refund")


def order(status: str, *items: tuple[str, float]) -> dict[str, Any]:
    return {"status": status, "items": [{"name": name, "price": price} for name, price in items]}


def user(*orders: str, methods: tuple[str, ...] = ("paypal",)) -> dict[str, Any]:
    payment = {f"{source}_{n}": {"source": source} for n, source in enumerate(methods)}
    return {"orders": list(orders), "payment_methods": payment, "address": {"state": "CO"}}


def task(user_id: str, *actions: str, instruction: str = "You are in a hurry.") -> dict[str, Any]:
    kwargs = {"order_id": "#W2", "reason": "ordered by mistake"}
    called = [{"name": name, "kwargs": kwargs} for name in actions]
    return {"user_id": user_id, "instruction": instruction, "actions": called, "outputs": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two accounts, one of them without orders, and four tasks."""
    files = {
        "tau/users.json": {
            "ann_1": user("#W1", "#W2", methods=("paypal", "gift_card", "paypal")),
            "bob_2": user(),
        },
        "tau/orders.json": {
            "#W1": order("delivered", ("Lamp", 20.0), ("Desk", 80.5)),
            "#W2": order("pending", ("Lamp", 21.0)),
        },
        "tau/tasks_train.json": [
            task("ann_1", "return_delivered_order_items", "return_delivered_order_items", "cancel_pending_order"),
            task("ann_1", "get_order_details", "exchange_delivered_order_items"),
            task("bob_2", "find_user_id_by_email"),
            task("ann_1", "modify_pending_order_payment", "modify_pending_order_items", "modify_pending_order_address"),
        ],
        "abcd/guidelines.json": {
            "Product Defect": {
                "description": "refunds and returns",
                "subflows": {name: {} for name in DEFECTS},
            },
            "Order Issue": {"description": "change an order", "subflows": {"Status Payment Method": {}, "Other": {}}},
        },
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "bitext").mkdir()
    said = [("pls", "BQ"), (" shorter", "B"), ("longer than it", "B"), ("bad", "BW")]
    rows = [
        {"instruction": words, "intent": intent, "category": "THE_ORDER", "tags": tags}
        for intent in BITEXT
        for words, tags in said
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bitext/utterances.parquet")
    return tmp_path / "tau"


def prepared(folder: Path, name: str = "out") -> list[dict]:
    tau_retail.prepare(folder, SETTINGS, str(folder / name))
    return storage.read_table(str(folder / name / "sessions")).sort_by("session_id").to_pylist()


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_the_knowledge_base_is_bitexts_intents_and_abcds_returns_and_refunds(folder: Path) -> None:
    prepared(folder)
    intents = {row["intent_id"]: row for row in storage.read_table(str(folder / "out/intents.parquet")).to_pylist()}
    abcd = {"initiate_refund", "update_refund", "refund_status", "return", "status_payment_method"}
    assert set(intents) == {*BITEXT, *abcd, "exchange"}
    assert intents["cancel_order"] == {
        **{"intent_id": "cancel_order", "title": "Cancel order", "category": "The order"},
        "description": "For instance: shorter.",
    }
    assert intents["return"]["description"] == "Refunds and returns, due to stain, size."


def test_clicks_are_what_the_actions_mean(folder: Path) -> None:
    ids = tau_retail.knowledge_base(folder / SETTINGS.utterances, folder / SETTINGS.guidelines)
    clicked = [
        {intent["intent_id"] for intent, click in zip(ids, row["clicks"], strict=True) if click}
        for row in prepared(folder)
    ]
    assert clicked == [
        {"return", "cancel_order"},
        {"exchange"},
        set(),
        {"status_payment_method", "change_order", "change_shipping_address"},
    ]
    counts = tau_retail.prepare(folder, SETTINGS, str(folder / "again"))
    assert counts == {
        **{"users": 2, "orders": 2, "intents": 10, "sessions": 4, "clicks": 6, "without_click": 1},
    }


def test_features_and_history_are_the_account_as_it_was(folder: Path) -> None:
    ann, _, bob, _ = prepared(folder)
    assert {name: ann[name] for name in ("orders_pending", "orders_delivered", "orders_cancelled")} == {
        **{"orders_pending": 1, "orders_delivered": 1, "orders_cancelled": 0},
    }
    assert (ann["orders"], ann["items"], ann["amount"], ann["state"]) == (2, 3, 121.5, "CO")
    assert (ann["payment_methods"], ann["products"]) == (["gift_card", "paypal"], ["Lamp", "Desk"])
    assert [(e["event"], e["text"]) for e in ann["history"]] == [
        ("order_delivered", "Lamp, Desk"),
        ("order_pending", "Lamp"),
    ]
    assert all(e["ts"] < ann["ts"] for e in ann["history"])
    assert (bob["history"], bob["orders"], bob["amount"]) == ([], 0, 0.0)
    template = Template.load("tau_retail")
    texts = template.sessions(storage.read_table(str(folder / "out/sessions")).sort_by("session_id"))
    assert texts[0] == "pending (Lamp); delivered (Lamp, Desk)"
    assert texts[2] == "no orders"


def test_nothing_of_a_task_but_its_user_reaches_features_or_prompt(folder: Path) -> None:
    def other(tasks: list[dict]) -> None:
        kinds = sorted(tau_retail.MEANS)
        for number, entry in enumerate(tasks):
            entry["instruction"] = f"Secret {number}: exchange the zeppelin of order #W1."
            entry["actions"] = [{"name": kinds[number], "kwargs": {"order_id": "#W1", "item_ids": ["zeppelin"]}}]
            entry["outputs"] = ["zeppelin"]

    prepared(folder)
    change(folder / "tasks_train.json", other)
    prepared(folder, "other")
    first, second = (
        storage.read_table(str(folder / name / "sessions")).sort_by("session_id") for name in ("out", "other")
    )
    assert first["clicks"] != second["clicks"]
    assert first.drop_columns("clicks").equals(second.drop_columns("clicks"))
    assert "query_text" not in first.column_names
    for spec in ("tau_retail", "tau_retail_status"):
        space = FeatureSpace.fit(FeatureSpec.load(spec), [first])
        assert "clicks" not in space.columns
        for name, values in space.transform(first).items():
            assert (values == space.transform(second)[name]).all()
    assert Template.load("tau_retail").sessions(first) == Template.load("tau_retail").sessions(second)
    assert "zeppelin" not in str(second.drop_columns("clicks").to_pylist())


def test_the_prepared_log_passes_ingest_and_both_specs(folder: Path) -> None:
    prepared(folder)
    out = folder / "out"
    for spec in ("tau_retail", "tau_retail_status"):
        summary = ingest(
            *(str(out / "sessions"), str(out / "intents.parquet"), str(out / "candidate_sets.parquet")),
            str(folder / spec),
            Roles(test_days=0),
            rounds=1,
            log=Log(source="tau_retail"),
            feature_columns=FeatureSpec.load(spec),
        )
        assert summary.kept == 4 and not summary.quarantined


def test_another_split_of_the_tasks_is_another_file(folder: Path) -> None:
    (folder / "tasks_test.json").write_text(json.dumps([task("bob_2", "cancel_pending_order")]))
    tau_retail.prepare(folder, TauRetail(tasks="tasks_test.json"), str(folder / "out"))
    (row,) = storage.read_table(str(folder / "out/sessions")).to_pylist()
    assert (row["session_id"], row["user_id"], sum(row["clicks"])) == ("tasks_test-0000", "bob_2", 1)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("users.json", ["users.json", "no such file", "log.uri"]),
        ("tasks_train.json", ["tasks_train.json", "no such file"]),
        ("../bitext/utterances.parquet", ["utterances.parquet", "log.tau_retail.utterances"]),
        ("../abcd/guidelines.json", ["guidelines.json", "log.tau_retail.guidelines"]),
    ],
)
def test_a_missing_file_is_named_with_the_way_out(folder: Path, file: str, words: list[str]) -> None:
    (folder / file).unlink()
    said = refusal(folder)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("tasks_train.json", lambda tasks: tasks[1].update(user_id="eve"), ["task 1", "'eve' is not in"]),
        ("tasks_train.json", lambda tasks: tasks[0].pop("user_id"), ["task 0", "user_id"]),
        ("tasks_train.json", lambda tasks: tasks[2].update(actions=["cancel"]), ["task 2", "actions"]),
        ("orders.json", lambda orders: orders.pop("#W2"), ["user 'ann_1'", "'#W2'"]),
        ("orders.json", lambda orders: orders["#W1"].pop("status"), ["user 'ann_1'", "'status'"]),
        ("../abcd/guidelines.json", lambda flows: flows.pop("Order Issue"), ["'Status Payment Method'", "ABCD"]),
    ],
)
def test_faulty_content_is_named(folder: Path, file: str, edit: Callable[[Any], None], words: list[str]) -> None:
    change(folder / file, edit)
    said = refusal(folder)
    assert all(word in said for word in words), said


def test_files_that_are_no_json_or_lack_an_intent_are_named(folder: Path) -> None:
    table = pq.read_table(folder / SETTINGS.utterances)
    pq.write_table(table.filter(pa.compute.not_equal(table["intent"], "cancel_order")), folder / SETTINGS.utterances)
    assert "lacks the intent 'cancel_order'" in refusal(folder)
    (folder / "orders.json").write_text("{")
    said = refusal(folder)
    assert "orders.json" in said and "not valid JSON" in said
    (folder / "users.json").write_text("[]")
    said = refusal(folder)
    assert "users.json" in said and "expected a JSON object" in said


def refusal(folder: Path) -> str:
    """What is said of a folder that cannot be read, in one line."""
    with pytest.raises(DataError) as error:
        tau_retail.prepare(folder, SETTINGS, str(folder / "out"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_test_period_is_refused_since_tasks_have_no_time() -> None:
    with pytest.raises(ConfigError, match=r"roles\.test_days must be 0"):
        load("tau_retail", ["roles.test_days=7"])
