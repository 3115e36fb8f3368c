"""τ-bench retail (Yao et al. 2024, "τ-bench: A Benchmark for Tool-Agent-User Interaction in Real-World Domains") as
a log: what did this shopper come for, given the orders of an account?

    users.json, orders.json ──▶ features, history        what the shop knew before the task
    tasks file ──▶ user; the kinds of its actions ──▶ clicks        nothing else of a task is read
    Bitext's utterances, ABCD's guidelines ──▶ the knowledge base, all of it candidates in every session

It is a check that the pipeline takes another schema, not a benchmark: a few hundred tasks, drawn largely at
random given the orders' status, so a logistic regression on that status is about all there is to reach.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rgalign_ray import schema, storage
from rgalign_ray.config import TauRetail
from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import CANDIDATE_SETS_FILE, INTENTS_FILE
from rgalign_ray.logs.partitions import PartitionWriter

USERS, ORDERS = "users.json", "orders.json"

MEANS = {
    "cancel_pending_order": "cancel_order",
    "modify_pending_order_items": "change_order",
    "modify_pending_order_address": "change_shipping_address",
    "modify_pending_order_payment": "status_payment_method",
    "return_delivered_order_items": "return",
    "exchange_delivered_order_items": "exchange",
}
"""The intent that each kind of action means; a task's other actions (look-ups, sums) mean none."""

SUBFLOWS = {
    "Product Defect": ["Initiate Refund", "Update Refund", "Refund Status", "Return"],
    "Order Issue": ["Status Payment Method"],
}
"""ABCD's sub-flows that join the knowledge base, by flow. 'Return' stands for all that begin with 'Return Due to':
the guidelines resolve them alike, and a task does not say why an item goes back."""

EXCHANGE = {
    "intent_id": "exchange",
    "title": "Exchange",
    "description": "Swap a delivered item for another size, colour or model.",
    "category": "Product Defect",
}
"""Neither source has an intent for an exchange, which is every fourth task."""

UNPLAIN = frozenset("QWZ")
"""Bitext's tags of colloquial, offensive and misspelt utterances."""

ENTRY = datetime(2024, 5, 15)
"""The tasks have no time: all sessions enter at this moment, and each order counts as a day older than the next."""
REGION = "all"
ALL = "all"
"""The one candidate set."""
STATUSES = ("pending", "processed", "delivered", "cancelled")

SESSIONS = pa.schema(
    [
        *schema.SESSIONS,
        ("candidate_set", pa.string()),
        *((f"orders_{status}", pa.int32()) for status in STATUSES),
        ("orders", pa.int32()),
        ("items", pa.int32()),
        ("amount", pa.float32()),
        ("state", pa.string()),
        ("payment_methods", pa.list_(pa.string())),
        ("products", pa.list_(pa.string())),
    ]
)
"""amount, in dollars, and products are those of all orders, products the newest first and each once."""

Json = dict[str, Any]


def prepare(folder: str | Path, settings: TauRetail, out_uri: str) -> dict[str, int]:
    """Writes a folder of τ-bench retail as a prepared log and returns its counts.

    Args:
        folder: holds users.json and orders.json.
        settings: the other files; relative paths start from `folder`.

    Raises:
        DataError: when a file is missing or is not what it should be, or a task's user or a user's order is unknown.
    """
    folder = Path(folder).expanduser()
    users, orders = _objects(folder / USERS), _objects(folder / ORDERS)
    path = folder / settings.tasks
    tasks = _json(path, list)
    intents = knowledge_base(folder / settings.utterances, folder / settings.guidelines)
    ids = [intent["intent_id"] for intent in intents]
    counts: Counter[str] = Counter(users=len(users), orders=len(orders), intents=len(ids), sessions=0, clicks=0)
    sessions = []
    for number, task in enumerate(tasks):
        where = f"{path}: task {number} (from 0)"
        user_id, meant = _user(task, where), _meant(task, where)
        if user_id not in users:
            raise DataError(f"{where}: user '{user_id}' is not in {folder / USERS}.")
        clicks = [intent in meant for intent in ids]
        counts.update(sessions=1, clicks=sum(clicks), without_click=not any(clicks))
        sessions.append(
            {
                "session_id": f"{path.stem}-{number:04d}",
                "user_id": user_id,
                "ts": ENTRY,
                "region": REGION,
                "candidate_set": ALL,
                "shown": [True] * len(ids),
                "clicks": clicks,
                **_account(users[user_id], orders, f"{folder / USERS}: user '{user_id}'"),
            }
        )
    writer = PartitionWriter(storage.join(out_uri, "sessions"))
    writer.write(pa.Table.from_pylist(sessions, schema=SESSIONS))
    writer.close()
    storage.write_table(storage.join(out_uri, INTENTS_FILE), pa.Table.from_pylist(intents, schema=schema.INTENTS))
    sets = pa.Table.from_pylist([{"candidate_set": ALL, "intents": ids}], schema=schema.CANDIDATE_SETS)
    storage.write_table(storage.join(out_uri, CANDIDATE_SETS_FILE), sets)
    return dict(counts)


def knowledge_base(utterances: Path, guidelines: Path) -> list[dict[str, str]]:
    """Rows of the `intents` table, sorted by id: Bitext's intents, `SUBFLOWS` of ABCD, and `EXCHANGE`.

    A Bitext intent is described by its shortest plain utterance, an ABCD sub-flow by what is said of its flow.
    """
    intents = [*_bitext(utterances), *_abcd(guidelines), EXCHANGE]
    known = [intent["intent_id"] for intent in intents]
    for meaning in MEANS.values():
        if meaning not in known:
            raise DataError(f"{utterances}, {guidelines}: the knowledge base lacks the intent '{meaning}'.")
    return sorted(intents, key=lambda intent: intent["intent_id"])


def _bitext(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; set log.tau_retail.utterances to Bitext's utterances as Parquet.")
    columns = pa.schema([(name, pa.string()) for name in ("instruction", "intent", "category", "tags")])
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({' '.join(str(error).split())}).") from None
    schema.check(table.schema, columns, str(path), extra=True)
    shortest: dict[str, Json] = {}
    for row in sorted(table.select(columns.names).to_pylist(), key=lambda row: (len(row["instruction"]), str(row))):
        if not UNPLAIN & set(row["tags"]):
            shortest.setdefault(row["intent"], row)
    return [
        {
            "intent_id": intent,
            "title": intent.replace("_", " ").capitalize(),
            "description": f"For instance: {row['instruction'].strip()}.",
            "category": row["category"].replace("_", " ").capitalize(),
        }
        for intent, row in shortest.items()
    ]


def _abcd(path: Path) -> list[dict[str, str]]:
    flows = _objects(path, "; set log.tau_retail.guidelines to ABCD's guidelines")
    intents = []
    for flow, names in SUBFLOWS.items():
        known = flows.get(flow, {}).get("subflows", {})
        for name in names:
            reasons = [reason.lower() for title, due, reason in map(_parted, known) if due and title == name]
            if name not in known and not reasons:
                raise DataError(f"{path}: sub-flow '{name}' of '{flow}' is missing; expected ABCD's guidelines.")
            about = str(flows[flow].get("description", flow)).capitalize()
            intents.append(
                {
                    "intent_id": name.lower().replace(" ", "_"),
                    "title": name.capitalize(),
                    "description": f"{about}, due to {', '.join(reasons)}." if reasons else f"{about}.",
                    "category": flow,
                }
            )
    return intents


def _parted(subflow: str) -> tuple[str, str, str]:
    return subflow.partition(" Due to ")


def _user(task: Any, where: str) -> str:
    if not isinstance(task, dict) or not isinstance(task.get("user_id"), str):
        raise DataError(f"{where}: expected an object with a user_id.")
    return task["user_id"]


def _meant(task: Json, where: str) -> set[str]:
    """The intents that the task's actions mean: the only thing of a task, besides its user, that is read."""
    try:
        return {MEANS[action["name"]] for action in task["actions"] if action["name"] in MEANS}
    except (KeyError, TypeError):
        raise DataError(f"{where}: expected a list of actions, each with a name.") from None


def _account(user: Json, orders: Json, where: str) -> Json:
    """History and features of an account."""
    try:
        placed = [(orders[order]["status"], orders[order]["items"]) for order in user["orders"]]
        products = [item["name"] for _, items in reversed(placed) for item in items]
        methods = {method["source"] for method in user["payment_methods"].values()}
        amount = sum(item["price"] for _, items in placed for item in items)
        state = user["address"]["state"]
        texts = [", ".join(item["name"] for item in items) for _, items in placed]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: the account or one of its orders lacks {error}.") from None
    age = [timedelta(days=len(placed) - place) for place in range(len(placed))]
    return {
        "history": [
            {"event": f"order_{status}", "text": text, "ts": ENTRY - days}
            for (status, _), text, days in zip(placed, texts, age, strict=True)
        ],
        **{f"orders_{status}": sum(found == status for found, _ in placed) for status in STATUSES},
        "orders": len(placed),
        "items": len(products),
        "amount": amount,
        "state": state,
        "payment_methods": sorted(methods),
        "products": list(dict.fromkeys(products)),
    }


def _objects(path: Path, way_out: str = "") -> Json:
    return _json(path, dict, way_out)


def _json(path: Path, kind: type, way_out: str = "") -> Any:
    if not path.is_file():
        raise DataError(f"{path}: no such file{way_out or '; expected a folder of τ-bench retail (log.uri)'}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(data, kind):
        raise DataError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}.")
    return data
