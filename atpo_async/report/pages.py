"""Renders the HTML pages of runs and studies from their templates; whatever a template is given is escaped."""

from __future__ import annotations

from typing import Any


def render(template: str, **values: Any) -> str:
    """Fill a template of ``report/templates`` or ``study/templates``; a value that it asks for must be given."""
    # Imported here, so that only commands that make a page take the time.
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"atpo_async.{package}") for package in ("report", "study")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
