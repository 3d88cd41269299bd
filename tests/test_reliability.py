"""The fault catalogue is complete: rows, their tests, and the table that was written last."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from reliability import SECTIONS, VERDICTS, Reliability, beside, ids_of, read_catalogue

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "reliability_table.md"
ROWS = read_catalogue()
N_ROWS = {"A": 46, "B": 20, "C": 22, "D": 9, "E": 16, "F": 7, "M": 5, "L": 5}


@pytest.fixture(scope="module")
def tested() -> set[str]:
    """The rows that the names of tests claim, in any file."""
    trees = [ast.parse(path.read_text("utf-8")) for path in TESTS.glob("test_*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return {row_id for name in names for row_id in ids_of(name)}


def test_rows_are_complete_and_in_order():
    expected = [f"{letter}{i:02}" for letter, n in N_ROWS.items() for i in range(1, n + 1)]
    assert [row.id for row in ROWS] == expected
    assert list(SECTIONS) == list(N_ROWS)
    for row in ROWS:
        assert row.fault, row
        assert row.expected, row
        assert {"", *VERDICTS}.issuperset(row.verdict.split("/")), row
        assert row.scvi or not row.verdict, row


def test_every_row_has_a_test_or_a_reason(tested):
    assert [row.id for row in ROWS if row.id not in tested and not row.reason] == []


def test_no_test_is_of_a_row_that_does_not_exist(tested):
    assert tested - {row.id for row in ROWS} == set()


def test_the_table_has_the_rows_of_the_catalogue():
    lines = re.findall(r"^\| ([A-Z]\d\d) \| (.*) \|$", TABLE.read_text("utf-8"), re.MULTILINE)
    assert [row_id for row_id, _ in lines] == [row.id for row in ROWS]
    for row, (_, cells) in zip(ROWS, lines, strict=True):
        fault, happens, _, _, scvi = (cell.strip() for cell in f"{cells} ".split(" | "))
        assert (fault, scvi) == (row.fault, beside(row))
        assert happens.startswith(row.expected)


def report(name: str, when: str, outcome: str, classes: list[str]) -> pytest.TestReport:
    place = ("tests/test_x.py", 1, name)
    said = {"longrepr": None, "user_properties": [("classes", classes)]}
    return pytest.TestReport(f"{place[0]}::Test::{name}", place, {}, outcome, when=when, **said)


def table_of(*reports: pytest.TestReport) -> list[str]:
    plugin = Reliability(Path("unwritten"), is_worker=False)
    for ended in reports:
        plugin.pytest_runtest_logreport(ended)
    return plugin.table().splitlines()


def test_the_table_says_what_became_of_the_tests():
    lines = table_of(
        report("test_A01_x[NBVAE-1]", "setup", "passed", []),
        report("test_A01_x[NBVAE-1]", "call", "passed", []),
        report("test_A01_x[a-ZINBVAE]", "call", "passed", ["ZINBVAE", "CondVAE"]),
        report("test_A02_A03_x[OtherVAE]", "call", "passed", []),
        report("test_A03_y", "call", "failed", []),
        report("test_A04_x", "call", "passed", []),
        report("test_A04_x", "teardown", "failed", []),
        report("test_A05_x", "setup", "skipped", []),
        report("test_A06_x", "call", "passed", []),
        report("test_A06_y", "call", "skipped", []),
    )
    cells = {line[2:5]: line.split(" | ")[3:5] for line in lines if line.startswith("| ")}
    assert cells["A01"] == ["2", "3"]
    assert cells["A02"] == ["1", ""]
    assert cells["A03"] == ["1, 1 failed", ""]
    assert cells["A04"] == ["none, 1 failed", ""]
    assert cells["A05"] == ["none, 1 skipped", ""]
    assert cells["A06"] == ["1, 1 skipped", ""]
    assert cells["A07"] == ["none", ""]
    n_excused = sum(bool(row.reason) for row in ROWS)
    open_rows = len(ROWS) - 3 - n_excused
    assert lines[0].startswith(f"**3 of {len(ROWS)} rows hold**, by 4 tests; ")
    assert lines[0].endswith(f"**{open_rows} open**.")


def test_a_test_that_is_expected_to_fail_does_not_hold():
    ended = report("test_A01_x", "call", "skipped", [])
    ended.wasxfail = "not yet"
    assert table_of(ended)[0].startswith(f"**0 of {len(ROWS)} rows hold**")


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("test_A16_A17_A18_not_finite", ["A16", "A17", "A18"]),
        ("test_B07_kill_9", ["B07"]),
        ("test_F1_score", []),
        ("test_a_line_of_A01_x", []),
    ],
)
def test_rows_of_a_name(name, ids):
    assert ids_of(name) == ids
