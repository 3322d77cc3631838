"""The named settings of ``[correction]`` that an axis ``correction`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """A named correction.  Fields it does not name keep what the configuration says."""

    phrase: str
    """Its name in a sentence."""
    fields: Mapping[str, Any]
    """Dotted path -> value."""


PLAIN: dict[str, Any] = {
    # A name stands for exactly its correction: no guard that changes the exponent, no gate, nothing besides.
    "correction.exponent": "fixed",
    "correction.exponent_value": 1.0,
    "correction.ess_floor": 0.0,
    "correction.floor": 0.0,
    "correction.gate": None,
    "correction.numerator": "prox",
    "correction.accept_bias": False,
}


def _fields(action: str, level: str, **more: Any) -> dict[str, Any]:
    named = {name if "." in name else f"correction.{name}": value for name, value in more.items()}
    return PLAIN | {"correction.action": action, "correction.level": level} | named


CORRECTIONS: dict[str, Correction] = {
    name: Correction(phrase=phrase, fields=fields)
    for name, phrase, fields in (
        ("none", "no correction", _fields("none", "turn", accept_bias=True)),
        ("token", "token-level truncation", _fields("truncate", "token")),
        ("turn", "turn-level truncation", _fields("truncate", "turn")),
        ("turn+ess", "turn-level truncation at a bounded ESS", _fields("truncate", "turn", exponent="ess")),
        ("prefix", "truncation by prefix", _fields("truncate", "prefix")),
        ("sequence", "sequence-level truncation", _fields("truncate", "sequence")),
        ("mask", "turn-level masking", _fields("mask", "turn", floor=0.5, cap=2.0)),
        ("icepop", "IcePop", _fields("icepop", "token", floor=0.5, cap=5.0)),
        ("m2po", "M2PO", _fields("m2po", "token", cap=1e6)),
        ("topr", "TOPR", _fields("topr", "sequence", cap=1.0)),
        (
            "clip-keep",
            "turn-level truncation and AEPO's clip",
            _fields("truncate", "turn", **{"objective.surrogate": "clip-keep"}),
        ),
    )
}
"""What the axis ``correction`` may name."""

DECIDED: tuple[str, ...] = ("correction.action", "correction.level", *PLAIN)
"""Fields that the axis decides, whichever value it has."""
