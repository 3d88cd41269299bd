"""The table of docs/reliability.md, from the tests that ran: ``pytest --reliability=PATH``.

The rows are those of ``data/fault_catalogue.csv``. A test belongs to the rows whose ids its name
begins with, ``test_A16_A17_not_finite``; other tests are left out of the run. A row holds if it
has a test that passed, and none that failed.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import faults
import pytest

CATALOGUE = Path(__file__).parent / "data" / "fault_catalogue.csv"
SECTIONS = {
    "A": "Setup",
    "B": "Training",
    "C": "Sampling and predicting",
    "D": "Results in an AnnData",
    "E": "Files",
    "F": "Evaluation",
    "M": "Several modalities",
    "L": "Processes, threads and limits",
}
VERDICTS = {"S": "silent", "C": "crash", "W": "warning", "OK": "handled"}
"""What scvi-tools was measured to do, the worst first."""
CLASSES = {model_class.__name__ for model_class in faults.MODELS}


class Row(NamedTuple):
    """A line of the catalogue."""

    id: str
    fault: str
    expected: str
    verdict: str
    """Keys of :data:`VERDICTS`, several joined by "/", or nothing where it was not measured."""
    scvi: str
    reason: str
    """Why there is no test."""


def read_catalogue() -> list[Row]:
    with CATALOGUE.open(encoding="utf-8", newline="") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def ids_of(test: str) -> list[str]:
    """The rows that the name of a test begins with."""
    found = re.match(r"test((?:_[A-Z]\d\d)+)_", test)
    return found[1].split("_")[1:] if found else []


def classes_of(test: str) -> set[str]:
    """The models that the id of a test names among its parameters."""
    return CLASSES & set(re.findall(r"\w+", test.partition("[")[2]))


class Reliability:
    """Collects what became of the tests of each row; writes it when they have all run."""

    def __init__(self, path: Path, *, is_worker: bool) -> None:
        self.path, self.is_worker = path, is_worker
        self.outcomes: dict[str, str] = {}
        self.classes: dict[str, set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        others = [item for item in items if not ids_of(item.name)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if ids_of(item.name)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        faults.SET_UP.clear()
        try:
            return (yield)
        finally:  # a property of the report, with which it comes from a worker
            item.user_properties.append(("classes", sorted(faults.SET_UP)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome
        if self.outcomes.get(test, "passed") == "passed":  # in set-up, call and tear-down
            self.outcomes[test] = outcome
        if report.when == "call":
            self.classes[test] = classes_of(test).union(dict(report.user_properties)["classes"])

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        ran = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if ran and not self.is_worker:
            self.path.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        rows = read_catalogue()
        tests = defaultdict(list)
        for test in self.outcomes:
            for row_id in ids_of(test.partition("[")[0].rpartition("::")[2]):
                tests[row_id].append(test)
        counts = {row.id: Counter(self.outcomes[test] for test in tests[row.id]) for row in rows}
        lines = [summary(rows, counts, Counter(self.outcomes.values())["passed"])]
        for letter, title in SECTIONS.items():
            lines += [
                f"\n### {title}\n",
                "| | fault | what happens | tests | models | SCVI 1.4.2 |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
            for row in rows:
                if row.id.startswith(letter):
                    passed = [t for t in tests[row.id] if self.outcomes[t] == "passed"]
                    n_classes = len(set().union(*(self.classes[test] for test in passed)))
                    cells = (
                        row.id, row.fault, f"{row.expected} {row.reason and f'*{row.reason}*'}",
                        said(counts[row.id]), str(n_classes or ""), beside(row),
                    )  # fmt: skip
                    lines.append(f"| {' | '.join(cell.strip() for cell in cells)} |")
        return "\n".join(lines) + "\n"


def holds(count: Counter[str]) -> bool:
    return count["passed"] > 0 and count["failed"] == 0


def summary(rows: list[Row], counts: dict[str, Counter[str]], n_passed: int) -> str:
    """How many rows hold, and what the worst was that scvi-tools did where it was measured."""
    n_holding = sum(holds(counts[row.id]) for row in rows)
    n_excused = sum(bool(row.reason) and not counts[row.id] for row in rows)
    found = [f"**{n_holding} of {len(rows)} rows hold**, by {n_passed} tests"]
    if n_excused:
        found.append(f"{n_excused} cannot be tested, for the reason in the row")
    if n_open := len(rows) - n_holding - n_excused:
        found.append(f"**{n_open} open**")
    worst = Counter(row.verdict.split("/")[0] for row in rows if row.verdict)
    verdicts = ", ".join(f"{word} {worst[key]}" for key, word in VERDICTS.items())
    return f"{'; '.join(found)}.\n\nSCVI 1.4.2, measured in {worst.total()} rows: {verdicts}."


def said(count: Counter[str]) -> str:
    """The number of tests that passed, and of others."""
    others = [f"{count[key]} {key}" for key in ("failed", "skipped") if count[key]]
    return ", ".join([str(count["passed"] or "none"), *others])


def beside(row: Row) -> str:
    """What scvi-tools did, in words."""
    verdict = ", ".join(VERDICTS[key] for key in row.verdict.split("/") if key)
    return f"{verdict}: {row.scvi}" if verdict else row.scvi
