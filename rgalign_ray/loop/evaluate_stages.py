"""The last stage: every ranker of the run on the same test sessions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from rgalign_ray import storage
from rgalign_ray.config import Config
from rgalign_ray.evaluate import metric_names
from rgalign_ray.evaluate.diagnosis import diagnose
from rgalign_ray.evaluate.examples import example_sessions
from rgalign_ray.evaluate.hit_rate import hit_rate_sessions, hits, vectors
from rgalign_ray.evaluate.ladder import Rung, SessionMetrics, TestSessions, compare, table_rows
from rgalign_ray.evaluate.report import Comparison, Diagnosis, Estimate, Example
from rgalign_ray.evaluate.statistics import paired_bootstrap
from rgalign_ray.hashing import session_keys
from rgalign_ray.logs.prompts import Template
from rgalign_ray.loop import rank_stages
from rgalign_ray.loop.readers import sentence_engine
from rgalign_ray.loop.stage import Outcome, Run, Stage, truth_inputs
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.rollout.encode import written_queries

TOP_SHOWN = 3
NO_QUERY = "(no valid query)"
ALIGNED = "RGAlign-Rec"
TRAINED_ON = "QE-Rec trained on"

Queries = dict[int, dict[str, str]]
"""By round, the valid latent query of each session that has one."""


def stages(config: Config) -> list[Stage]:
    inputs = ["sessions", "features"]
    inputs += [f"{kind}_{r}" for r in range(config.rounds + 1) for kind in ("embeddings", "rankers")]
    inputs += [f"rewards_{r}" for r in range(1, config.rounds + 1)]
    inputs += [stage.name for stage in rank_stages.control_stages(config, config.rounds)]
    inputs += truth_inputs(config)
    return [
        Stage(
            "evaluation",
            "judge every ranker on the test sessions",
            evaluate,
            ("evaluate", *rank_stages.SENTENCE_READER),
            tuple(inputs),
        ),
    ]


def rungs(run: Run) -> tuple[list[Rung], list[Rung]]:
    """The ladder, each rung against the one before; and the controls."""
    last = run.config.rounds
    embeddings = [run.uri(f"embeddings_{r}") for r in range(last + 1)]
    rankers = [partial(run.uri, f"rankers_{r}") for r in range(last + 1)]
    ladder = [Rung(name.replace("_", "-"), rankers[0](name)) for name in run.config.baselines]
    ladder.append(Rung("QE-Rec", rankers[0]("qe_rec"), embeddings[0], note="frozen reasoner"))
    for r in range(1, last + 1):
        name = ALIGNED if r == last else f"{ALIGNED}, round {r}"
        begun = "trained on if validation prefers that" if rank_stages.is_warm(run.config, r) else "trained anew"
        note = f"aligned reasoner, {begun}" + (f", round {r}" if last > 1 else "")
        ladder.append(Rung(name, rankers[r]("qe_rec"), embeddings[r], note=note))
    trained = "trained and tested with queries shuffled across users"
    mean = "every session reads the mean query vector"
    controls = [
        Rung("base rate", rankers[0]("qe_rec"), prior=True, control=True, note="each intent's share of clicks"),
        Rung("QE-Rec shuffled", rankers[0]("shuffled"), embeddings[0], "shuffled", control=True, note=trained),
        Rung("RGAlign shuffled", rankers[last]("shuffled"), embeddings[last], "shuffled", control=True, note=trained),
        Rung("RGAlign mean query", rankers[last]("qe_rec"), embeddings[last], "mean", control=True, note=mean),
    ]
    for stage in rank_stages.control_stages(run.config, last):
        on = "trained on likewise, with the frozen reasoner"
        controls.append(Rung(TRAINED_ON, run.uri(stage.name, "qe_rec"), embeddings[0], control=True, note=on))
    return ladder, controls


def evaluate(run: Run, out: str) -> Outcome:
    """Writes `evaluation.json`: rows, comparisons, query variance and examples, as the report's parts."""
    settings = run.config.evaluate
    test = TestSessions(run.uri("sessions"), run.truth, settings)
    ladder, controls = rungs(run)
    judged = {rung.name: test.judge(test.score(rung)) for rung in [*ladder, *controls]}
    rows = table_rows([*ladder, *controls], list(judged.values()), test.users, settings)
    named = {rung.name: rung for rung in [*ladder, *controls]}
    pairs = [*zip(ladder[1:], ladder[:-1], strict=True)]
    if run.config.rounds > 1:
        pairs.append((named[ALIGNED], named["QE-Rec"]))
    pairs += [(named["QE-Rec"], named["QE-Rec shuffled"]), (named[ALIGNED], named["RGAlign shuffled"])]
    if TRAINED_ON in named:
        pairs.append((named[ALIGNED], named[TRAINED_ON]))
    comparisons = []
    for better, worse in pairs:
        comparisons += compare(better, worse, judged[better.name], judged[worse.name], test.users, settings)
    queries = {r: written_queries(run.uri(f"embeddings_{r}")) for r in range(run.config.rounds + 1)}
    comparisons += _hit_rate(run, test, queries)
    evaluation = {
        "rows": [row.model_dump() for row in rows],
        "comparisons": [comparison.model_dump() for comparison in comparisons],
        "query_variance": {rung.name: test.between_session_variance(rung) for rung in ladder if rung.embeddings},
        "diagnoses": [
            diagnosis_of(run, r, test, rung, judged[rung.name], f"Round {r}").model_dump()
            for r, rung in enumerate(ladder[-run.config.rounds :], 1)
        ],
        "examples": [example.model_dump() for example in _examples(run, test, judged, queries)],
    }
    storage.write_json(storage.join(out, "evaluation.json"), evaluation)
    return Outcome(
        {"test sessions": len(test.ids), "with a click": int(test.clicks.any(axis=1).sum())},
        {row.name: {metric: estimate.value for metric, estimate in row.metrics.items()} for row in rows},
    )


def diagnosis_of(run: Run, round_: int, test: TestSessions, rung: Rung, judged: SessionMetrics, name: str) -> Diagnosis:
    """Where a round's alignment is lost; `rung` is the ranker that was trained on it, and `judged` what it is worth."""
    keys = session_keys(test.ids)
    readings = [run.uri(f"embeddings_{r}") for r in (round_ - 1, round_)]
    wrote_before, wrote_after = (written_queries(uri) for uri in readings)
    before, after = (Embeddings.load(uri).lookup(keys, "prompt")[0] for uri in readings)
    gate = run.manifest(f"rewards_{round_}").figures["gate"]
    other = test.judge(test.score(replace(rung, query="shuffled")))
    metrics = [metric for metric in metric_names.meanings(run.config.evaluate) if metric in judged.values]
    metric = metric_names.telling(metrics)[-1]
    read = paired_bootstrap(
        judged.values[metric], other.values[metric], test.users, weights=judged.weights.get(metric), repetitions=1
    ).mean
    return diagnose(name, gate, (wrote_before, wrote_after), (before, after), (metric, read))


def _examples(run: Run, test: TestSessions, judged: dict[str, SessionMetrics], queries: Queries) -> list[Example]:
    place = {session: row for row, session in enumerate(test.ids)}
    chosen = [place[session] for session in example_sessions(run.uri("sessions"), run.truth, run.config.evaluate)]
    texts = Template.load(run.config.prompt.template).sessions(test.table.take(chosen))
    titles = test.catalogue.titles
    needs = test.needs()
    wanted = test.clicks if needs is None else needs
    first = {name: test.titles(judged[name].scores, TOP_SHOWN) for name in ("QE-Rec", ALIGNED)}
    return [
        Example(
            session=text,
            query_before=queries[0].get(test.ids[row], NO_QUERY),
            query_after=queries[run.config.rounds].get(test.ids[row], NO_QUERY),
            intents_before=first["QE-Rec"][row],
            intents_after=first[ALIGNED][row],
            wanted=[titles[intent] for intent in test.candidates[row][wanted[row]]],
            wanted_is="clicked" if needs is None else "true need",
        )
        for row, text in zip(chosen, texts, strict=True)
    ]


def _hit_rate(run: Run, test: TestSessions, queries: Queries) -> list[Comparison]:
    """Intent Hit Rate of the last reasoner against the frozen one's, on sessions where both wrote a valid query."""
    sessions = hit_rate_sessions(run.uri("sessions"), run.truth, run.config.evaluate)
    if not sessions:
        return []
    settings = run.config.evaluate
    template = Template.load(run.config.prompt.template)
    encoder = sentence_engine(run.config).start()

    def embed(texts: list[str]) -> np.ndarray:
        return encoder.embed(Prompts("", texts, ""))

    assert test.oracle is not None, "hit rate sessions are drawn where the truth is known"
    needs = [test.catalogue.index[need] for need in test.oracle.needs(sessions)]
    intents = vectors(template.items(test.catalogue.intents), embed)
    before, after = (hits([queries[r].get(i) for i in sessions], needs, intents, embed) for r in (0, run.config.rounds))
    both = ~np.isnan(before) & ~np.isnan(after)
    if not both.any():
        return []
    user_of = dict(zip(test.ids, test.users, strict=True))
    users = [user_of[session] for session, counts in zip(sessions, both, strict=True) if counts]
    gain = paired_bootstrap(
        after[both], before[both], users, repetitions=settings.bootstrap, confidence=settings.confidence
    )
    return [
        Comparison(
            better=f"aligned reasoner ({after[both].mean():.1%})",
            worse=f"frozen reasoner ({before[both].mean():.1%})",
            metric=f"Intent Hit Rate, {len(users)} queries",
            difference=Estimate(value=gain.mean, low=gain.users[0], high=gain.users[1]),
            separated=gain.separated,
        )
    ]
