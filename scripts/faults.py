"""The matrix of faults as a table: runs its tests and writes what they measured into docs/faults.md.

    .venv/bin/python scripts/faults.py              # all of tests/test_faults_*.py, then the table
    .venv/bin/python scripts/faults.py --no-docs    # the table on the screen only

A recovery is measured from the fault's end (from the kill, where it has none) until work goes on: the next turn is
acknowledged, the next batch trained.  It is never asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atpo_async.run.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- table of scripts/faults.py: begin -->", "<!-- table of scripts/faults.py: end -->"
RECORD = "ATPO_FAULTS_RECORD"  # the file to which tests append measured recoveries, one JSON object a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measured fault."""

    fault: str
    happens: str
    test: str
    """``tests/file.py::test_name[parameters]``."""
    seconds: float


def measured(file: Path) -> list[Line]:
    """What the tests wrote, the last line of each (test, fault)."""
    found: dict[tuple[str, str], Line] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        line = Line(**json.loads(text))
        found[line.test, line.fault] = line
    return list(found.values())


def table(lines: Sequence[Line]) -> str:
    """Markdown, in the order of the tests."""
    rows = ["| fault | what happens | test | recovery |", "| --- | --- | --- | ---: |"]
    for line in lines:
        file, _, name = line.test.partition("::")
        rows.append(f"| {line.fault} | {line.happens} | `{Path(file).stem}` `{name}` | {line.seconds:.2f} s |")
    return "\n".join(rows)


def note(lines: Sequence[Line]) -> str:
    slowest = max(lines, key=lambda line: line.seconds)
    return (
        f"{len(lines)} lines, measured on {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; the slowest recovery is {slowest.seconds:.1f} s ({slowest.fault})."
    )


def put(docs: str, text: str) -> str:
    """``docs`` with ``text`` between its marks.  Raises ValueError where it has none."""
    if docs.count(BEGIN) != 1 or docs.count(END) != 1:
        raise ValueError(f"{DOCS} needs the line {BEGIN} and the line {END}, once each")
    before, _, rest = docs.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The table of faults and recoveries.")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/faults.md as it is")
    parser.add_argument("-k", default="", help="only tests that match, as for pytest; with --no-docs")
    args = parser.parse_args(argv)
    if args.k and not args.no_docs:
        parser.error("-k leaves lines out: use it with --no-docs")
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "faults.jsonl"
        record.touch()
        tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_faults_*.py"))
        words = [sys.executable, "-m", "pytest", "-q", *(["-k", args.k] if args.k else []), *tests]
        code = subprocess.run(words, cwd=ROOT, env={**os.environ, RECORD: str(record)}, check=False).returncode
        lines = measured(record)
    if code != 0 or not lines:
        print(f"pytest ended with {code}, {len(lines)} lines measured; the table stays as it was", file=sys.stderr)
        return code or 1
    text = f"{table(lines)}\n\n{note(lines)}"
    print(text)
    if not args.no_docs:
        write_atomic(DOCS, put(DOCS.read_text(encoding="utf-8"), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
