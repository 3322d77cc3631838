"""The sentences that a study's results support.  Pure: a summary in, sentences out.

A difference is stated only where ``comparisons`` tells it from chance; "not told apart" comes with the differences that
the intervals leave possible, and is never called equal unless they leave none that matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from atpo_async.study.cells import AT_TOKENS, FINAL
from atpo_async.study.grid.corrections import CORRECTIONS
from atpo_async.study.grid.names import CORRECTION, FILES, LAG, TASK, label
from atpo_async.study.results.comparisons import (
    SAME,
    Comparison,
    by_reference,
    compare_all,
    num_comparisons,
    num_corrected_for,
)
from atpo_async.study.results.statistics import ALPHA
from atpo_async.study.results.summary import MEASURED, At, Group, Summary

FIGURES: dict[str, str] = {
    FINAL: "sampled success at the end",
    AT_TOKENS: "sampled success at equal tokens",
    "area": "the area under the learning curve",
    "greedy": "greedy success",
}
"""Figures that sentences are about -> what they are called."""


def sentences(summary: Summary) -> list[str]:
    """What the results say: of the main figure in full, then of the others; last what is missing.

    Every part of the grid has a sentence: none that contradicts another is left out.
    """
    final = summary.final
    if not any(group.spread(final) for group in summary.groups.values()):
        return [f"No conclusion: {len(summary.results)} of {summary.num_planned} cells have ended, none with a result."]
    found = []
    if len(summary.seeds) < 2:
        found.append("With one seed a cell no difference can be told from chance; the figures are what was measured.")
    found += _of_figure(summary, final, full=True)
    for key in ("area", "greedy"):
        if any(group.values(key) for group in summary.groups.values()):
            found += _of_figure(summary, key, full=False)
    if num_comparisons(summary.axes) == 0:
        found.append("Nothing is compared: the values of the axes are different tasks, or there is one of each.")
    return found + _same_runs(summary) + _incomplete(summary)


def _same_runs(summary: Summary) -> list[str]:
    """A line for values of an axis that were the same runs: what they have in common is no result."""
    by_values: dict[tuple[str, tuple[str, ...]], int] = {}
    for (axis, _), made in by_reference(compare_all(summary, summary.final)).items():
        if same := tuple(each.value for each in made if each.is_same_run):
            key = axis, (*same, made[0].reference.value(axis))
            by_values[key] = by_values.get(key, 0) + 1
    found = []
    for (axis, values), count in by_values.items():
        places = len(summary.groups) // next(len(each.values) for each in summary.axes if each.name == axis)
        where = "" if count == places else f", in {count} of {places} places"
        training = _listed([_where(axis, value) for value in values])
        found.append(
            f"The same run, step by step and seed by seed{where}: training {training}; what {axis} sets had no effect "
            "there."
        )
    return found


def _of_figure(summary: Summary, key: str, *, full: bool) -> list[str]:
    """The comparisons of one figure, along one axis after the other; differences first.

    Args:
        full: every reference's level is told, also where nothing differs.
    """
    groups = by_reference(compare_all(summary, key))
    along_x = summary.x_axis.name if summary.x_axis is not None else ""
    told: list[str] = []
    for axis in sorted(summary.axes, key=lambda axis: axis.name == along_x):  # the price of a number comes last
        alike: list[list[Comparison]] = []
        for (name, _), made in groups.items():
            signs = {each.sign for each in made}
            if name != axis.name:
                continue
            if signs & {"above", "below"}:
                told.append(_told_apart(made, key))
            elif signs == {"open"}:
                alike.append(made)
            elif full:
                told.append(_only_figures(made, key))
        if alike:
            told.append(_alike(summary, axis.name, alike, when=_when(key)))
    if full or not told:
        return told
    return [f"By {FIGURES[key]}: {_lower(line)}" for line in told]


def _told_apart(made: Sequence[Comparison], key: str) -> str:
    reference = made[0].reference
    what = "it" if key == "area" else f"success{_when(key)}"
    parts = [f"{_capital(_place(reference.at))}, {what} is {_level(reference, key)}"]
    for sign, lead in (("above", "higher"), ("below", "lower"), (None, "not compared:")):
        here = [each for each in made if each.sign == sign]
        if here:
            listed = _listed([f"{_where(each.axis, each.value)}{_detail(each, key)}" for each in here])
            parts.append(f"{lead} {listed}")
    open_ones = [each for each in made if each.sign == "open"]
    if open_ones:
        parts.append(f"not told apart {_wheres(open_ones)} ({_bound(open_ones)})")
    return "; ".join(parts) + "."


def _detail(each: Comparison, key: str) -> str:
    """A level and its difference, or why there is none."""
    if each.difference is None:
        return f" ({each.why_not}; {_level(each.first, key)})"
    low, high = (min(max(end, -1.0), 1.0) for end in each.difference.within())  # of shares
    spread = each.first.spread(key)
    assert spread is not None
    return f" ({spread.mean:.2f}, {_signed(each.difference.value)} [{_signed(low)}, {_signed(high)}])"


def _signed(value: float) -> str:
    """``+0.12``; what rounds to nothing has no sign."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def _when(key: str) -> str:
    """Of the main figure, where it is not that of the end."""
    return " at equal tokens" if key == AT_TOKENS else ""


def _alike(summary: Summary, axis: str, groups: Sequence[Sequence[Comparison]], *, when: str) -> str:
    """References beside which nothing is told apart, in one sentence."""
    every = [each for made in groups for each in made]
    places = [tuple(pair for pair in made[0].reference.at if pair[0] != axis) for made in groups]
    against = _where(axis, every[0].reference.value(axis))
    where = _places(summary, axis, places)
    values = list(dict.fromkeys(each.value for each in every))
    told = f"training {_where(axis, values[0])} is not" if len(values) == 1 else "nothing is"
    low, high = (
        _signed(end([each.difference.value for each in every if each.difference is not None])) for end in (min, max)
    )
    measured = f"the measured difference is {low}" if low == high else f"measured differences are {low} to {high}"
    return (
        f"{_capital(f'{where}, {told}' if where else told)} told apart from training {against}{when}: {measured}; "
        f"{_bound(every)}."
    )


def _bound(made: Sequence[Comparison]) -> str:
    """What the intervals, which hold together, leave possible."""
    bound = max(abs(end) for each in made for end in each.simultaneous)
    shown = min(1.0, math.ceil(bound * 100) / 100)
    if bound <= SAME:
        return f"equal within {shown:.2f}, as far as these runs tell"
    return f"differences up to {shown:.2f} are not excluded"


def _only_figures(made: Sequence[Comparison], key: str) -> str:
    groups = [made[0].reference, *(each.first for each in made)]
    place = tuple(pair for pair in made[0].reference.at if pair[0] != made[0].axis)
    lead = f"{_capital(_place(place))}, w" if place else "W"
    named = [f"{_where(made[0].axis, g.value(made[0].axis))} {_level(g, key)}" for g in groups]
    return f"{lead}ithout a comparison{_when(key)}: {_listed(named)}."


def _incomplete(summary: Summary) -> list[str]:
    failed = [r for r in summary.results if r.status == "failed"]
    found = []
    if failed:
        listed = "; ".join(f"{r.cell.label}: {r.reason}" for r in failed[:4])
        more = f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
        found.append(f"Failed, and in no mean: {len(failed)} of {summary.num_planned} cells ({listed}{more}).")
    if summary.num_missing:
        found.append(f"Not run to the end yet: {summary.num_missing} of {summary.num_planned} cells.")
    return found


# --- words --------------------------------------------------------------------------------------------------------


def method(summary: Summary) -> str:
    """How differences are told from chance, for the reader of the results."""
    count, every = num_comparisons(summary.axes), num_corrected_for(summary)
    floor = f"of success a spread below {MEASURED:g} counts as {MEASURED:g}"
    intervals = f"Brackets: Student's t interval of the mean over {num_seeds(summary)}, 95 %; {floor}."
    if not count or len(summary.seeds) < 2:
        return intervals if len(summary.seeds) > 1 else "One seed has no interval."
    seeds = len(summary.seeds)
    those = "comparison" if every == 1 else f"{every} comparisons"
    part = f", of which {'this is one' if count == 1 else f'these are {count}'}" if every > count else ""
    return (
        f"{intervals}  After a difference: its own 95 % interval, by Welch's test.  A difference is stated where that "
        f"test, corrected for the {those} of each figure{part} (Holm), is below {ALPHA:g}: all statements "
        f"about a figure hold together with 95 %, where runs scatter normally; where one group scatters several times "
        f'as much as the other, a test of few seeds errs up to twice as often.  What is "not excluded" are differences '
        f"that intervals leave possible which hold together at 95 % (Bonferroni); "
        f'"equal" is said only where they leave nothing above {SAME:g}.  '
        f"None of this knows of runs that fail now and then: of a group none of whose {seeds} runs did, up to "
        f"{1 - ALPHA ** (1 / seeds):.0%} of all runs may (95 %)."
    )


def num_seeds(summary: Summary) -> str:
    return "one seed" if len(summary.seeds) == 1 else f"{len(summary.seeds)} seeds"


def _level(group: Group, key: str) -> str:
    """The figure with its interval, or what happened instead."""
    spread = group.spread(key)
    notes = group.shortfalls()
    if spread is None:
        return f"no result ({', '.join(notes) or 'no figure'})"
    return spread.text() + (f" ({', '.join(notes)})" if notes else "")


def _where(axis: str, value: str) -> str:
    """A value of an axis in a sentence: ``at lag 8``, ``with turn-level truncation``."""
    if axis == LAG:
        return f"at lag {value}"
    if axis == TASK:
        return f"on {value}"
    if axis == CORRECTION:
        return "without a correction" if value == "none" else f"with {CORRECTIONS[value].phrase}"
    return f"with {label(axis, value)}"


def _wheres(made: Sequence[Comparison]) -> str:
    """Values of one axis in a sentence; names of files, which may be many, share their preposition."""
    axis = made[0].axis
    if axis in FILES and axis != TASK:
        return f"with {_listed([label(axis, each.value) for each in made])}"
    return _listed([_where(axis, each.value) for each in made])


def _place(at: At) -> str:
    return " ".join(_where(axis, value) for axis, value in at)


def _places(summary: Summary, axis: str, places: Sequence[At]) -> str:
    """Several places of the grid: ``at lags 0 and 2``; empty where there is one, which has no name."""
    others = [each for each in summary.axes if each.name != axis]
    if not others:
        return ""
    if len(others) == 1 and others[0].name == LAG:
        lags = [dict(at)[LAG] for at in places]
        return f"at lag{'s' if len(lags) > 1 else ''} {_listed(lags)}"
    return _listed([_place(at) for at in places])


def _listed(parts: Sequence[str], last: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
