"""How much is drilled, the folder that all of it starts from, and the table of what came of it."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "vlm"))  # recipes.py, when this folder is run alone

from drill.kills import Bench
from drill.place import Place, make_place

AMOUNTS = {"kills": 24, "damage": 240, "options": 180}
"""What a run without options does: it ends within minutes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for kind, amount in AMOUNTS.items():
        parser.addoption(f"--drill-{kind}", type=int, default=amount, help=f"How many {kind} the drill of faults tries at least.")
    parser.addoption("--drill-seed", type=int, default=0, help="Other faults than those of seed 0.")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many faults of each kind came to what."""
    totals: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, counts in getattr(report, "user_properties", []) if getattr(report, "when", "") == "call" else []:
                if key == "drill":
                    for kind, outcomes in counts.items():
                        totals.setdefault(kind, Counter()).update(outcomes)
    for kind, outcomes in sorted(totals.items()):
        terminalreporter.write_line(f"drill: {kind}: {dict(sorted(outcomes.items()))}")


class Drill:
    """How much to do, with which seed, and what has come of it so far."""

    def __init__(self, config: pytest.Config) -> None:
        # This file is read too late to declare options where its folder is not named on the command line.
        self.amounts = {kind: int(config.getoption(f"--drill-{kind}", default=amount)) for kind, amount in AMOUNTS.items()}
        self.seed = int(config.getoption("--drill-seed", default=0))
        self.counts: dict[str, dict[str, int]] = {}  # plain: they travel between the processes of pytest-xdist

    def count(self, kind: str, outcome: str, times: int = 1) -> None:
        """Note what one fault came to."""
        outcomes = self.counts.setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + times


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> Iterator[Drill]:
    drill = Drill(request.config)
    request.node.user_properties.append(("drill", drill.counts))
    return drill


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Place:
    return make_place(tmp_path_factory.mktemp("drill"), processor)


@pytest.fixture(scope="session")
def bench(place: Place) -> Iterator[Bench]:
    with Bench(place.folder / "logs") as bench:
        yield bench
