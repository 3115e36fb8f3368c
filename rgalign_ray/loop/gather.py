"""One table of seeds that were run in different places: on machines that share no filesystem, or on different days.

What a comparison tells of a seed stands in manifests and a few small tables, so that a seed's folder can travel
without its weights and vectors:

    rsync -am --include='*/' --include=config.json --include=manifest.json --include=verdict.parquet \\
        --include=worth.parquet --exclude='*' runs/alignment/seed_1 elsewhere/
    rgalign compare --config alignment --from runs/alignment --from elsewhere --run-dir runs/together
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from rgalign_ray import storage
from rgalign_ray.config import AlignName, Config, RowName, validate
from rgalign_ray.errors import ConfigError, DataError
from rgalign_ray.evaluate import report
from rgalign_ray.loop import alignments, compare, controller, ladder_report, readers
from rgalign_ray.loop.ladder_rows import rows_of, rows_of_each, slice_name
from rgalign_ray.loop.stage import Run

SEED = "seed_"
APART = ("name", "seed", "run_dir", "cluster", "serve", "tracking")
"""Sections in which seeds of one comparison may differ, besides those of objectives that one of them has not used,"""
APART_IN = {
    "compare": [
        "rows",
        "exploratory",
        "seeds",
        "first_seed",
        "trainings",
        "trials",
        "tuning_seed",
        "cpus_per_slice",
        "slice_deadline_s",
    ],
    "evaluate": ["bootstrap", "confidence"],
    "world": ["seed"],
}
"""and settings of others: which rows are told of, and how. But for the world's seed, they are as asked now."""
BEFORE = {
    "reasoner": readers.BEFORE,
    "ranker": {"text_match": False},
    "evaluate": {"rank_by": "log"},
    "reward": {"rank_by": "log"},
}
"""How seeds were made that do not say so: those of before it could be set, where that is not the default since."""


def run(config: Config, places: Sequence[str]) -> report.Report:
    """Writes and prints the comparison of all seeds in some run directories, of the rows that `config` names.

    Args:
        config: which rows, how intervals are made, and where the comparison is written (its run directory). All else is
            as the seeds were made.
        places: run directories of `compare`, or of parts of it.

    Raises:
        ConfigError: where a place has no seed, two have the same one, or they were made with different settings.
        DataError: where a seed lacks a row.
    """
    rows = rows_of(config)
    found = {place: seeds_of(place) for place in places}
    seeds = sorted(seed for those in found.values() for seed in those)
    twice = [seed for seed in set(seeds) if seeds.count(seed) > 1]
    if twice:
        raise ConfigError(f"--from: seed {twice[0]} stands in two of the places; name each seed once.")
    agree(found, rows)
    first = next(storage.join(place, f"{SEED}{seed}") for place, those in found.items() for seed in those)
    config = _as_asked(_made(first), config)
    jobs = runs(config, rows, found)
    whole(jobs, rows)
    told = config.model_copy(update={"compare": config.compare.model_copy(update={"seeds": len(seeds)})})
    made = alignments.with_alignments(
        jobs, rows, ladder_report.make(told, [compare.row_result(jobs, name) for name in rows])
    )
    compare.show(told, made)
    return made


def runs(config: Config, rows: list[RowName], found: dict[str, list[int]]) -> list[Run]:
    """The runs of the seeds that places have, each with the exploratory rows that it has."""
    made_in = ((config.model_copy(update={"run_dir": place}), those) for place, those in found.items())
    jobs = [job for settings, those in made_in for job in compare.runs(settings, rows, those)]
    jobs.sort(key=lambda job: job.config.seed)
    return [compare.exploring(job, [name for name in config.compare.exploratory if _has(job, name)]) for job in jobs]


def seeds_of(place: str) -> list[int]:
    """The seeds that a run directory has.

    Raises:
        ConfigError: when it has none.
    """
    names = [name for name in storage.entries(place) if name.startswith(SEED)]
    found = sorted(int(seed) for name in names if (seed := name.removeprefix(SEED)).isdecimal())
    if not found:
        raise ConfigError(f"--from {place}: no folder {SEED}0 or the like; `rgalign compare --run-dir` makes them.")
    return found


def agree(found: dict[str, list[int]], rows: Sequence[RowName]) -> None:
    """Whether all seeds were made with the same settings, of those that decide one of their rows.

    Raises:
        ConfigError: for the first setting in which one differs from an earlier one.
    """
    settled: dict[str, tuple[Any, str]] = {}
    for place in [storage.join(place, f"{SEED}{seed}") for place, seeds in found.items() for seed in seeds]:
        for name, section in sorted(_settings(place, rows).items()):
            earlier, where = settled.setdefault(name, (section, place))
            if section != earlier:
                raise ConfigError(f"--from: {place} was made with another {name} than {where}; they make no one table.")


def _settings(place: str, rows: Sequence[RowName]) -> dict[str, Any]:
    """Those in which the seed of a folder must agree with others that have its rows."""
    made = _made(place)
    job = Run(made.model_copy(update={"run_dir": place}))
    aligned = alignments.read_by([name for name in rows if _has(job, name)])
    used = {objective for name in aligned for objective in alignments.settings_of(made, name).align}
    apart = {*APART, *(name for name in get_args(AlignName) if name not in used)}
    settings = {name: section for name, section in controller.deciding(made).items() if name not in apart}
    for name, free in APART_IN.items():
        settings[name] = {key: value for key, value in settings[name].items() if key not in free}
    return settings


def _as_asked(made: Config, asked: Config) -> Config:
    """The configuration that seeds were made with, told of as another one asks."""
    sections = {name: getattr(asked, name) for name in APART}
    for name in ("compare", "evaluate"):
        free = {key: getattr(getattr(asked, name), key) for key in APART_IN[name]}
        sections[name] = getattr(made, name).model_copy(update=free)
    return made.model_copy(update=sections)


def _made(place: str) -> Config:
    """What a seed was made with; a setting that is newer than the seed has its default, or what `BEFORE` says.

    Raises:
        DataError: where nothing says so.
    """
    file = storage.join(place, "config.json")
    if not storage.exists(file):
        raise DataError(f"{file}: not there; run `rgalign compare` for that seed again, which writes it.")
    kept = storage.read_json(file)
    return validate(kept | {name: before | kept[name] for name, before in BEFORE.items()})


def _has(job: Run, name: RowName) -> bool:
    """Whether a seed has a row's first ranker."""
    return storage.read_manifest(compare.place_of(job, name).uri(slice_name(name, 0))) is not None


def whole(jobs: Sequence[Run], rows: Sequence[RowName]) -> None:
    """Whether each seed has its rows.

    Raises:
        DataError: where one lacks a row, or has one that was made of something else than what is there now.
    """
    for job, own in rows_of_each(jobs, rows):
        for name in own:
            for number in range(job.config.compare.trainings):
                _check(compare.place_of(job, name), slice_name(name, number))


def _check(run: Run, name: str) -> None:
    """Whether a slice is there, with the artefacts that it was made of."""
    made = run.uri(name)
    manifest = storage.read_manifest(made)
    if manifest is None or not storage.exists(storage.join(made, compare.VERDICT)):
        raise DataError(
            f"{made}: not there; finish that seed, or name compare.rows and compare.trainings that all seeds have, and "
            "compare.exploratory that one has."
        )
    for read, key in manifest.inputs.items():
        if run.manifest(read).key != key:
            raise DataError(f"{made}: made of another {read} than {run.uri(read)}; finish that seed.")
