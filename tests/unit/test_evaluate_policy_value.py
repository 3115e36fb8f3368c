from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign_ray.errors import DataError
from rgalign_ray.evaluate import plackett_luce, policy_value
from rgalign_ray.evaluate.policy_value import LoggedSlates, Terms

SLOTS = 3
SLATES = np.array(list(permutations(range(5), SLOTS)))
"""Every slate of a world of one session and five items."""


def policy(seed: int, temperature: float = 1.0) -> np.ndarray:
    """Logits [slates, 5], the same in every row."""
    scores = np.random.default_rng(seed).normal(size=(1, 5))
    return np.repeat(plackett_luce.logits(scores, np.ones((1, 5), bool), temperature), len(SLATES), axis=0)


def world(logging: np.ndarray, rewards: np.ndarray) -> LoggedSlates:
    """The log in which every slate occurs once; rewards [slates, slots] stand in the place of clicks."""
    return LoggedSlates(
        candidates=np.tile(np.arange(5), (len(SLATES), 1)),
        shown=SLATES,
        propensity=plackett_luce.conditional(logging, SLATES),
        clicks=rewards,
        users=np.arange(len(SLATES)),
        marginal=plackett_luce.marginals(logging, SLOTS)[np.arange(len(SLATES))[:, None], SLATES, np.arange(SLOTS)],
    )


def expectation(terms: Terms, logging: np.ndarray) -> float:
    """Of an estimator that is a mean: its value on each slate, weighted by how often the log holds the slate."""
    chance = plackett_luce.conditional(logging, SLATES).prod(axis=1)
    return float(chance @ terms.numerator[:, 0])


def estimators(logging: np.ndarray, target: np.ndarray, rewards: np.ndarray) -> dict[str, Terms]:
    """Every estimator, the doubly robust ones with a reward model that has nothing to do with the log."""
    log = world(logging, rewards)
    pi = plackett_luce.marginals(target, SLOTS)
    q = np.tile(np.random.default_rng(0).random((5, SLOTS)), (len(SLATES), 1, 1))
    prefix, own = policy_value.prefix_weights(log, target), policy_value.item_position_weights(log, pi)
    return policy_value.terms(log, target, "clicks") | {
        "item-position DR": policy_value.doubly_robust(log, own, rewards, q, pi),
        "cascade DR": policy_value.doubly_robust(log, prefix, rewards, q, pi),
    }


def true_value(target: np.ndarray, rewards: np.ndarray) -> float:
    return float(plackett_luce.conditional(target, SLATES).prod(axis=1) @ rewards.sum(axis=1))


def item_position_rewards(random: np.random.Generator) -> np.ndarray:
    return random.random((5, SLOTS))[SLATES, np.arange(SLOTS)]


def prefix_rewards(random: np.random.Generator) -> np.ndarray:
    """Rewards of a cascade: at k they depend on the items at and above k."""
    attraction = random.random(5)[SLATES]
    return attraction * np.cumprod(np.column_stack([np.ones(len(SLATES)), 1 - attraction[:, :-1]]), axis=1)


def slate_rewards(random: np.random.Generator) -> np.ndarray:
    return random.random((len(SLATES), SLOTS))


REWARDS = {"item-position": item_position_rewards, "prefix": prefix_rewards, "slate": slate_rewards}
UNBIASED = {
    "item-position": ("item-position IPS", "item-position DR", "prefix IPS", "cascade DR", "slate IPS"),
    "prefix": ("prefix IPS", "cascade DR", "slate IPS"),
    "slate": ("slate IPS",),
}
MEANS = ("item-position IPS", "item-position DR", "prefix IPS", "cascade DR", "slate IPS")


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(sorted(REWARDS)), st.integers(0, 2**32 - 1))
def test_over_all_slates_an_estimator_has_the_true_value_as_its_mean(kind: str, seed: int) -> None:
    logging, target = policy(seed), policy(seed + 1, 0.7)
    rewards = REWARDS[kind](np.random.default_rng(seed))
    found = estimators(logging, target, rewards)
    for name in UNBIASED[kind]:
        assert expectation(found[name], logging) == pytest.approx(true_value(target, rewards), abs=1e-12), name


@pytest.mark.parametrize("kind", ["prefix", "slate"])
def test_an_estimator_is_biased_where_its_assumption_fails(kind: str) -> None:
    logging, target = policy(0), policy(1, 0.5)
    rewards = REWARDS[kind](np.random.default_rng(0))
    found = estimators(logging, target, rewards)
    for name in set(MEANS) - set(UNBIASED[kind]):
        assert abs(expectation(found[name], logging) - true_value(target, rewards)) > 1e-3, name


def test_conditional_propensities_are_no_marginals() -> None:
    logging, target = policy(0), policy(1, 0.5)
    rewards = item_position_rewards(np.random.default_rng(0))
    log = world(logging, rewards)
    naive = policy_value.ips(
        plackett_luce.marginals(target, SLOTS)[0][SLATES, np.arange(SLOTS)] / log.propensity, rewards
    )
    assert expectation(naive, logging) < true_value(target, rewards) - 0.01


def shop(
    seed: int, sessions: int = 400, slots: int = 3, empty: bool = True, marginals: bool = True
) -> tuple[LoggedSlates, np.ndarray]:
    """A log with ragged lists and slates, and its logging policy's logits."""
    random = np.random.default_rng(seed)
    count = random.integers(1 if empty else slots, 8, size=sessions)
    mask = np.arange(7) < count[:, None]
    logits = plackett_luce.logits(random.normal(size=(sessions, 7)), mask)
    shown = plackett_luce.sample(logits, slots, random)
    every = np.arange(sessions)[:, None]
    known = plackett_luce.marginals(logits, slots)[every, shown, np.arange(slots)] if marginals else None
    log = LoggedSlates(
        candidates=np.where(mask, random.permuted(np.tile(np.arange(9), (sessions, 1)), axis=1)[:, :7], -1),
        shown=shown,
        propensity=plackett_luce.conditional(logits, shown),
        clicks=(random.random(shown.shape) < 0.3) & (shown >= 0),
        users=random.integers(sessions // 3, size=sessions),
        marginal=known,
    )
    return log, logits


@pytest.mark.parametrize("reward", ["clicks", "any click"])
def test_the_logging_policy_itself_has_weights_1_and_the_mean_of_the_log(reward: policy_value.Reward) -> None:
    log, logits = shop(0)
    observed = log.clicks.sum(axis=1).mean() if reward == "clicks" else log.clicks.any(axis=1).mean()
    found = policy_value.terms(log, logits, reward)
    assert policy_value.on_policy(log, reward).value == pytest.approx(observed, abs=1e-12)
    for name, it in found.items():
        if name not in ("direct", "cascade DR", "item-position DR"):
            assert it.weights == pytest.approx(np.ones(log.shown.shape), abs=1e-9), name
            assert it.value == pytest.approx(observed, abs=1e-9), name
    assert ("item-position IPS" in found) == (reward == "clicks")


def test_neither_a_shift_of_scores_nor_more_padding_changes_anything() -> None:
    log, _ = shop(1)
    scores = np.where(log.mask, np.random.default_rng(2).normal(size=log.mask.shape), 99.0)
    plain = policy_value.terms(log, plackett_luce.logits(scores, log.mask, 0.5), "clicks")
    shifted = policy_value.terms(log, plackett_luce.logits(scores + 7.0, log.mask, 0.5), "clicks")
    wide = LoggedSlates(
        np.pad(log.candidates, ((0, 0), (0, 3)), constant_values=-1),
        log.shown, log.propensity, log.clicks, log.users, log.marginal,
    )  # fmt: skip
    padded = policy_value.terms(wide, plackett_luce.logits(np.pad(scores, ((0, 0), (0, 3))), wide.mask, 0.5), "clicks")
    for name, it in plain.items():
        assert it.value == pytest.approx(shifted[name].value, rel=1e-9), name
        assert it.value == pytest.approx(padded[name].value, rel=1e-12), name


@settings(deadline=None)
@given(st.lists(st.just(0.0) | st.floats(1e-6, 1e4), min_size=2, max_size=50).filter(any), st.floats(0.1, 1e3))
def test_clipping_never_lowers_the_effective_sample_size(weights: list[float], most: float) -> None:
    w = np.array(weights)[:, None]
    kept = policy_value.clipped(w, np.ones_like(w), most).weights
    assert policy_value.effective_sample_size(kept) >= policy_value.effective_sample_size(w) * (1 - 1e-9)
    assert 1 - 1e-9 <= policy_value.effective_sample_size(w) <= len(w) + 1e-9


def test_the_reward_table_knows_nothing_of_a_users_own_clicks() -> None:
    log, _ = shop(3)
    rewards = log.rewards("clicks")
    table = policy_value.reward_table(log, rewards)
    user = np.asarray(log.users) == np.asarray(log.users)[0]
    changed = policy_value.reward_table(log, np.where(user[:, None], 0.0, rewards))
    assert np.array_equal(table[user], changed[user])
    assert not np.array_equal(table[~user], changed[~user])
    assert np.all(table[~log.mask] == 0) and np.all(table >= 0)


def test_intervals_of_users_are_those_of_textbooks() -> None:
    random = np.random.default_rng(4)
    values = random.random((500, 1))
    it = policy_value.ips(np.ones_like(values), values)
    found = policy_value.estimate({"mean": it}, np.arange(500), repetitions=4000)[0]
    error = values.std(ddof=1) / 500**0.5
    assert found.standard_error == pytest.approx(error)
    assert found.normal == pytest.approx((values.mean() - 1.95996 * error, values.mean() + 1.95996 * error))
    assert found.bootstrap == pytest.approx(found.normal, abs=error / 5)
    assert found.effective_sessions == pytest.approx(500)
    alike = policy_value.estimate({"mean": it}, np.arange(500) // 250)[0]
    halves = values.reshape(2, 250).mean(axis=1)
    assert alike.standard_error == pytest.approx(abs(halves[0] - halves[1]) / 2)
    with pytest.raises(ValueError, match="two users"):
        policy_value.estimate({"mean": it}, np.zeros(500))


@pytest.mark.parametrize("name", ["prefix SNIPS", "item-position SNIPS"])
def test_the_error_of_normalised_weights_is_that_of_the_bootstrap(name: str) -> None:
    log, _ = shop(5, sessions=1500)
    target = plackett_luce.logits(np.random.default_rng(6).normal(size=log.mask.shape), log.mask)
    found = policy_value.estimate(policy_value.terms(log, target, "clicks"), log.users, repetitions=2000)
    it = next(found_one for found_one in found if found_one.estimator == name)
    width = it.bootstrap[1] - it.bootstrap[0]
    assert width == pytest.approx(it.normal[1] - it.normal[0], rel=0.12)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered, seeds = 0, 150
    scores = np.array([[1.0, 0.0, -1.0, 0.5, 0.2]])
    attraction = np.array([0.5, 0.1, 0.3, 0.2, 0.4])
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        logits = np.zeros((600, 5))
        shown = plackett_luce.sample(logits, 3, random)
        clicks = random.random(shown.shape) < attraction[shown]
        log = LoggedSlates(
            np.tile(np.arange(5), (600, 1)), shown, plackett_luce.conditional(logits, shown), clicks, np.arange(600)
        )
        target = plackett_luce.logits(np.repeat(scores, 600, axis=0), log.mask)
        truth = attraction @ plackett_luce.marginals(target[:1], 3)[0].sum(axis=1)
        terms = policy_value.prefix_weights(log, target)
        it = policy_value.estimate(
            {"prefix": policy_value.ips(terms, log.rewards("clicks"))}, log.users, repetitions=50
        )
        covered += it[0].normal[0] < truth < it[0].normal[1]
    assert 0.88 < covered / seeds < 0.99


def test_the_first_click_alone_counts_once() -> None:
    log, _ = shop(7)
    assert log.rewards("any click").sum(axis=1) == pytest.approx(log.clicks.any(axis=1).astype(float))
    assert np.all(log.rewards("any click") <= log.rewards("clicks"))


def test_longer_slates_are_estimated_by_their_prefixes() -> None:
    log, logits = shop(11, slots=5, empty=False, marginals=False)
    found = policy_value.terms(log, logits, "any click")
    assert set(found) == {"prefix IPS", "prefix IPS, clipped", "prefix SNIPS", "slate IPS"}
    assert found["prefix IPS"].value == pytest.approx(log.clicks.any(axis=1).mean())


def test_without_marginals_there_is_no_item_position_estimate() -> None:
    log, logits = shop(8)
    bare = LoggedSlates(log.candidates, log.shown, log.propensity, log.clicks, log.users)
    assert not any(name.startswith("item-position") for name in policy_value.terms(bare, logits, "clicks"))
    with pytest.raises(DataError, match="prefix weights"):
        policy_value.item_position_weights(bare, plackett_luce.marginals(logits, 3))


@pytest.mark.parametrize("wrong", [0.0, np.nan, 1.5, -0.1])
def test_what_was_shown_must_have_had_a_probability(wrong: float) -> None:
    log, _ = shop(9, empty=False)
    propensity = np.array(log.propensity)
    propensity[11, 1] = wrong
    with pytest.raises(DataError, match="position 1 of row 11"):
        LoggedSlates(log.candidates, log.shown, propensity, log.clicks, log.users)


def test_clicks_in_empty_slots_and_other_shapes_are_refused() -> None:
    log, _ = shop(10)
    with pytest.raises(DataError, match="nothing was shown"):
        LoggedSlates(log.candidates, log.shown, log.propensity, np.ones(log.shown.shape), log.users)
    with pytest.raises(ValueError, match="rows"):
        LoggedSlates(log.candidates[1:], log.shown, log.propensity, log.clicks, log.users)
    with pytest.raises(ValueError, match="marginal"):
        LoggedSlates(log.candidates, log.shown, log.propensity, log.clicks, log.users, log.marginal[1:])
