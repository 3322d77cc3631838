"""How large files, folders and functions may grow, and which words no text uses; read from the files themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("actors", "atpo_async", "buffer", "inprocess", "learner")
MAX_LINES = 450
MAX_MODULES = 14
MAX_FUNCTION_LINES, P90_FUNCTION_LINES = 80, 30

PRIVATE_WORDS = {
    r"\bpictures?\b": "status, or figure",
    r"\brooms\b": "modules, or parts",
    r"\bstations?\b": "kill point",
    r"\bholdings?\b": "trees",
    r"\b(whoever|somebody|nobody)\b": "which role, process or user it is",
}
"""Words that need this project's history to be understood -> what is said instead."""


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions() -> Iterator[tuple[str, int]]:
    """(where, lines from the first decorator to the last line) of every function."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                yield f"{name_of(path)}:{first}: {node.name}", (node.end_lineno or first) - first + 1


def test_no_file_is_longer_than_a_reader_takes_in() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in files()}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_no_folder_holds_more_modules_than_a_reader_takes_in() -> None:
    folders = {path.parent for path in files()}
    counts = {name_of(folder): len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name: count for name, count in counts.items() if count > MAX_MODULES}


def test_functions_fit_on_a_screen() -> None:
    lengths = dict(functions())
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    ordered = sorted(lengths.values())
    assert ordered[int(0.9 * len(ordered))] <= P90_FUNCTION_LINES


@pytest.mark.parametrize("word", PRIVATE_WORDS)
def test_no_text_uses_a_private_word(word: str) -> None:
    documents = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")]
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path in [*files(), *documents]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(word, line, re.IGNORECASE)
    ]
    assert not found, f"say {PRIVATE_WORDS[word]} instead:\n" + "\n".join(found)


def test_every_file_that_the_documents_name_is_there() -> None:
    packages = "|".join((*PACKAGES, "benchmarks", "configs", "docs", "scripts", "tests"))
    path = re.compile(rf"[`(](?:\.\./)*((?:{packages})/[\w./-]*\.(?:py|md|toml|yaml|svg|png))[`)]")
    missing = [
        f"{name_of(document)}: {named}"
        for document in (ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md")))
        for named in path.findall(document.read_text())
        if not (ROOT / named).exists()
    ]
    assert not missing
