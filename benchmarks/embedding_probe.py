"""Is the need in the embedding, and do the clicks teach it? Probes of what a comparison's rankers read.

    rgalign compare --run-dir runs/ladder --set compare.seeds=2
    python -m benchmarks.embedding_probe runs/ladder/seed_0 runs/ladder/seed_1

Multinomial logistic regression from e(x) to the intent, learned from the sessions of role rank: once with their true
needs as labels, once with what was clicked, which is all that a ranker has. Where the first is far above the second,
clicks are what is missing, not signal. The penalty is chosen by the log-loss of the same labels in role valid. Beside
them what needs no label: the cosine of e(x) and an intent's text, raw, and with the mean of the sessions of role rank,
or of the intents, taken off each. It needs scikit-learn, which the extra `test` brings.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from rgalign_ray import storage
from rgalign_ray.evaluate.statistics import Estimate, stratified_bootstrap
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.world.oracle import Oracle

ENCODERS = {
    "frozen reasoner": ("embeddings_0", "items"),
    "sentence encoder": ("embeddings_sentence", "items_sentence"),
}
"""Where their readings of sessions and intents lie."""
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Inverse strengths of the L2 penalty."""
K = 3


@dataclass(frozen=True)
class Labelled:
    """Sessions of one world: what teaches, what chooses the penalty, what is judged."""

    ids: list[str]
    users: list[str]
    role: np.ndarray
    need: np.ndarray
    """str [S]"""
    clicked: np.ndarray
    """str [S], the first clicked intent; empty where there is none."""
    intents: list[str]
    """All of the knowledge base."""

    @classmethod
    def load(cls, run_dir: str) -> Labelled:
        table = storage.read_table(storage.join(run_dir, "sessions", "sessions"))
        table = table.filter(pc.is_in(table["role"], pa.array(["rank", "valid", "test"])))
        catalogue = Catalogue.load(storage.join(run_dir, "sessions"))
        candidates = catalogue.candidates(table)
        clicks = catalogue.padded(table["clicks"], candidates)
        first = np.take_along_axis(candidates, clicks.argmax(axis=1)[:, None], axis=1)[:, 0]
        ids = table["session_id"].to_pylist()
        return cls(
            ids,
            table["user_id"].to_pylist(),
            np.array(table["role"].to_pylist()),
            np.array(Oracle.load(storage.join(run_dir, "log")).needs(ids)),
            np.where(clicks.any(axis=1), np.array(catalogue.ids)[first], ""),
            catalogue.ids,
        )


def probe(sessions: Labelled, vectors: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Whether each test session's need is among the first K, float64; and how many sessions taught it.

    Args:
        vectors: float [S, H].
        labels: str [S], empty where there is none.
    """
    known = labels != ""
    learns, chooses = ((sessions.role == role) & known for role in ("rank", "valid"))
    read = vectors.any(axis=1)  # `encode.unclicked: false` leaves some unread
    scaled = StandardScaler().fit(vectors[read & (sessions.role == "rank")]).transform(vectors)
    found: tuple[float, LogisticRegression] | None = None
    for penalty in PENALTIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=penalty, max_iter=300).fit(scaled[learns], labels[learns])
        seen = chooses & np.isin(labels, model.classes_)
        loss = log_loss(labels[seen], model.predict_proba(scaled[seen]), labels=model.classes_)
        if found is None or loss < found[0]:
            found = loss, model
    assert found is not None, "there is a penalty"
    model, test = found[1], sessions.role == "test"
    first = model.classes_[np.argsort(-model.decision_function(scaled[test]), axis=1)[:, :K]]
    return (first == sessions.need[test][:, None]).any(axis=1).astype(np.float64), int(learns.sum())


def zero_shot(
    sessions: Labelled, vectors: np.ndarray, found: np.ndarray, texts: Embeddings, *, centred: bool = False
) -> np.ndarray:
    """Whether each test session's need is among the K intents whose text is nearest to the session's, float64.

    Args:
        vectors: float [S, H].
        found: bool [S], sessions that were read.
        texts: the intents', by the same encoder.
        centred: take off the mean over the sessions read of role rank, and that over the intents.
    """
    told, test = texts.items(sessions.intents).astype(np.float64), sessions.role == "test"
    read = vectors.astype(np.float64)
    if centred:
        told, read = told - told.mean(axis=0), read - read[found & (sessions.role == "rank")].mean(axis=0)
    told /= np.linalg.norm(told, axis=1, keepdims=True)
    nearest = np.argsort(-(read[test] @ told.T), axis=1)[:, :K]  # a session's length changes no order
    return (np.array(sessions.intents)[nearest] == sessions.need[test][:, None]).any(axis=1).astype(np.float64)


def run(run_dirs: Annotated[list[str], typer.Argument(help="Folders of a comparison's seeds, on the shop.")]) -> None:
    table = Table(title=f"need among the first {K}, test sessions", title_justify="left")
    for column in ("embedding", "labels", "sessions that teach", f"need Recall@{K}", "95 % over users"):
        table.add_column(column)
    worlds = [Labelled.load(run_dir) for run_dir in run_dirs]
    users = [[user for user, role in zip(w.users, w.role, strict=True) if role == "test"] for w in worlds]
    for encoder, (sessions, intents) in ENCODERS.items():
        read = [Embeddings.load(storage.join(run_dir, sessions)) for run_dir in run_dirs]
        found = [e.lookup(session_keys(w.ids), "prompt") for e, w in zip(read, worlds, strict=True)]
        vectors = [v.astype(np.float32) for v, _ in found]
        texts = [Embeddings.load(storage.join(run_dir, intents)) for run_dir in run_dirs]
        ways = {
            name: [
                probe(w, v, np.where(there, getattr(w, name), ""))
                for w, v, (_, there) in zip(worlds, vectors, found, strict=True)
            ]
            for name in ("need", "clicked")
        }
        for way, centred in (("none: cosine", False), ("none: cosine, centred", True)):
            cosines = (zero_shot(w, *f, t, centred=centred) for w, f, t in zip(worlds, found, texts, strict=True))
            ways[way] = [(hits, 0) for hits in cosines]
        for labels, results in ways.items():
            hits = [hit for hit, _ in results]
            estimate: Estimate = stratified_bootstrap(hits, users, weights=[None] * len(hits))
            low, high = estimate.users
            taught = ", ".join(f"{count:,}" for _, count in results)
            table.add_row(encoder, labels, taught, f"{estimate.mean:.3f}", f"{low:.3f} to {high:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(run)
