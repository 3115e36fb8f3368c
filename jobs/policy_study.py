"""Off-policy estimates and offline metrics against the truth, over many simulated shops.

    python -m jobs.policy_study --seeds 100 --sessions 1000 --population 5 --workers 4 --out runs/policy_study

Writes study.md, study.csv, rankers.csv and study.png; shops that are done already are not made again.
"""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from rgalign_ray.evaluate import policy_study, policy_study_report
from rgalign_ray.evaluate.policy_study import Settings

DEFAULT = Settings()


def main(
    out: Annotated[str, typer.Option(help="Folder or URI of the results.")] = "runs/policy_study",
    seeds: Annotated[int, typer.Option(min=2, help="Shops.")] = DEFAULT.seeds,
    sessions: Annotated[int, typer.Option(min=100, help="Sessions of a log, about.")] = DEFAULT.sessions,
    population: Annotated[
        int, typer.Option(min=2, help="Sessions of a shop for each of its log.")
    ] = DEFAULT.population,
    rankers: Annotated[int, typer.Option(min=3, help="Rankers compared in a shop.")] = DEFAULT.rankers,
    ranker_seeds: Annotated[int, typer.Option(min=0, help="Shops that compare rankers.")] = DEFAULT.ranker_seeds,
    a_a: Annotated[int, typer.Option(min=100, help="A/A tests.")] = DEFAULT.a_a_repetitions,
    cascade: Annotated[bool, typer.Option(help="Users who read from the top, and stop.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Bias, RMSE and coverage of off-policy estimators; A/A tests; what orders rankers as their true CTR does."""
    settings = Settings(
        clicks="cascade" if cascade else "position",
        seeds=seeds,
        sessions=sessions,
        population=population,
        rankers=rankers,
        ranker_seeds=ranker_seeds,
        a_a_repetitions=a_a,
    )
    found = policy_study_report.summarise(policy_study.run(settings, out, workers))
    command = shlex.join(["python", "-m", "jobs.policy_study", *sys.argv[1:]])
    policy_study_report.write(found, settings, command, out)
    print(policy_study_report.markdown(found, settings, command))


if __name__ == "__main__":
    typer.run(main)
