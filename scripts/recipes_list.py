"""Writes the list of all recipes in docs/recipes.md anew, from the files themselves.

.venv/bin/python scripts/recipes_list.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from atpo_async.config import as_options, fields, parse_value, recipe_of
from atpo_async.config.files import as_option
from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RECIPES = Path("configs/recipes")
DOCS = Path("docs/recipes.md")
BEGIN, END = "<!-- list of scripts/recipes_list.py: begin -->", "<!-- list of scripts/recipes_list.py: end -->"
ORDER = ("at2po", "at2po_paper", "grpo", "dapo", "gspo", "tree_grpo")
"""These come first; the others follow by name."""


def recipes() -> list[str]:
    """Names of all recipes in the list's order."""
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    return [name for name in ORDER if name in names] + [name for name in names if name not in ORDER]


def is_default(key: str, text: str) -> bool:
    field = fields().get(key)
    if field is None:
        return False  # an option of something that the recipe names
    return bool(parse_value(text) == parse_value(as_option(key, field.get_default(call_default_factory=True))))


def overview() -> str:
    """A row for each recipe: its source, and what it sets otherwise than the defaults; between the list's marks.

    Raises SetupError for a file that is no recipe.
    """
    lines = ["| recipe | source | settings other than the defaults |", "| --- | --- | --- |"]
    for name in recipes():
        path = RECIPES / f"{name}.toml"
        about = recipe_of(path)
        if about is None:
            raise SetupError(f"{path} has no [recipe] with its name and source")
        own = {key: text for key, text in as_options(path).items() if not is_default(key, text)}
        settings = ", ".join(f"`{key} = {text}`" for key, text in own.items())
        lines.append(f"| [{name}](../{path}) | {about.source} | {settings or 'none'} |")
    scales = []
    for path in sorted((RECIPES / "demo_scale").glob("*.toml")):
        settings = ", ".join(f"`{key} = {text}`" for key, text in as_options(path).items())
        scales.append(f"- [recipes/demo_scale/{path.name}](../{path}): {settings}")
    return "\n".join([BEGIN, "", *lines, "", "For the demo's scale, on top:", "", *scales, "", END])


def put(page: str, text: str) -> str:
    """``page`` with ``text`` in place of its marks and what is between.  Raises SetupError where they are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SetupError(f"{DOCS} does not have the lines {BEGIN!r} and {END!r}, between which the list goes")
    return before + text + after


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    os.chdir(ROOT)
    try:
        write_atomic(DOCS, put(DOCS.read_text(encoding="utf-8"), overview()))
    except AtpoError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
