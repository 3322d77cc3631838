"""The sentences that a study's results support.  Pure: a summary in, sentences out.

A difference is stated only where it is larger than what seeds do (``summary.Yardstick``); a group with a failed or
missing cell is described and never compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atpo_async.study.cells import FINAL
from atpo_async.study.plan import CORRECTIONS
from atpo_async.study.summary import Comparison, Group, Spread, Summary, Yardstick, compare

PHRASES = {name: correction.phrase for name, correction in CORRECTIONS.items()}
"""The name of a correction in a sentence."""


def sentences(summary: Summary) -> list[str]:
    """The conclusions, with the corrections called by ``PHRASES``."""
    return conclusions(summary, PHRASES)


def conclusions(summary: Summary, phrases: Mapping[str, str] | None = None) -> list[str]:
    """Sentences that the results support: of final sampled success, the largest lag first, then of other figures.

    Args:
        phrases: name of a correction -> how a sentence calls it ("turn-level truncation").

    Every lag has a sentence: no part of the grid that contradicts another is left out.
    """
    phrases = phrases or {}
    if not any(group.spread(FINAL) for group in summary.groups.values()):
        ended = len(summary.results)
        return [f"No conclusion: {ended} of {_num_planned(summary)} cells have ended, none with a result."]
    found = []
    if len(summary.seeds) < 2:
        found.append("With one seed a cell no difference can be told from chance; the figures are what was measured.")
    yardstick = Yardstick.of(summary)
    reference = "none" if "none" in summary.corrections else summary.corrections[0]
    others = [name for name in summary.corrections if name != reference]
    if others:
        found += _against(summary, yardstick, reference, others, phrases)
        found += _among(summary, yardstick, others)
        for key, name in (("area", "the area under the learning curve"), ("greedy", "greedy success")):
            found += _by(summary, key, name, reference, others)
    if len(summary.lags) > 1:
        found += _price(summary, yardstick, phrases)
    found += _incomplete(summary)
    return found


def _num_planned(summary: Summary) -> int:
    return sum(group.planned for group in summary.groups.values())


def _against(
    summary: Summary, yardstick: Yardstick, reference: str, others: Sequence[str], phrases: Mapping[str, str]
) -> list[str]:
    """Each lag's corrections beside ``reference``: lags with a difference first, the largest lag leading."""
    apart: list[str] = []
    alike: list[int] = []
    open_lags: list[str] = []
    empty: list[int] = []
    for lag in sorted(summary.lags, reverse=True):
        base = summary[lag, reference]
        made = {name: compare(summary[lag, name], base, yardstick) for name in others}
        signs = {c.sign for c in made.values()}
        if not any(group.spread(FINAL) for group in (base, *(c.first for c in made.values()))):
            empty.append(lag)
        elif signs == {"same"}:
            alike.append(lag)
        elif signs & {"above", "below"}:
            apart.append(_told_apart(lag, base, made, phrases))
        else:
            open_lags.append(_only_figures(lag, [base, *(c.first for c in made.values())], phrases))
    found = apart
    if alike:
        found.append(_alike(summary, sorted(alike), reference, others, phrases))
    found += open_lags
    if empty:
        found.append(f"At {_lags(sorted(empty))} no cell has given a result.")
    return found


def _told_apart(lag: int, base: Group, made: Mapping[str, Comparison], phrases: Mapping[str, str]) -> str:
    parts = [f"At lag {lag} training {_with(base, phrases)} ends at {_level(base)}"]
    for sign, lead in (
        ("above", "higher:"),
        ("below", "lower:"),
        ("same", "not told apart from that:"),
        (None, "not compared:"),
    ):
        groups = [c.first for c in made.values() if c.sign == sign]
        if groups:
            parts.append(f"{lead} {_listed([f'{_with(g, phrases)} at {_level(g)}' for g in groups])}")
    text = "; ".join(parts) + "."
    if lag == 0:
        text += "  Age cannot be the reason there: at lag 0 all corrections are one computation, engine mismatch apart."
    return text


def _alike(
    summary: Summary, lags: Sequence[int], reference: str, others: Sequence[str], phrases: Mapping[str, str]
) -> str:
    spreads = {(lag, name): _spread(summary[lag, name]) for lag in lags for name in (reference, *others)}
    difference = max(abs(spreads[lag, name].mean - spreads[lag, reference].mean) for lag in lags for name in others)
    widest = max(s.range for s in spreads.values())
    means = [s.mean for s in spreads.values()]
    return (
        f"At {_lags(lags)} nothing is told apart from training {_with(summary[lags[0], reference], phrases)} beyond "
        f"what seeds do: the means are {min(means):.2f} to {max(means):.2f}, the largest difference at one lag is "
        f"{difference:.2f}, the largest spread over seeds {widest:.2f}."
    )


def _only_figures(lag: int, groups: Sequence[Group], phrases: Mapping[str, str]) -> str:
    return f"At lag {lag}, without a comparison: {_listed([f'{_with(g, phrases)} {_level(g)}' for g in groups])}."


def _among(summary: Summary, yardstick: Yardstick, names: Sequence[str]) -> list[str]:
    """Corrections beside one another, by name."""
    if len(names) < 2:
        return []
    parts, alike, compared = [], [], True
    for lag in sorted(summary.lags, reverse=True):
        here = []
        for i, first in enumerate(names):
            made = [compare(summary[lag, first], summary[lag, second], yardstick) for second in names[i + 1 :]]
            compared &= all(c.sign is not None for c in made)
            for sign in ("above", "below"):
                others = [c.second for c in made if c.sign == sign]
                if others:
                    here.append(f"{_short(summary[lag, first])} ends {sign} {_listed([_short(g) for g in others])}")
        if here:
            parts.append(f"at lag {lag} {_listed(here)}")
        else:
            alike.append(lag)
    if parts:
        rest = f"; at {_lags(sorted(alike))} none is told apart from another" if alike and compared else ""
        return [f"Among the corrections, {'; '.join(parts)}{rest}."]
    if not compared:
        return []
    return [f"Among the corrections themselves none is told apart from another, at {_lags(sorted(summary.lags))}."]


def _by(summary: Summary, key: str, name: str, reference: str, others: Sequence[str]) -> list[str]:
    """The same beside ``reference`` by another figure; nothing where no cell has it."""
    yardstick = Yardstick.of(summary, key)
    parts, alike = [], []
    for lag in sorted(summary.lags, reverse=True):
        base = summary[lag, reference]
        made = [compare(summary[lag, other], base, yardstick, key) for other in others]
        here = []
        for sign, word in (("above", "below"), ("below", "above")):
            groups = [c.first for c in made if c.sign == sign]
            if groups:
                here.append(f"{word} {_listed([_short(group, key) for group in groups])}")
        if here:
            parts.append(f"at lag {lag} {_short(base, key)} is {' and '.join(here)}")
        elif all(c.sign == "same" for c in made):
            alike.append(lag)
    if alike:
        parts.append(f"at {_lags(sorted(alike))} nothing is told apart from {reference}")
    return [f"By {name}, {'; '.join(parts)}."] if parts else []


def _short(group: Group, key: str = FINAL) -> str:
    spread = group.spread(key)
    return group.correction if spread is None else f"{group.correction} ({spread.mean:.2f})"


def _price(summary: Summary, yardstick: Yardstick, phrases: Mapping[str, str]) -> list[str]:
    """Each correction at its lags beside the smallest lag of the grid."""
    start, *lags = sorted(summary.lags)
    free, found = [], []
    for name in summary.corrections:
        base = summary[start, name]
        made = [compare(summary[lag, name], base, yardstick) for lag in lags]
        if all(c.sign == "same" for c in made):
            free.append(name)
            continue
        parts = []
        for sign in ("below", "above"):
            there = [c.first for c in made if c.sign == sign]
            if there:
                parts.append(f"{sign} that at {_listed([f'lag {g.lag} ({_spread(g).mean:.2f})' for g in there])}")
        if parts:
            found.append(
                f"{_capital(_with(base, phrases))}, success is {_level(base)} at lag {start} and {' and '.join(parts)}"
            )
    sentences = [f"{text}." for text in found]
    if free:
        listed = _listed([_with(summary[start, name], phrases) for name in free], last="or")
        sentences.append(
            f"{_capital(listed)}, success up to lag {lags[-1]} is not told apart from that at lag {start}."
        )
    return sentences


def _incomplete(summary: Summary) -> list[str]:
    failed = [r for r in summary.results if r.status == "failed"]
    found = []
    if failed:
        listed = "; ".join(f"{r.cell.label}: {r.reason}" for r in failed[:4])
        more = f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
        found.append(f"Failed, and in no mean: {len(failed)} of {_num_planned(summary)} cells ({listed}{more}).")
    if summary.num_missing:
        found.append(f"Not run to the end yet: {summary.num_missing} of {_num_planned(summary)} cells.")
    return found


def _level(group: Group) -> str:
    """Final success with its range, or what happened instead."""
    spread = group.spread(FINAL)
    notes = group.shortfalls()
    if spread is None:
        return f"no result ({', '.join(notes) or 'no figure'})"
    return spread.text() + (f" [{', '.join(notes)}]" if notes else "")


def _spread(group: Group) -> Spread:
    spread = group.spread(FINAL)
    assert spread is not None
    return spread


def _called(name: str, phrases: Mapping[str, str]) -> str:
    return phrases.get(name, name)


def _with(group: Group, phrases: Mapping[str, str]) -> str:
    return "without a correction" if group.correction == "none" else f"with {_called(group.correction, phrases)}"


def _lags(lags: Sequence[int]) -> str:
    return f"lag{'s' if len(lags) > 1 else ''} {_listed([str(lag) for lag in lags])}"


def _listed(parts: Sequence[str], last: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
