"""Where and when a tree branches beyond the strategy's name: the fields that ``[search]`` has of each strategy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from atpo_async.config.sections.base import Section, TruthOrAuto

CHAINS_ONLY = ("none", "resample")
"""Strategies whose trees have as many leaves as chains: ``search.initial_rollouts``."""


class ExpansionConfig(Section):
    """Fields of ``[search]`` (docs/ALGORITHM.md, section 1)."""

    expand: Literal["rounds", "online"] = Field(
        "rounds", description="choose among the whole tree after each round, or at each turn as it ends"
    )
    include_leaves: TruthOrAuto = Field(
        "auto", description="last turns are candidates too; auto: with strategy entropy-rise"
    )
    branch_prob: float = Field(0.5, ge=0, le=1, description="p of entropy-rise: P(branch) = p + w * rise")
    entropy_weight: float = Field(0.2, ge=-1e3, le=1e3, description="w of entropy-rise; 0 for a plain coin")
    rise_tokens: int = Field(20, ge=1, description="first tokens of a turn whose entropies entropy-rise adds up")
    rise_of: Literal["turn", "parent"] = Field(
        "turn", description="whose rise decides: the turn's own, or that of the turn before it (ARPO's code)"
    )
    max_copies: int = Field(1, ge=1, le=64, description="siblings that entropy-rise may give one turn")
    branch_penalty: float = Field(
        0.0, ge=0, le=1, description="AEPO: less likely by this for each branch in a row on the way; 0.05 there"
    )
    probe_budget: float = Field(
        0.0, ge=0, le=1e3, description="AEPO's b: a first chain decides how many of M + L * K are chains; 0.5 there"
    )
    diversity_penalty: float = Field(
        1.0, ge=0, le=1e3, description="lambda of diverse: less for siblings that found the same"
    )
    duplicate_at: float = Field(0.9, gt=0, le=1, description="overlap (Jaccard) at which two turns found the same")
    prune_duplicates: bool = Field(False, description="a branch that found what a sibling had is closed at once")
    resample_every: int = Field(1, ge=1, description="turns between two draws of states (strategy resample)")
    resample_decay: float = Field(0.5, gt=0, le=1, description="a state's value is multiplied by this at each turn")
    resample_weights: Literal["linear", "logistic", "max", "percentile", "above-half"] = Field(
        "linear", description="how values become the probabilities of states"
    )
    resample_value: Literal["environment", "turn-rewards", "certainty"] = Field(
        "environment",
        description="what a state is worth: state_value of its step (else turn rewards so far), those, or exp(-H)",
    )
    tree_tokens: int = Field(
        0, ge=0, description="no branch begins that would bring a tree's action tokens above this; 0: no limit"
    )


def fault_of(search: ExpansionConfig, *, strategy: str, online: tuple[str, ...], known: tuple[str, ...]) -> str | None:
    """The first contradiction among fields of ``[search]``, with the way out.

    Args:
        search: the section.
        strategy: ``search.strategy``.
        online: built-in strategies that decide turn by turn.
        known: all built-in strategies.
    """
    if search.expand == "online" and strategy in known and strategy not in online:
        return (
            f"search.expand = 'online' with search.strategy = {strategy!r}, which chooses among a whole tree: set "
            f"--search.expand rounds, or a strategy that decides at each turn: {', '.join(online)}, or "
            "'package.module:name' for a rule of your own (docs/extending.md, \"Online expansion\")"
        )
    if search.probe_budget and strategy in CHAINS_ONLY:
        return (
            f"search.probe_budget = {search.probe_budget:g} with search.strategy = {strategy!r}: it divides a tree's "
            "leaves between chains and branches, and there are no branches; set --search.probe_budget 0"
        )
    return None
