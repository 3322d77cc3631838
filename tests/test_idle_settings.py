"""Settings that decide nothing are told, and only those."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from atpo_async import config as configuration
from atpo_async.config import build, load
from atpo_async.config.idle_settings import NONZERO, WORKS_WITH, idle_settings
from atpo_async.config.sections.base import door_of

ROOT = Path(__file__).resolve().parent.parent
NONE = {"action": "none", "accept_bias": True}


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (
            {"objective": {"tv_limit": 0.3}},
            ["objective.tv_limit = 0.3 has no effect with objective.surrogate = 'clip'"],
        ),
        ({"objective": {"tv_limit": 0.3, "surrogate": "tv"}}, []),
        ({"objective": {"tv_limit": 0.2}}, []),  # the default
        (
            {"correction": {**NONE, "cap": 5.0, "level": "token"}},
            [
                "correction.level = 'token' has no effect with correction.action = 'none'",
                "correction.cap = 5.0 has no effect with correction.action = 'none'",
            ],
        ),
        ({"correction": NONE}, []),
        (
            {"correction": {"exponent": "ess", "ess_floor": 0.2}},
            ["correction.ess_floor = 0.2 has no effect with correction.exponent = 'ess'"],
        ),
        (
            {"objective": {"surrogate": "policy-gradient", "dual_clip": None}},
            ["objective.dual_clip = none has no effect with objective.surrogate = 'policy-gradient'"],
        ),
        (
            {"search": {"strategy": "none", "branches": 3}},
            ["search.branches = 3 has no effect with search.strategy = 'none'"],
        ),
        ({"search": {"rounds": 0, "branches": 3}}, ["search.branches = 3 has no effect with search.rounds = 0"]),
        (
            {"credit": {"normalise_leaves": False, "leaf_weights": "branch-prob"}},
            ["credit.leaf_weights = 'branch-prob' has no effect with credit.normalise_leaves = false"],
        ),
        ({"objective": {"kl_estimator": "k2"}}, ["objective.kl_estimator = 'k2' has no effect with objective.kl_coef"]),
        ({"objective": {"kl_estimator": "k2", "kl_coef": 0.1}}, []),
        (
            {"buffer": {"sampling": "uniform", "priority_exponent": 0.3}},
            ["buffer.priority_exponent = 0.3 has no effect with buffer.sampling = 'uniform'"],
        ),
        (
            {"search": {"strategy": "none", "strategy_options": {"width": 2}}},
            ["search.strategy_options = {'width': 2} has no effect with search.strategy = 'none'"],
        ),
        ({"search": {"strategy": "none", "strategy_options": {}}}, []),
        (
            {"search": {"duplicate_at": 0.8}},
            ["search.duplicate_at = 0.8 has no effect with search.strategy = 'entropy' (it has with 'diverse', or"],
        ),
        ({"search": {"duplicate_at": 0.8, "prune_duplicates": True}}, []),
        ({"search": {"duplicate_at": 0.8, "strategy": "diverse"}}, []),
        (
            {"search": {"strategy": "resample", "branches": 3, "tree_tokens": 400}},
            [
                "search.branches = 3 has no effect with search.strategy = 'resample' (it has with a strategy that adds",
                "search.tree_tokens = 400 has no effect with search.strategy = 'resample'",
            ],
        ),
        (
            {"search": {"strategy": "entropy-rise", "include_root": True}},
            ["search.include_root = true has no effect with search.strategy = 'entropy-rise' (it has with 'entropy'"],
        ),
        (
            {"search": {"rise_tokens": 5}},
            ["search.rise_tokens = 5 has no effect with search.strategy = 'entropy' (it has with 'entropy-rise', or"],
        ),
        ({"search": {"rise_tokens": 5, "probe_budget": 0.5}}, []),
        ({"search": {"rise_tokens": 5, "strategy": "entropy-rise"}}, []),
        (
            {"credit": {"normalise_leaves": False, "leaf_weights": "branch-prob"}, "imitation": {"rows": 8}},
            [],
        ),
        (
            {"metrics": {"options": {"jsonl": {}, "tensorboard": {"a": 1}}}},
            ["metrics.options.tensorboard has no effect with metrics.sinks = ['jsonl'] (it has with 'tensorboard' in"],
        ),
    ],
)
def test_a_setting_that_decides_nothing_is_named_with_what_switches_it_off(
    data: dict[str, object], lines: list[str]
) -> None:
    found = idle_settings(build(data))
    assert [line for line, start in zip(found, lines, strict=True) if not line.startswith(start)] == []


def test_a_line_names_what_the_setting_works_with() -> None:
    (line,) = idle_settings(build({"objective": {"clip_low": 0.1, "clip_high": 0.004, "surrogate": "tv"}}))
    assert line.endswith("(it has with 'cispo', 'clip', 'clip-keep')")
    (line,) = idle_settings(build({"objective": {"kl_estimator": "k2"}}))
    assert line.endswith(f"(it has with {NONZERO.words})")


def test_the_table_names_fields_and_values_that_there_are() -> None:
    known = configuration.fields()
    assert {name for needs in WORKS_WITH.values() for name, _ in needs} | set(WORKS_WITH) <= set(known)
    for name, working in (need for needs in WORKS_WITH.values() for need in needs):
        if isinstance(working, tuple):
            door = door_of(known[name])
            words = door.choices() if door is not None else get_args(known[name].annotation)
            assert set(working) <= set(words or (True, False)), name


def test_a_strategy_surrogate_or_engine_of_ones_own_may_read_any_setting() -> None:
    own = "mine:thing"
    data = {
        "objective": {"surrogate": own, "tv_limit": 0.1, "clip_low": 0.1},
        "search": {"strategy": own, "sibling_penalty": 0.2},
        "actor": {"engine": own, "kv_cache_gb": 2.0},
    }
    assert idle_settings(build(data)) == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.name)
def test_the_configurations_that_come_with_the_project_set_nothing_in_vain(file: Path) -> None:
    assert idle_settings(load(file)) == []
