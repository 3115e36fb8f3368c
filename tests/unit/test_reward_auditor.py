"""A second pair judges the same queries, by its own encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from test_reward_model import INTENTS, SESSIONS, N, place, random_ranker, sessions_table, unit

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.logs.catalogue import Catalogue
from rgalign_ray.logs.examples import examples
from rgalign_ray.logs.prompts import Template
from rgalign_ray.ranker import scoring
from rgalign_ray.ranker.batches import score_rows
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reward import functions
from rgalign_ray.reward.actor import RewardModel
from rgalign_ray.reward.auditor import Auditor, AuditorSpec
from rgalign_ray.reward.judging import judge_queries

__all__ = ["place"]  # a fixture

ENCODER = config.Compare().encoder
TEMPLATE = """
version: tiers
prefix: ""
session: "the tier is {{ tier }}"
suffix: ""
item: "{{ title }}"
"""


@pytest.fixture(scope="module")
def spec(place: Path) -> AuditorSpec:
    """An auditor of the log, whose ranker listens to every input."""
    judge = scoring.load(str(place / "a"))
    of = Sizes.of(judge.space, num_intents=len(INTENTS), embedding_dim=384, item_dim=0)
    for name, version in (("auditor", ENCODER.model), ("stranger", "another-encoder")):
        meta = scoring.meta_of(
            model := random_ranker(of, seed=9),
            space=judge.space.to_dict(),
            intent_ids=INTENTS,
            reasoner_version=version,
            seed=0,
            figures={},
        )
        scoring.save(model, str(place / name), meta)
    return AuditorSpec(str(place / "auditor"), ENCODER, 32, Template.model_validate(yaml.safe_load(TEMPLATE)))


def test_it_reads_query_and_session_and_judges_each_rollout(place: Path, spec: AuditorSpec, tmp_path: Path) -> None:
    *files, _ = unit(tmp_path, faults={("s2", 1): "loop"})
    model = RewardModel([[str(place / "a")], [str(place / "b")]], str(place / "log"), config.Reward(), spec)
    scored = model.score(sessions_table(), *files)
    plain = RewardModel([[str(place / "a")], [str(place / "b")]], str(place / "log"), config.Reward()).score(
        sessions_table(), *files
    )
    rest = [name for name in plain.column_names if name != "audit"]
    assert scored.select(rest).equals(plain.select(rest))
    assert plain["audit"].null_count == len(plain), "without an auditor nothing is audited"
    audit = scored["audit"].to_numpy().reshape(len(SESSIONS), N)
    assert np.isnan(audit[2, 1]) and np.isnan(audit[4]).all(), "a faulty query, and a session without a click"
    auditor = Auditor(spec)
    ids = sorted(SESSIONS)
    for row, sample in ((0, 0), (1, 2), (3, 1)):
        table = sessions_table([ids[row]])
        text = f"{ids[row]}/{sample} the tier is {table['tier'][0].as_py()}"
        vector = auditor.encoder.embed(Prompts("", [text], ""))
        batch = examples(table, auditor.ranker.space, Catalogue.load(str(place / "log")))
        rows = batch | {
            "prompt": vector,
            "query": vector,
            "has_prompt": np.ones(1, bool),
            "has_query": np.ones(1, bool),
        }
        rows["valid"] = np.zeros(1, bool)
        del rows["session_id"]
        scores = score_rows(auditor.ranker.model, rows, "query")[:, None]
        expected = functions.logprob(scores, batch["clicks"], batch["candidates"] >= 0)[0, 0]
        assert audit[row, sample] == pytest.approx(expected, abs=2e-2), "float16 vectors, padded differently"


def test_a_ranker_of_another_encoder_is_refused(place: Path, spec: AuditorSpec) -> None:
    with pytest.raises(DataError, match="another-encoder"):
        Auditor(AuditorSpec(str(place / "stranger"), ENCODER, 32, spec.template))


def test_sessions_are_judged_in_slices(place: Path, spec: AuditorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue, asked = Catalogue.load(str(place / "log")), Auditor(spec)
    queries = [f"{session}/{sample}" for session in sorted(SESSIONS) for sample in range(N)]
    table = sessions_table(sorted(SESSIONS))
    whole = asked.rewards(table, queries, catalogue, config.Reward())
    monkeypatch.setattr("rgalign_ray.reward.auditor.BATCH", 2)
    np.testing.assert_allclose(asked.rewards(table, queries, catalogue, config.Reward()), whole, atol=1e-4)
    assert whole.shape == (len(SESSIONS), N)


def test_it_judges_by_the_clicks_that_the_reward_does_not_read(place: Path, spec: AuditorSpec) -> None:
    catalogue, auditor = Catalogue.load(str(place / "log")), Auditor(spec)
    table = sessions_table(sorted(SESSIONS))
    clicks = [[number < 2 for number in range(len(row))] for row in table["clicks"].to_pylist()]
    table = table.set_column(table.column_names.index("clicks"), "clicks", pa.array(clicks))
    queries = [f"{session}/{sample}" for session in sorted(SESSIONS) for sample in range(N)]
    arrays, read = examples(table, auditor.ranker.space, catalogue), auditor.embeddings(table, queries)
    mine, other = functions.halves(arrays["clicks"], arrays["candidates"], arrays["session_key"])
    by_mine, by_other = (
        judge_queries(auditor.ranker, arrays, functions.Labels(half, None), read, config.Reward())[0]
        for half in (mine, other)
    )
    found = auditor.rewards(table, queries, catalogue, config.Reward(halves=True))
    np.testing.assert_allclose(found, by_other)
    assert np.abs(by_mine - by_other).max() > 0.01
