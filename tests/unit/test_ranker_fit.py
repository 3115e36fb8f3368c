"""Training without Ray: what is learned, what is exact, what is refused."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from ranker_data import rows, shuffle_embeddings, sizes

from rgalign_ray import config
from rgalign_ray.errors import DataError
from rgalign_ray.evaluate.statistics import paired_bootstrap
from rgalign_ray.metrics import group_auc
from rgalign_ray.ranker import batches, losses
from rgalign_ray.ranker import fit as fitting
from rgalign_ray.ranker.batches import to_batch
from rgalign_ray.ranker.fit import Fit
from rgalign_ray.ranker.group import Group, pack, unpack
from rgalign_ray.ranker.rows import FOLD, LISTS, from_tables, reading, to_table

SIZES = sizes()
SETTINGS = config.Ranker(dim=16, heads=2, epochs=8, patience=8, batch_sessions=32, whitened_dim=12, lr=5e-3)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _fit(data: dict, kind: str = "qe_rec", settings: config.Ranker = SETTINGS, items: np.ndarray | None = None) -> Fit:
    item_dim = 0 if items is None else 6
    return Fit(kind, sizes(item_dim=item_dim), settings, data, items, seed=1, group=Group())


def test_qe_rec_reads_the_embedding_and_the_shuffled_control_cannot() -> None:
    data = rows(SIZES, 400)
    true, shuffled = _fit(data).run(), _fit(shuffle_embeddings(data)).run()
    assert true["best_gauc"] > 0.9
    assert true["best_gauc"] > shuffled["best_gauc"] + 0.05
    by_readout = true["gauc_by_readout"]
    assert by_readout["prompt"] > by_readout["null"] + 0.05
    assert true["gate"] > 0.01


def _warm(start: Fit, data: dict, margin: float = 0.0, **changes: object) -> Fit:
    settings, weights = SETTINGS.model_copy(update=changes), start.model.state_dict()
    return Fit("qe_rec", SIZES, settings, data, None, seed=2, group=Group(), start=weights, margin=margin)


def test_a_warm_start_goes_on_where_the_ranker_before_stopped() -> None:
    data = rows(SIZES, 400)
    start = _fit(data)
    anew = start.run()
    on = _warm(start, data, epochs=2)
    assert on.validation_gauc("prompt") == anew["best_gauc"]
    figures = on.run()
    assert figures["losses"][0] < anew["losses"][1] < anew["losses"][0]
    assert figures["best_gauc"] >= anew["best_gauc"]


def test_a_warm_start_keeps_the_ranker_that_no_epoch_betters() -> None:
    data = rows(SIZES, 400)
    start = _fit(data)
    start.run()
    spoilt = _warm(start, data, epochs=2, lr=10.0)
    figures = spoilt.run()
    assert figures["best_epoch"] == 0 and figures["gaucs"][0] < figures["best_gauc"]
    assert _equal(spoilt, start)


@pytest.mark.parametrize("match_dim", [0, 6])
def test_a_warm_start_does_not_hear_what_another_reasoner_says_of_every_session(match_dim: int) -> None:
    data, read = rows(SIZES, 200), sizes(match_dim=match_dim)
    items = np.random.default_rng(0).normal(size=(read.num_intents, read.embedding_dim)) if match_dim else None
    start = Fit("qe_rec", read, SETTINGS.changed({"epochs": 2}), data, items, seed=1, group=Group())
    start.run()
    weights, before = start.model.state_dict(), _scores(start)
    way = np.linspace(-2.0, 2.0, read.embedding_dim)
    moved = data | {name: (data[name] + way).astype(np.float32) for name in ("prompt", "query")}
    on = Fit("qe_rec", read, SETTINGS, moved, items, seed=2, group=Group(), start=weights, margin=np.inf)
    np.testing.assert_allclose(_scores(on), before, atol=0.01)
    on.run()
    np.testing.assert_allclose(_scores(on), before, atol=0.01, err_msg="the start, which it goes back to, is centred")
    on.model.load_state_dict(weights)
    assert np.abs(_scores(on) - before).max() > 0.1


def _scores(fit: Fit) -> np.ndarray:
    return batches.score_rows(fit.judged, fit.valid, "prompt")


def test_a_warm_start_stays_unless_validation_prefers_by_its_margin_what_was_learned_since() -> None:
    data = rows(SIZES, 400)
    start = _fit(data, settings=SETTINGS.changed({"epochs": 1}))
    start.run()
    began = start._validation_auc("prompt")
    learned = _warm(start, data)
    seen = learned.run()
    auc = learned._validation_auc("prompt")
    draw = np.random.default_rng(0)
    sampled = [draw.integers(0, len(auc.auc), len(auc.auc)) for _ in range(2000)]
    gains = [np.average((auc.auc - began.auc)[at], weights=auc.weight[at]) for at in sampled]
    over = seen["over_start"]
    assert over["gauc"] == pytest.approx(seen["best_gauc"] - start.progress.best_gauc)
    assert over["standard_error"] == pytest.approx(np.std(gains), rel=0.1), "that of a bootstrap over sessions"
    ratio = over["gauc"] / over["standard_error"]
    assert ratio > 2 and _warm(start, data, margin=0.9 * ratio).run() == seen
    refused = _warm(start, data, margin=1.1 * ratio)
    figures = refused.run()
    assert figures["over_start"] == over and _equal(refused, start)
    assert (figures["best_epoch"], figures["best_gauc"]) == (0, start.progress.best_gauc)
    assert figures["gauc_by_readout"]["prompt"] == start.progress.best_gauc


def test_a_warm_start_is_resumed_as_it_was() -> None:
    data = rows(SIZES)
    start = _fit(data)
    whole, states = _warm(start, data, epochs=3), []
    expected = whole.run(lambda fit: states.append(pack(fit.state())))
    resumed = _warm(start, data, epochs=3)
    resumed.resume(unpack(states[0]))
    assert resumed.run() == expected
    assert _equal(whole, resumed)


def _equal(one: Fit, other: Fit) -> bool:
    states = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def _read_where_clicked() -> dict:
    """Sessions without a click have no query."""
    data = rows(SIZES)
    unread = ~data["clicks"].any(axis=1) & ~data["valid"]
    return data | {name: data[name] & ~unread for name in ("has_prompt", "has_query")}


@pytest.mark.parametrize("kind", ["din", "deepfm", "qe_rec"])
def test_candidates_that_no_loss_reads_are_left_out_and_change_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 3, "dropout": 0.0})
    narrow = _fit(_read_where_clicked(), kind, settings)
    without_click = narrow.train["clicks"].sums() == 0
    assert without_click.any()
    assert (narrow.train["shown"].sums() == narrow.train["candidates"].counts)[without_click].all()
    assert (narrow.train["candidates"].counts[~without_click] == SIZES.num_intents).all()
    monkeypatch.setattr(Fit, "_with_a_part", lambda self, rows: rows)
    whole = _fit(_read_where_clicked(), kind, settings)
    figures, expected = narrow.run(), whole.run()
    assert figures["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert figures["gaucs"] == pytest.approx(expected["gaucs"], abs=1e-3)


def test_sessions_without_a_click_teach_as_much_as_they_weigh() -> None:
    data = rows(SIZES)
    found = []
    for weight in (0.0, 1.0, 3.0):
        fit = _fit(data, "din", SETTINGS.model_copy(update={"no_click_weight": weight}))
        fit.model.eval()  # nothing is left to chance
        batch = to_batch({name: data[name] for name in ("fields", "multi", "history", "candidates", "shown", "clicks")})
        found.append(fit._loss(batch, None, torch.zeros(len(data["clicks"]), dtype=torch.bool), (0, 0), 0))
        scores = fit.model(batch)
    learned = fit.model.seen[batch["candidates"].long()]
    expected = losses.pointwise(scores, batch["shown"], batch["clicks"], learned)
    assert expected > 1
    torch.testing.assert_close(found[1] - found[0], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2] - found[0], 3 * expected, rtol=1e-3, atol=1e-3)


def test_agreement_is_asked_of_every_candidate() -> None:
    """QE-Rec's KL term reads those that were not shown as well, of sessions that have a query."""
    assert (_fit(rows(SIZES)).train["candidates"].counts == SIZES.num_intents).all()
    alone = _fit(rows(SIZES), settings=SETTINGS.model_copy(update={"kl": "off"}))
    assert (alone.train["candidates"].counts < SIZES.num_intents).any()


def _aucs(train: dict, test: dict, seed: int) -> np.ndarray:
    """AUC of each test session by a QE-Rec of that seed; nan without a click."""
    settings = SETTINGS.model_copy(update={"epochs": 5})
    fit = Fit("qe_rec", SIZES, settings, train, None, seed, Group())
    fit.run()
    scores = batches.score_rows(fit.model, test, "prompt")
    found = group_auc(scores.ravel(), test["clicks"].ravel(), np.repeat(np.arange(len(scores)), scores.shape[1]))
    aucs = np.full(len(scores), np.nan)
    aucs[found.groups] = found.auc
    return aucs


def test_own_queries_gain_and_shuffled_ones_do_not() -> None:
    """Against the same ranker without any query, over training sets and seeds, on sessions that none was trained on.

    Fields tell half of the needs, so that there is something to lose as well.
    """
    reads = {
        "own": lambda data: data,
        "shuffled": shuffle_embeddings,
        "none": lambda data: {**data, **{name: np.zeros_like(data[name]) for name in ("has_prompt", "has_query")}},
    }
    test = rows(SIZES, 400, seed=99, in_fields=0.5)
    logs = [rows(SIZES, 300, seed=seed, in_fields=0.5) for seed in range(3)]
    aucs = {
        name: np.stack([_aucs(read(log), read(test), seed) for seed, log in enumerate(logs)])
        for name, read in reads.items()
    }
    own, shuffled = (paired_bootstrap(aucs[name], aucs["none"], np.arange(400)) for name in ("own", "shuffled"))
    assert own.separated and min(own.users[0], own.over_seeds[0]) > 0.03
    assert not (shuffled.separated and shuffled.mean > 0)
    assert shuffled.users[1] < 0.02


def _disagreement(kl: str, teacher: str) -> float:
    """Mean KL of the query tower's own ranking from the teacher's, after training under `ranker.kl`."""
    data = rows(SIZES, 200)
    settings = SETTINGS.model_copy(update={"kl": kl, "epochs": 4, "kl_weight": 2.0})
    fit = _fit(data, settings=settings)
    assert np.isfinite(fit.run()["losses"]).all()
    model, batch = fit.model.eval(), to_batch(data)
    candidates, is_null = batch["candidates"].long(), torch.zeros(200, dtype=torch.bool)
    with torch.inference_mode():
        z, items = model.queries(torch.from_numpy(data["prompt"]), is_null), model.items()
        student = model.query_logits(z, items).gather(1, candidates)
        user = model.user_logits(model.users(batch), items).gather(1, candidates)
        whole = model.score(model.users(batch), items, candidates, z)
    by = {"fused": whole, "user": user}[teacher]
    return float(losses.agreement(by, student, torch.ones_like(student, dtype=torch.bool), is_null)) / 200


@pytest.mark.parametrize("kl", ["fused", "user"])
def test_every_agreement_term_trains_the_query_tower_as_it_says(kl: str) -> None:
    assert _disagreement(kl, kl) < 0.75 * _disagreement("off", kl)


TRAINED = [kind for kind in get_args(config.Baseline) if kind != "popularity"]


@pytest.mark.parametrize("kind", TRAINED)
def test_a_baseline_reads_the_fields(kind: str) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 6, "lr": 1e-2})
    told = _fit(rows(SIZES, 300, in_fields=1.0), kind, settings).run()
    untold = _fit(rows(SIZES, 300, in_fields=0.0), kind, settings).run()
    assert told["best_gauc"] > untold["best_gauc"] + 0.03


@pytest.mark.parametrize("kind", TRAINED)
def test_a_baseline_reads_the_history(kind: str) -> None:
    """The newest event tells the need in one log and is noise in the other. In so few steps an average lags behind."""
    settings = SETTINGS.model_copy(update={"epochs": 6, "lr": 1e-2, "average": None})
    untold = rows(SIZES, 300)
    told = {**untold, "history": untold["history"].copy()}
    clicked = (untold["clicks"] * (untold["candidates"] + 1)).max(axis=1)  # 1, 4, 7 … 22, or 0 without a click
    told["history"][:, -1] = np.where(clicked > 0, clicked // 3 + 2, told["history"][:, -1])
    assert _fit(told, kind, settings).run()["best_gauc"] > _fit(untold, kind, settings).run()["best_gauc"] + 0.03


def test_popularity_has_nothing_to_train_and_scores_the_base_rate() -> None:
    data = rows(SIZES, 300)
    fit = _fit(data, "popularity")
    figures = fit.run()
    assert figures["epoch"] == figures["parameters"] == 0
    scores = batches.score_rows(fit.model, data, "null")
    np.testing.assert_array_equal(scores, fit.model.prior.numpy()[data["candidates"]])
    assert figures["best_gauc"] > 0.6


def test_training_repeats_to_the_bit_whatever_the_order_of_rows() -> None:
    data = rows(SIZES, 150)
    settings = SETTINGS.model_copy(update={"epochs": 2})
    order = np.random.default_rng(5).permutation(150)
    first, again = _fit(data, settings=settings), _fit({k: v[order] for k, v in data.items()}, settings=settings)
    assert first.run() == again.run()
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in first.model.state_dict().items())


@pytest.mark.parametrize("average", [None, 3.0])
def test_resumed_training_equals_uninterrupted(average: float | None) -> None:
    data = rows(SIZES, 150)
    settings = SETTINGS.model_copy(update={"epochs": 4, "average": average})
    whole = _fit(data, settings=settings)
    states: list[bytes] = []
    figures = whole.run(lambda fit: states.append(pack(fit.state())))
    resumed = _fit(data, settings=settings)
    resumed.resume(unpack(states[1]))
    assert resumed.run() == figures
    assert all(torch.equal(t, resumed.model.state_dict()[n]) for n, t in whole.model.state_dict().items())


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_the_average_of_the_weights_is_what_is_judged_and_kept(power: float) -> None:
    data = rows(SIZES, 150)
    settings = SETTINGS.model_copy(update={"epochs": 3})
    passed: list[dict[str, torch.Tensor]] = []

    class Watched(torch.optim.AdamW):
        def step(self, *arguments: object) -> None:
            super().step(*arguments)
            passed.append({name: weight.detach().clone() for name, weight in fit.model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        fit = _fit(data, settings=settings.model_copy(update={"average": power}))
        figures = fit.run()
    steps = figures["best_epoch"] * len(passed) // figures["epoch"]
    # step t weighs as Γ(t + power) / Γ(t), which is 1, t, t(t + 1)(t + 2) for powers of 0, 1, 3
    weigh = [math.gamma(t + power) / math.gamma(t) for t in range(1, steps + 1)]
    for name, weight in fit.model.named_parameters():
        mean = sum(w * at[name] for w, at in zip(weigh, passed[:steps], strict=True)) / sum(weigh)
        torch.testing.assert_close(weight.detach(), mean, rtol=1e-4, atol=1e-6)
    assert fit.validation_gauc("prompt") == pytest.approx(figures["best_gauc"])
    plain = _fit(data, settings=settings)
    assert plain.run()["losses"] == figures["losses"], "what learns is not changed by it"


def test_best_epoch_is_kept_and_patience_stops() -> None:
    settings = SETTINGS.model_copy(update={"epochs": 30, "patience": 2, "lr": 0.05})
    fit = _fit(rows(SIZES, 150), settings=settings)
    figures = fit.run()
    assert figures["epoch"] == min(30, figures["best_epoch"] + 2)
    assert fit.validation_gauc("prompt") == pytest.approx(max(figures["gaucs"]))


def test_every_session_takes_part_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(SIZES, 101)
    fit = _fit(data)
    seen: list[int] = []
    take = batches.take

    def record(part: dict, index: object) -> dict:
        taken = take(part, index)
        if isinstance(index, slice):
            seen.extend(taken["session_key"].tolist())
        return taken

    monkeypatch.setattr(fitting, "take", record)
    fit._epoch(0)
    first, seen[:] = list(seen), []
    fit._epoch(1)
    assert sorted(first) == sorted(seen) == sorted(data["session_key"][~data["valid"]].tolist())
    assert first != seen


def test_query_inputs_are_drawn_by_share_and_fall_back() -> None:
    data = rows(SIZES, 3000)
    fit = _fit(data)
    drawn = fit._readouts(fit.train, epoch=0)
    assert (drawn == batches.NULL).mean() == pytest.approx(0.2, abs=0.03)
    assert not (drawn[~fit.train["has_query"]] == batches.QUERY).any()
    assert (drawn[fit.train["has_query"]] == batches.QUERY).mean() == pytest.approx(0.3, abs=0.05)
    assert (drawn != fit._readouts(fit.train, epoch=1)).any()
    assert (drawn == fit._readouts(fit.train, epoch=0)).all()


def test_prior_is_the_log_share_of_clicks_and_unseen_intents_get_the_mean() -> None:
    data = rows(SIZES, 200)
    data["shown"] &= data["candidates"] != 7
    data["clicks"] &= data["candidates"] != 7
    model = _fit(data).model
    clicked = data["candidates"][data["clicks"] & ~data["valid"][:, None]]
    assert not model.seen[7]
    assert float(model.prior[3]) == pytest.approx(
        np.log(((clicked == 3).sum() + 1) / (len(clicked) + SIZES.num_intents)), abs=1e-5
    )
    assert float(model.prior[7]) == pytest.approx(float(model.prior[model.seen].mean()), abs=1e-5)


def test_text_ranks_an_intent_that_training_never_showed() -> None:
    """Clicks fall on the intents whose text points where the session's embedding points, one intent being new."""
    draw = np.random.default_rng(0)
    n, s = 600, sizes(item_dim=6)
    meaning = draw.normal(size=(s.num_intents, s.embedding_dim))
    meaning[5] = meaning[4] + 0.1 * draw.normal(size=s.embedding_dim)
    data = rows(s, n)
    need = draw.integers(s.num_intents, size=n)
    need[data["valid"]] = 5
    need[~data["valid"] & (need == 5)] = 4
    data["candidates"] = np.tile(np.arange(s.num_intents, dtype=np.int32), (n, 1))
    data["clicks"] = data["candidates"] == need[:, None]
    data["shown"] = data["clicks"] | ((draw.random(data["clicks"].shape) < 0.2) & (data["candidates"] != 5))
    data["prompt"] = (meaning[need] + 0.1 * draw.normal(size=(n, s.embedding_dim))).astype(np.float16)
    data["has_query"][:] = False
    figures = _fit(data, items=meaning.astype(np.float16)).run()
    assert figures["best_gauc"] > 0.85


def test_unseen_intents_rank_by_what_their_text_resembles() -> None:
    """Each of three intents that training never showed has nearly the text of one that it did."""
    draw = np.random.default_rng(1)
    n, s, like = 500, sizes(item_dim=6), {4: 5, 8: 9, 13: 14}
    meaning = draw.normal(size=(s.num_intents, s.embedding_dim))
    for old, new in like.items():
        meaning[new] = meaning[old] + 0.1 * draw.normal(size=s.embedding_dim)
    unseen = np.array(list(like.values()))
    data = rows(s, n)
    need = draw.choice(np.setdiff1d(np.arange(s.num_intents), unseen), size=n)
    data["candidates"] = np.tile(np.arange(s.num_intents, dtype=np.int32), (n, 1))
    data["clicks"] = data["candidates"] == need[:, None]
    data["shown"] = data["clicks"] | ((draw.random(data["clicks"].shape) < 0.2) & ~np.isin(data["candidates"], unseen))
    data["prompt"] = (meaning[need] + 0.1 * draw.normal(size=(n, s.embedding_dim))).astype(np.float16)
    data["has_query"][:] = False
    of_old = np.isin(need, list(like))
    wanted = np.array([like.get(i, -1) for i in need])[of_old]
    with_text, without = _fit(data, items=meaning.astype(np.float16)), _fit(data)
    for fit in (with_text, without):
        fit.run()
        assert not fit.model.seen[unseen].any()
    scores = batches.score_rows(with_text.model, data, "prompt")[of_old]
    assert (unseen[scores[:, unseen].argmax(axis=1)] == wanted).mean() > 0.9, "first among the unseen"
    above = (scores > scores[np.arange(len(scores)), wanted][:, None]).sum(axis=1)
    assert (above <= 2).mean() > 0.8, "near the top of all"
    assert np.ptp(batches.score_rows(without.model, data, "prompt")[:, unseen], axis=1).max() < 1e-5, "equal by id"


def test_logs_that_teach_nothing_are_refused() -> None:
    data = rows(SIZES, 60)
    with pytest.raises(DataError, match="none with a click"):
        _fit({**data, "clicks": np.zeros_like(data["clicks"])})
    with pytest.raises(DataError, match="role valid"):
        _fit({**data, "valid": np.zeros_like(data["valid"])})


def test_rows_survive_the_arrow_round_trip_and_an_empty_worker_has_shapes() -> None:
    data = rows(SIZES, 30)
    data["candidates"][::2, -3:] = -1
    for name in ("shown", "clicks"):
        data[name] &= data["candidates"] >= 0
    parts = [to_table({k: v[i : i + 11] for k, v in data.items()}) for i in range(0, 30, 11)]
    back = {name: v.padded() if name in LISTS else v for name, v in from_tables(parts, SIZES).items()}
    assert back.keys() == data.keys()
    for name, values in data.items():
        np.testing.assert_array_equal(back[name], values, err_msg=name)
        assert back[name].dtype == values.dtype
    empty = {name: v.padded() if name in LISTS else v for name, v in from_tables([], SIZES).items()}
    assert {name: values.shape[2:] for name, values in empty.items()} == {n: v.shape[2:] for n, v in data.items()}
    assert all(len(values) == 0 for values in empty.values())


def test_a_ranker_without_a_fold_learns_from_the_others_and_chooses_by_all() -> None:
    data = rows(SIZES, 60) | {FOLD: np.arange(60) % 3}
    own = reading(data, shuffled=False, without=1)
    kept = data["valid"] | (data[FOLD] != 1)
    assert 0 < (~kept).sum() < 60 and FOLD not in own
    for name, values in own.items():
        np.testing.assert_array_equal(values, data[name][kept], err_msg=name)
    back = reading(from_tables([to_table(data)], SIZES), shuffled=False, without=1)
    assert {name: len(values) for name, values in back.items()} == dict.fromkeys(back, int(kept.sum()))
    empty = reading(from_tables([], SIZES), shuffled=False, without=1)
    assert all(len(values) == 0 for values in empty.values()), "a worker that was dealt nothing knows no folds"
