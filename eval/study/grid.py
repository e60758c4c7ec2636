"""Which runs a study needs, and how they are made: in worker processes, each finished one a small JSON file that is never run again.

First every arm runs at every rate with the first seed; rates continue up or down the ladder while the best is at an edge, and down while
the lowest still learns nearly as much as LoRA: it may forget less. Then the other seeds run at two rates: the tuned rate, and the smallest
that learns nearly as much as LoRA (``frontier``). Should the other seeds show that a rate learns less than another, the seeds of the other
run too.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from corda_eval.lab.base import cache_root
from corda_eval.records import read_sealed
from corda_eval.study import sequence
from corda_eval.study.frontier import BASE, BASELINE, Run, base_run, gain_of, gain_to_match, matched_rate, tuned_rate
from corda_eval.study.methods import METHODS
from corda_eval.study.named import options_of
from corda_eval.study.settings import SETTINGS
from corda_eval.study.worker import RunSpec
from corda_vlm.options import Count, FileName, Place, as_declared
from corda_vlm.outputs import clear_partial, locked

LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Where rates come from: two a decade."""
OF_SETTINGS, OF_ARMS = ("arms", "rates", "alphas", "seeds"), ("rates", "seeds")
"""What a setting and an arm say to the study; the rest are options of task and method, and decide what a run finds."""


@dataclass(frozen=True)
class StudyConfig:
    """A study; ``configs/compare_lab.yaml`` holds the published one's values with their reasons."""

    settings: Mapping[FileName, Mapping[str, Any]]
    """By name: ``kind``, its options, ``arms``, the names of those that run here (all, if it is left out), ``rates``, where the ladder
    begins here for some of them, by name, and ``alphas`` and ``seeds`` in place of the study's."""

    arms: Mapping[FileName, Mapping[str, Any]]
    """By name: ``method``, its options, ``rates``, where the ladder begins for it elsewhere, and ``seeds`` in place of the study's. One
    must be called ``lora``."""

    rates: Sequence[float]
    """Where the ladder begins."""

    seeds: Count
    """Of each arm, at the rates that decide."""

    alphas: Sequence[float] = ()
    """Interpolations with the base that are measured of each run (WiSE-FT)."""

    climb: bool = True
    """Whether rates go on beyond an edge, and the other seeds run at the rates that decide; if not, all seeds run at the rates given."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Runs at once."""

    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of each."""

    results: Place = "compare"
    """Folder of the finished runs, one a file."""


@dataclass(frozen=True)
class Planned:
    """A run that a study needs."""

    setting: str
    arm: str
    spec: RunSpec

    @property
    def file_name(self) -> str:
        """What its result is called: another option of setting or method makes another name."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.spec), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.setting}/{self.arm}-{self.spec.rate:g}-{self.spec.seed}-{digest}.json"


def planned(config: StudyConfig, setting: str, arm: str, rate: float, seed: int) -> Planned:
    """Return the run of one arm in one setting."""
    method = None if arm == BASE else _without(config.arms[arm], OF_ARMS)
    alphas = list(config.settings[setting].get("alphas", config.alphas)) if method else []
    return Planned(setting, arm, RunSpec(_without(config.settings[setting], OF_SETTINGS), method, rate, seed, alphas))


def _without(options: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in keys}


def finished(config: StudyConfig, setting: str) -> list[Run]:
    """Return the finished runs of one setting that belong to this study, by arm, rate and seed."""
    runs = []
    for arm in arms_of(config, setting):
        for file in sorted((Path(config.results) / setting).glob(f"{escape(arm)}-*.json")):
            result = read_sealed(file, "remove it: the run is made again")
            try:
                spec = RunSpec(**result["spec"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} is no result of a run ({error!r}); expected what `corda-vlm compare` writes; remove it."
                ) from error
            if planned(config, setting, arm, spec.rate, spec.seed).file_name == f"{setting}/{file.name}":
                runs.append(Run(arm, spec.rate, spec.seed, result))
    _check_bases(config, setting, runs)
    return sorted(runs, key=lambda run: (run.arm, run.rate, run.seed))


def _check_bases(config: StudyConfig, setting: str, runs: Sequence[Run]) -> None:
    """Refuse runs that were made on another base than that which was measured; results of before that was noted pass."""
    digests = {run.result["base_digest"]: run for run in reversed(runs) if "base_digest" in run.result}  # the first run of each
    if len(digests) > 1:
        last, before = (planned(config, setting, run.arm, run.rate, run.seed).file_name for run in list(digests.values())[:-3:-1])
        raise ValueError(
            f"{config.results}/{last} and {before} were made on different base weights; give another `results`, or remove those of the old "
            "base."
        )


def arms_of(config: StudyConfig, setting: str) -> list[str]:
    """Return the names of the arms that run in a setting, the base first."""
    return [BASE, *config.settings[setting].get("arms", config.arms)]


def missing(config: StudyConfig, setting: str, failed: Collection[str] = ()) -> list[Planned]:
    """Return the runs that are needed next: empty when a setting is done. Arms that failed are left out."""
    runs = finished(config, setting)
    have = {(run.arm, run.rate, run.seed) for run in runs}
    base = base_run(runs)
    if base is None:
        return [planned(config, setting, BASE, 0.0, 0)]
    arms = [arm for arm in arms_of(config, setting)[1:] if arm not in failed]
    if config.climb:
        wanted = _climbing(config, setting, arms, runs, base)
    else:
        each = [(arm, rate) for arm in arms for rate in rates_from(config, setting, arm)]
        most = max(seeds_of(config, setting, arm) for arm in arms) if arms else 0
        wanted = [(arm, rate, seed) for seed in range(most) for arm, rate in each if seed < seeds_of(config, setting, arm)]
    return [planned(config, setting, *run) for run in wanted if run not in have]


def _climbing(config: StudyConfig, setting: str, arms: Sequence[str], runs: Sequence[Run], base: Run) -> list[tuple[str, float, int]]:
    """Return (arm, rate, seed) of the runs that finished ones ask for: the first seed up and down the ladder, then other seeds."""
    baseline = [run for run in runs if run.arm == BASELINE]
    enough = gain_to_match(baseline, base)
    wanted: list[tuple[str, float, int]] = []
    for arm in arms:
        first_seed = [run for run in runs if run.arm == arm and run.seed == 0]
        wanted += [(arm, rate, 0) for rate in rates_of(rates_from(config, setting, arm), first_seed, base, enough)]
    if {(run.arm, run.rate, run.seed) for run in runs}.issuperset(wanted):
        for arm in arms:
            of_arm = [run for run in runs if run.arm == arm]
            repeated = {rate for rate in (tuned_rate(of_arm, base), matched_rate(of_arm, base, baseline)) if rate is not None}
            wanted += [(arm, rate, seed) for rate in sorted(repeated) for seed in range(1, seeds_of(config, setting, arm))]
    return wanted


def rates_from(config: StudyConfig, setting: str, arm: str) -> Sequence[float]:
    """Return where the ladder begins for an arm in a setting."""
    here: Mapping[str, Sequence[float]] = config.settings[setting].get("rates", {})
    return here.get(arm, config.arms[arm].get("rates", config.rates))


def seeds_of(config: StudyConfig, setting: str, arm: str) -> int:
    """Return how many seeds an arm has in a setting: the fewer of what the two say, where they do."""
    return min(options.get("seeds", config.seeds) for options in (config.settings[setting], config.arms[arm]))


def rates_of(beginning: Sequence[float], first_seed: Sequence[Run], base: Run, enough: float) -> list[float]:
    """Return the rates that an arm runs at: the ladder's beginning, and further beyond an edge.

    Up or down while the best is at that edge, and down while the gain at the lowest is ``enough`` to match LoRA's.
    """
    rates = sorted(beginning)
    done = {run.rate for run in first_seed}
    if not set(rates) <= done:
        return rates
    gains = {run.rate: gain_of(run, base) for run in first_seed}
    best, lowest, highest = max(gains, key=lambda rate: gains[rate]), min(gains), max(gains)
    for step, edge, onward in ((1, highest, best == highest), (-1, lowest, best == lowest or gains[lowest] >= enough)):
        place = LADDER.index(edge) + step if edge in LADDER else -1
        if onward and 0 <= place < len(LADDER):
            rates.append(LADDER[place])
    return sorted({*rates, *done})


def check(config: StudyConfig) -> None:
    """Check a study before its first run.

    Raises:
        ValueError: If a setting or an arm has no options by name, an arm that a setting names is missing, LoRA is, a rate is not on the
            ladder that is to be climbed, or a number of seeds is below 1.
    """
    _check_kinds(config)
    odd: list[float] = []
    for setting in config.settings:
        arms = arms_of(config, setting)[1:]
        for arm in [*arms, *config.settings[setting].get("rates", {})]:
            if arm not in config.arms or arm not in arms:
                raise ValueError(
                    f"The setting {setting} names the arm {arm!r}, which is not among its own or the study's: {', '.join(config.arms)}."
                )
            if arm == BASE or not rates_from(config, setting, arm):
                raise ValueError(f"The arm {arm!r} cannot run in the setting {setting}: it is called as the base is, or has no rates.")
            odd += [rate for rate in rates_from(config, setting, arm) if config.climb and rate not in LADDER]
        if BASELINE not in arms:
            raise ValueError(f"The setting {setting} has no arm called {BASELINE!r}, which all others are held against; add one.")
    named = [
        (f"{what} {name}", of.get("seeds", 1))
        for what, some in (("setting", config.settings), ("arm", config.arms))
        for name, of in some.items()
    ]
    for who, seeds in (("study", config.seeds), *named):
        if not isinstance(seeds, int) or seeds < 1:
            raise ValueError(f"The {who} asks for {seeds!r} seeds; expected a whole number of at least 1.")
    for options in config.settings.values():
        options_of(_without(options, OF_SETTINGS), "kind", SETTINGS | {sequence.KIND: sequence.InTurn}, "setting")
    for options in config.arms.values():
        options_of(_without(options, OF_ARMS), "method", METHODS, "method")
    as_declared(StudyConfig, vars(config))  # names that files are called by, numbers of processes
    if odd:
        raise ValueError(f"The rate {odd[0]:g} is not on the ladder; expected one of {', '.join(f'{rate:g}' for rate in LADDER)}.")


def _check_kinds(config: StudyConfig) -> None:
    """Refuse values of another kind than is expected, which YAML makes of little slips, before anything is made of them."""
    for kind, entries in (("setting", config.settings), ("arm", config.arms)):
        for name, options in (entries if isinstance(entries, Mapping) else {"": entries}).items():
            if not isinstance(options, Mapping):
                raise ValueError(f"The {kind} {name!r} is {options!r}; expected its options by name, as configs/compare_lab.yaml has them.")
            if kind == "setting" and not isinstance(options.get("rates", {}), Mapping):
                raise ValueError(f"The setting {name!r} has the rates {options['rates']!r}; expected lists by the names of arms.")
            if kind == "setting" and not _is_list_of(options.get("arms", []), str):
                raise ValueError(f"The setting {name!r} has the arms {options['arms']!r}; expected a list of names.")
    lists = {"rates": config.rates, "alphas": config.alphas}
    lists |= {f"alphas of the setting {name}": setting["alphas"] for name, setting in config.settings.items() if "alphas" in setting}
    lists |= {f"rates of the arm {name}": arm["rates"] for name, arm in config.arms.items() if "rates" in arm}
    for setting, options in config.settings.items():
        lists |= {f"rates of {name} in the setting {setting}": rates for name, rates in options.get("rates", {}).items()}
    for what, values in lists.items():
        if not _is_list_of(values, (int, float)):
            raise ValueError(f"The {what} are {values!r}; expected a list of numbers. YAML reads 1e-3 as text: write 1.0e-3.")


def _is_list_of(values: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, kind) for value in values)


def complete(config: StudyConfig, report: Callable[[str], None]) -> list[str]:
    """Make all runs that are missing and return a sentence for each that failed.

    A run that fails is not tried again by this call, and the arm's further runs are left out; a run whose loss is not finite is a result.

    Raises:
        BlockingIOError: If another call makes runs in this folder of results.
    """
    folder = Path(config.results)
    failures: dict[tuple[str, str], str] = {}
    running: dict[Future[str | None], Planned] = {}
    with locked(folder), ThreadPoolExecutor(config.workers) as pool:
        for setting in config.settings:
            clear_partial(folder / setting)
        while True:
            busy = {run.file_name for run in running.values()}
            needed = [
                run
                for setting in config.settings
                for run in missing(config, setting, [arm for where, arm in failures if where == setting])
                if run.file_name not in busy and (setting, run.arm) not in failures
            ]
            begun = needed[: config.workers - len(running)]
            for run in begun:
                running[pool.submit(_run, run, folder, config.threads)] = run
            if not running:
                return list(failures.values())
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                problem = future.result()
                if problem is not None:
                    failures[run.setting, run.arm] = f"{run.setting}, {run.arm} at {run.spec.rate:g}: {problem}"
                report(f"{run.file_name}: {'failed' if problem else 'done'}; {len(needed) - len(begun)} more are planned so far")


def _run(run: Planned, folder: Path, threads: int) -> str | None:
    """Make one run in a process of its own; return the end of what it said if it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as temporary:
        spec = Path(temporary) / "spec.json"
        spec.write_text(json.dumps(dataclasses.asdict(run.spec)))
        command = [sys.executable, "-m", "corda_eval.study.worker", str(spec), str(folder / run.file_name), str(cache_root() / "study")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode < 0:
        return f"killed by the signal {-result.returncode}"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return None if result.returncode == 0 else (lines[-1] if lines else f"ended with {result.returncode}")
