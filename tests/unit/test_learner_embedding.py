"""Objectives of the embedding on the tiny model, in this process: each improves its own quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_data import INTENTS, REASONER, SESSIONS, WORDS, task, write_round

from rgalign_ray import config, storage
from rgalign_ray.errors import DataError
from rgalign_ray.learner import contrastive, embedding, frozen, gradient, latent, token_rows, training
from rgalign_ray.learner.contrastive import info_nce
from rgalign_ray.learner.engine import Host
from rgalign_ray.learner.frozen import FrozenRankers, Read
from rgalign_ray.ranker import losses, scoring
from rgalign_ray.ranker.qe_rec import QERec
from rgalign_ray.ranker.sizes import Sizes
from rgalign_ray.ranker.whitening import Moments
from rgalign_ray.reasoner import models
from rgalign_ray.reasoner.engine import Prompts
from rgalign_ray.reasoner.transformers_engine import TransformersEngine
from rgalign_ray.reward import functions


@pytest.fixture(autouse=True, scope="module")
def group_of_one() -> None:
    training.group_of_one()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("round")
    write_round(folder)
    return folder


@pytest.mark.parametrize(
    ("objective", "optimisation", "gain"),
    [
        (contrastive, config.Contrastive(lr=2e-2, epochs=12, batch_sessions=8), 0.2),
        (gradient, config.Gradient(lr=2e-2, epochs=12, batch_sessions=8), 0.5),
        (latent, config.Latent(lr=2e-2, epochs=12, batch_sessions=8), 0.5),
    ],
)
def test_each_objective_turns_embeddings_towards_what_was_clicked(
    folder: Path, tmp_path: Path, objective: ModuleType, optimisation: config.Embedding, gain: float
) -> None:
    figures = objective.train(task(folder, tmp_path / "out", optimisation), Host())
    measure = figures["accuracy" if objective is contrastive else "reward"]
    assert figures["sessions"] == SESSIONS and figures["steps"] == len(measure) == 48
    assert np.mean(measure[-4:]) > np.mean(measure[:4]) + gain
    if objective is not latent:  # whose loss is a stand-in that only its gradient gives a meaning
        assert np.mean(figures["loss"][-4:]) < np.mean(figures["loss"][:4]) - 0.3


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("pooling", "depth"), [("mean", 0.5), ("mean", 1.0), ("last", 1.0)])
def test_embeddings_are_read_where_rankers_read_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool, pooling: str, depth: float
) -> None:
    monkeypatch.setattr(token_rows, "pays", lambda *sizes: together)
    reasoner = REASONER.model_copy(update={"pooling": pooling, "depth": depth})
    model, engine = models.load_base(reasoner), TransformersEngine(reasoner, 64)
    rows = embedding.Rows(task(folder, tmp_path, config.Gradient(), reasoner=reasoner), config.Gradient(), model)
    reader = embedding.Reader(model, reasoner)
    batch = rows.micro_batch([0, 1, 2, 3], torch.device("cpu"))
    assert len({len(engine._ids(word)) for word in WORDS}) > 1, "words are of unlike lengths"
    assert len(batch.inputs["input_ids"]) == (1 if together else 4)
    with torch.inference_mode():
        found, text = (it.numpy() for it in reader(batch.inputs, batch.of, batch.places, batch.counts))
    assert not text.any(), "of text that is not asked for"
    prompts = Prompts("Q: ", WORDS, "\nA:")
    np.testing.assert_allclose(found[:, 0], engine.embed(prompts), atol=2e-3)
    queried = engine.embed(prompts, [ids or [] for ids in rows.table["completion_ids"].to_pylist()[:4]])
    np.testing.assert_allclose(found[1::2, 1], queried[1::2], atol=2e-3)  # the others have no query
    assert np.abs(found[1::2, 1] - found[1::2, 0]).max() > 0.1


@pytest.mark.parametrize("together", [True, False])
def test_what_the_text_costs_is_the_loss_of_the_selected_query(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(token_rows, "pays", lambda *sizes: together)
    settings, model = config.Gradient(text_weight=0.5), models.load_base(REASONER)
    rows = embedding.Rows(task(folder, tmp_path, settings), settings, model)
    chosen = [0, 1, 2, 5, -1]  # two of one word, with the same query
    batch = rows.micro_batch(chosen, torch.device("cpu"))
    nothing = rows.micro_batch([0, 2], torch.device("cpu")).text
    assert nothing is not None and [len(each) for each in nothing] == [0, 0, 0], "asked for, and there is none"
    with torch.inference_mode():
        embeddings, text = embedding.Reader(model, REASONER)(
            batch.inputs, batch.of, batch.places, batch.counts, batch.text
        )
    sessions = rows.table.to_pylist()
    for place, row in enumerate(chosen[:-1]):
        prompt, query = sessions[row]["prompt_ids"], sessions[row]["completion_ids"] or []
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + query])).logits.log_softmax(dim=-1)[0]
        said = [-float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(query)]
        assert float(text[place]) == pytest.approx(np.mean(said) if said else 0.0, rel=1e-4)
    assert batch.written.tolist() == [float(bool(sessions[row]["completion_ids"])) for row in chosen[:-1]] + [0.0]
    assert {0.0, 1.0} == set(batch.written.tolist()) and embeddings.shape[:2] == (5, 2)
    assert not batch.weight[-1].any() and batch.weight[:-1].any(dim=1).all()


def test_an_embedding_may_be_taught_with_its_text(folder: Path, tmp_path: Path) -> None:
    """Both are learned; the ranking gradient alone does not learn to write the selected query."""
    settings = config.Gradient(lr=2e-2, epochs=12, batch_sessions=8, text_weight=1.0)
    figures = gradient.train(task(folder, tmp_path / "out", settings), Host())
    assert np.mean(figures["reward"][-4:]) > np.mean(figures["reward"][:4]) + 0.5
    assert np.mean(figures["text_loss"][-4:]) < np.mean(figures["text_loss"][:4]) - 0.5
    alone = gradient.train(task(folder, tmp_path / "alone", settings.model_copy(update={"text_weight": 1e-9})), Host())
    assert figures["text_loss"][-1] < alone["text_loss"][-1] - 0.5


def test_the_latent_objective_estimates_the_gradient_of_its_reward(folder: Path, tmp_path: Path) -> None:
    """With many copies and little noise its gradient is that of the reward, which the gradient arm has exactly."""
    table = storage.read_table(str(folder / "data/positives/0.parquet"))
    exact = gradient.RankingLoss(task(folder, tmp_path, config.Gradient()), table)
    copies = config.Latent(copies=4096, noise=0.05)
    estimate = latent.NoisyCopies(task(folder, tmp_path, copies), table)
    centre = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, 32)).astype(np.float32))
    found = []
    for objective in (exact, estimate):
        embeddings = centre.clone().requires_grad_()
        loss, _ = objective(embeddings, [0, 1], 0)
        loss.sum().backward()
        assert embeddings.grad is not None
        found.append(embeddings.grad.flatten(1))
    assert torch.cosine_similarity(*found, dim=-1).min() > 0.95
    assert (found[1].norm(dim=-1) / found[0].norm(dim=-1)).tolist() == pytest.approx([1.0, 1.0], abs=0.15)


def test_a_session_without_what_the_reward_asks_for_teaches_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one without a resolved click, where the reward asks for those alone: its reward is not a number."""
    table = storage.read_table(str(folder / "data/positives/0.parquet"))
    objective = latent.NoisyCopies(task(folder, tmp_path, config.Latent()), table)
    known = objective.rankers.rewards

    def rewards(read: Read, rows: Sequence[int]) -> torch.Tensor:
        return known(read, rows).index_fill(0, torch.tensor([0]), torch.nan)

    monkeypatch.setattr(objective.rankers, "rewards", rewards)
    centre = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, 32)).astype(np.float32)).requires_grad_()
    loss, measure = objective(centre, [0, 1], 0)
    loss.sum().backward()
    assert centre.grad is not None and measure.isfinite().all()
    assert not centre.grad[0].any() and centre.grad[1].any() and centre.grad.isfinite().all()


def test_noise_is_drawn_by_session_and_step(folder: Path, tmp_path: Path) -> None:
    table = storage.read_table(str(folder / "data/positives/0.parquet"))
    objective = latent.NoisyCopies(task(folder, tmp_path, config.Latent()), table)
    centre = torch.zeros(2, 1, 1, 4)
    noise = objective._noise([3, 5], 7, centre)
    assert noise.shape == (2, 1, 8, 4)
    torch.testing.assert_close(objective._noise([5, 3], 7, centre), noise.flip(0))
    assert not torch.equal(objective._noise([3, 5], 8, centre), noise)


def test_the_gradient_arm_asks_for_the_reward_of_the_rollouts(folder: Path, tmp_path: Path) -> None:
    """Its log-probability is the `logprob` reward."""
    ranker = FrozenRankers(task(folder, tmp_path, config.Gradient()))
    rows = np.arange(3)
    part = ranker.part(rows)
    exists = part.batch["candidates"] >= 0
    exists[0, 8:] = False  # padding, also where something was clicked
    scores = torch.randn(3, 5, len(INTENTS), generator=torch.Generator().manual_seed(0))
    clicks = part.labels.clicks
    clicked = (clicks & exists.numpy()).any(axis=1)
    expected = functions.logprob(scores.numpy(), clicks, exists.numpy())
    found = losses.log_probability(scores, torch.from_numpy(clicks)[:, None], exists[:, None]).numpy()
    assert found[clicked] == pytest.approx(expected[clicked], rel=1e-5)


@pytest.mark.parametrize("by", ["log", "click"])
def test_what_was_not_shown_is_no_rival_of_a_click_where_rankers_rank_by_clicks(
    folder: Path, tmp_path: Path, by: config.RankBy
) -> None:
    sessions = storage.read_table(str(folder / "sessions.parquet"))
    shown = [[click or place < 2 for place, click in enumerate(row)] for row in sessions["clicks"].to_pylist()]
    few = sessions.set_column(sessions.schema.get_field_index("shown"), "shown", pa.array(shown))
    storage.write_table(str(tmp_path / "sessions.parquet"), few)
    work = task(folder, tmp_path, config.Gradient())
    assert work.pair is not None
    reward = config.Reward(rank_by=by)
    pair = replace(work.pair, sessions=str(tmp_path / "sessions.parquet"), reward=reward)
    objective = gradient.RankingLoss(
        replace(work, pair=pair), storage.read_table(str(folder / "data/positives/0.parquet"))
    )
    rows, null = [0, 1, 2, 3], torch.zeros(4, 2, dtype=torch.bool)
    embeddings = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0))

    def read(ranker: QERec) -> torch.Tensor:
        return ranker.queries(embeddings, null)

    (scores,) = objective.rankers.scores(read, objective.rankers.part(rows).batch)
    among = np.array(shown[:4]) if by == "click" else np.ones((4, len(INTENTS)), bool)
    expected = functions.logprob(scores.numpy(), np.array(few["clicks"].to_pylist()[:4]), among)
    assert objective(embeddings, rows, 0)[1].numpy() == pytest.approx(expected, rel=1e-4)
    assert objective.rankers.rewards(read, rows).numpy() == pytest.approx(expected, rel=1e-4)


def test_a_session_with_few_candidates_costs_few_and_is_judged_as_beside_others(folder: Path, tmp_path: Path) -> None:
    table = storage.read_table(str(folder / "sessions.parquet"))
    columns = ("candidates", "shown", "clicks", "resolved")
    lists = {name: table[name].to_pylist() for name in columns}
    kept = [place for place, click in enumerate(lists["clicks"][0]) if click or place < 4]
    for name in columns:
        lists[name][0] = [lists[name][0][place] for place in kept]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(lists[name]))
    storage.write_table(str(tmp_path / "sessions.parquet"), table)
    work = task(folder, tmp_path, config.Gradient())
    assert work.pair is not None
    rankers = FrozenRankers(replace(work, pair=replace(work.pair, sessions=str(tmp_path / "sessions.parquet"))))
    assert rankers.part([0]).batch["candidates"].shape == (1, len(kept))
    assert rankers.part([0, 1]).batch["candidates"].shape == (2, len(INTENTS))
    embeddings, is_null = torch.randn(2, 3, 32), torch.zeros(2, 3, dtype=torch.bool)
    both = rankers.rewards(lambda ranker: ranker.queries(embeddings, is_null), [0, 1])
    alone = rankers.rewards(lambda ranker: ranker.queries(embeddings[:1], is_null[:1]), [0])
    torch.testing.assert_close(both[:1], alone)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_gradient_arm_asks_for_resolved_clicks_as_the_reward_does(
    folder: Path, tmp_path: Path, weight: float
) -> None:
    work = task(folder, tmp_path, config.Gradient())
    assert work.pair is not None
    pair = replace(work.pair, reward=config.Reward(resolved_weight=weight))
    objective = gradient.RankingLoss(
        replace(work, pair=pair), storage.read_table(str(folder / "data/positives/0.parquet"))
    )
    embeddings = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0))
    rows = [0, 1, 2, 3]  # every other one's click resolved the need
    _, reward = objective(embeddings, rows, 0)
    null = torch.zeros(4, 2, dtype=torch.bool)
    expected = objective.rankers.rewards(lambda ranker: ranker.queries(embeddings, null), rows).nan_to_num()
    torch.testing.assert_close(reward, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "optimisation"),
    [
        (contrastive.Contrast, config.Contrastive()),
        (gradient.RankingLoss, config.Gradient()),
        (latent.NoisyCopies, config.Latent()),
    ],
)
def test_several_rankers_are_one_judge(
    folder: Path, tmp_path: Path, objective: type[embedding.Objective], optimisation: config.Embedding
) -> None:
    """What is asked for is the mean of what each asks for."""
    first, other = str(folder / "ranker"), str(tmp_path / "other")
    loaded = scoring.load(first)
    assert isinstance(loaded.model, QERec)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weights in loaded.model.parameters():
            weights += 0.2 * torch.randn_like(weights)
    scoring.save(loaded.model, other, loaded.meta)
    work = task(folder, tmp_path, optimisation)
    table = storage.read_table(str(folder / "data/positives/0.parquet"))
    embeddings = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for rankers in ((first,), (other,), (first, other)):
        assert work.pair is not None
        asked = objective(replace(work, pair=replace(work.pair, rankers=rankers)), table)
        found.append(torch.stack(asked(embeddings, [0, 1, 2, 3], 0)))
    one, another, both = found
    assert not torch.allclose(one, another, rtol=1e-2)
    torch.testing.assert_close(both, (one + another) / 2, rtol=1e-4, atol=1e-5)


def test_the_ranking_loss_may_go_through_the_match_of_texts_alone(folder: Path, tmp_path: Path) -> None:
    table = storage.read_table(str(folder / "data/positives/0.parquet"))
    through_match = config.Gradient(through="match")
    with pytest.raises(DataError, match=r"^gradient\.through: the ranker compares no texts; set it to all, or ranker"):
        gradient.RankingLoss(task(folder, tmp_path, through_match), table)
    loaded, draw = scoring.load(str(folder / "ranker")), np.random.default_rng(0)
    settings, sizes = loaded.meta.settings.changed({"text_match": True}), loaded.meta.sizes | {"match_dim": 8}
    ranker = QERec(Sizes(**sizes), settings)
    assert ranker.match is not None
    for tensor in ranker.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.4)
    prompt = Moments.of(draw.normal(size=(50, 32)))
    ranker.match.fit(draw.normal(size=(len(INTENTS), 32)), prompt, prompt)
    meta = loaded.meta.model_copy(update={"settings": settings, "sizes": sizes})
    scoring.save(ranker, str(tmp_path / "ranker"), meta)
    moved = []
    for optimisation in (config.Gradient(), through_match):
        work = task(folder, tmp_path, optimisation)
        assert work.pair is not None
        asked = gradient.RankingLoss(replace(work, pair=replace(work.pair, rankers=(str(tmp_path / "ranker"),))), table)
        embeddings = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss, _ = asked(embeddings, [0, 1, 2, 3], 0)
        loss.sum().backward()
        moved.append((loss.detach(), embeddings.grad))
        (model,) = asked.rankers.models
        assert model.match is not None
        model.match.gate.zero_()  # then nothing is left to go through but the towers
        again = embeddings.detach().requires_grad_()
        asked(again, [0, 1, 2, 3], 0)[0].sum().backward()
        assert again.grad is not None and bool(again.grad.abs().max() > 1e-4) == (optimisation.through == "all")
    torch.testing.assert_close(moved[0][0], moved[1][0])
    assert not torch.allclose(moved[0][1], moved[1][1], rtol=1e-2)


def test_rankers_are_asked_as_the_reward_says(folder: Path, tmp_path: Path) -> None:
    """These compare no texts: towers are all that there is, and as rankers rank they weigh less."""
    loaded = scoring.load(str(folder / "ranker"))
    loaded.model.shown_weight.fill_(0.3)
    scoring.save(loaded.model, str(tmp_path / "ranker"), loaded.meta)
    work, found = task(folder, tmp_path, config.Gradient()), []
    assert work.pair is not None
    embeddings, is_null = torch.randn(4, 2, 32), torch.zeros(4, 2, dtype=torch.bool)

    def read(ranker: QERec) -> torch.Tensor:
        return ranker.queries(embeddings, is_null)

    by: config.RankBy
    for by in ("log", "click"):
        reward = config.Reward(rank_by=by)
        asked = replace(work, pair=replace(work.pair, rankers=(str(tmp_path / "ranker"),), reward=reward))
        both = FrozenRankers(asked)
        (scores,) = both.scores(read, both.part([0, 1, 2, 3]).batch)
        (ranker,) = frozen.rankers(asked)
        found.append((scores, ranker.query_logits(read(ranker))))
    (log, log_of_all), (click, click_of_all) = found
    torch.testing.assert_close(click, 0.3 * log)
    torch.testing.assert_close(click_of_all, log_of_all, msg="RG-CL asks of the whole knowledge base, as was learned")


@given(seed=st.integers(0, 2**32), width=st.integers(3, 12))
@settings(max_examples=40, deadline=None)
def test_info_nce_equals_a_naive_reference(seed: int, width: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(5, width)) * 3
    positives = random.random((5, width)) < 0.3
    positives[:, 0] = True
    positives[:, -1] = False
    loss, correct = info_nce(torch.from_numpy(logits), torch.from_numpy(positives))
    for row, marks, value, share in zip(logits, positives, loss.tolist(), correct.tolist(), strict=True):
        terms = [-np.log(np.exp(row[i]) / (np.exp(row[i]) + np.exp(row[~marks]).sum())) for i in np.flatnonzero(marks)]
        assert value == pytest.approx(np.mean(terms), rel=1e-9)
        assert share == pytest.approx(np.mean(row[marks] > row[~marks].max()))


def test_a_batch_is_a_function_of_step_and_rank_and_each_session_comes_once_an_epoch() -> None:
    learner = config.Learner(workers=2, micro_batch=2)
    work = task(Path("."), Path("."), config.Contrastive(batch_sessions=8), learner=learner)
    batches = embedding.Rows.__new__(embedding.Rows)
    batches.table = pa.table({"session_id": [f"s{i}" for i in range(19)]})
    for epoch in (0, 1):
        seen = [
            row
            for step in range(3)
            for micro in range(work.micro_steps)
            for rank in (0, 1)
            for row in batches.batch(epoch * 3 + step, micro, work, rank)
        ]
        assert sorted(row for row in seen if row >= 0) == list(range(19))
        assert seen.count(-1) == 24 - 19
