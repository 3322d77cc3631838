"""docs/faults.md says what the tests hold: every test of the matrix is a line, every line is a test."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from scripts import faults

ROOT = Path(__file__).resolve().parent.parent


def named_in_the_table() -> set[tuple[str, str]]:
    """(file's stem, test without its parameters)."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").partition(faults.BEGIN)[2]
    return set(re.findall(r"\| `(test_faults_\w+)` `(test_\w+)[^`]*` \|", text.partition(faults.END)[0]))


def test_every_test_of_the_matrix_is_a_line_of_the_table_and_every_line_a_test() -> None:
    written = set()
    for path in (ROOT / "tests").glob("test_faults_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                written.add((path.stem, node.name))
    assert named_in_the_table() == written


def test_every_test_that_the_page_names_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    there = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        there |= {path.stem, *re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))}
    named = set(re.findall(r"`(test_\w+)[^`]*`", text))
    assert named - there == set()


def test_the_table_holds_the_last_measurement_of_each_line(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    line = {"fault": "a cut", "happens": "it heals", "test": "tests/test_faults_links.py::test_a[x]"}
    record.write_text("".join(json.dumps(line | {"seconds": seconds}) + "\n" for seconds in (3.0, 0.25)))
    lines = faults.measured(record)
    assert "| a cut | it heals | `test_faults_links` `test_a[x]` | 0.25 s |" in faults.table(lines)
    assert "1 lines" in faults.note(lines)


def test_the_table_goes_between_its_marks_and_nowhere_else() -> None:
    docs = f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter\n"
    assert faults.put(docs, "new") == f"before\n{faults.BEGIN}\n\nnew\n\n{faults.END}\nafter\n"
    with pytest.raises(ValueError, match="needs the line"):
        faults.put("no marks", "new")
