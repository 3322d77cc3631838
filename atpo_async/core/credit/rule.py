"""Credit of a tree: rewards -> values -> advantages, by the two modes that a configuration names.  Pure, float64.

Source: AT2PO (arXiv 2601.04767), section 3, and its published code where the two differ; ALGORITHM, section 2, the tree
traces section 4.  Shapes: N turns of a tree in an order that puts parents before children; the root (the prompt) is no
turn and is kept apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.credit.marks import Sums, added, mark_of
from atpo_async.core.credit.returns import LEAST_SHARE, before, has_signal, in_one_sum
from atpo_async.core.credit.rewards import normalised_leaves, normalised_returns, normalised_turns, posterior_turns
from atpo_async.core.credit.roles import by_role
from atpo_async.core.credit.tree_arrays import F64, TreeArrays
from atpo_async.core.credit.weights import branch_prob, leaves_below
from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.core.schedule import Schedule, coefficient
from atpo_async.core.texts import of_error
from atpo_async.core.tree import TurnTree
from atpo_async.core.vocabulary import LeafWeights

ValueMode = Callable[[TreeArrays, "F64 | None"], tuple[F64, float]]
"""``(arrays, ratio) -> (float64[N] V(n), V(root))``: a leaf's value is its reward, others' come from their children.

Rewards of turns and discount are added by the rule, which hands over each chain's return as its leaf's reward then, and
takes what was earned above a turn out of its value; a mode with ``reads_turn_rewards`` adds them by itself.

``ratio``: float64[N], rho_n: the policy's probability of each turn over that of the behaviour policy, at most
``credit.trace_cap``; None where nothing is known of it, and for a mode without ``reads_ratio``.
"""

AdvantageMode = Callable[[TreeArrays, F64, float], F64]
"""``(arrays, values, root_value) -> float64[N] A(n)``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Credit:
    """What each turn of a tree is credited with."""

    values: F64
    """float64[N]: V(n)."""
    root_value: float
    """V of the prompt: the tree's baseline; of a group the mean of its roles' own, over turns."""
    advantages: F64
    """float64[N]: A(n); all zero for a tree without signal."""
    has_signal: bool
    """Whether its chains earned different returns, or the advantage mode compares none."""
    sums: Sums = field(default_factory=dict)
    """What the advantage mode says of the tree, for metrics."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CreditRule:
    """How the trees of a run are credited; ``config.credit_rule`` makes it of a configuration."""

    value_mode: ValueMode
    advantage_mode: AdvantageMode
    normalise: bool | Literal["tree", "batch"] = True
    """Leaf rewards to mean 0 and standard deviation 1 inside the tree first; ``batch``: the deviation is that of the
    leaf rewards of the whole batch, where it is known."""
    leaf_weights: LeafWeights = "uniform"
    """Under which weights of the leaves those moments are taken."""
    discount: float = 1.0
    """γ."""
    normalise_returns: bool | Literal["turns", "first"] = False
    """Values to mean 0 and standard deviation 1 over the turns of the tree, or its first ones; ``normalise`` is off
    then."""
    scale: Literal["none", "sqrt-leaves"] = "none"
    """What advantages are divided by: nothing, or the square root of the leaves below the turn (TreeRL)."""
    whiten: bool = False
    """The learner brings advantages to mean 0 and standard deviation 1 over the tokens of the batch's rows."""
    turn_rewards: Literal["plain", "normalised", "posterior"] = "plain"
    """``normalised``: rewards of inner turns as leaf rewards are, with ``normalise``.  ``posterior``: rewards of turns
    count in chains only whose leaf earned more than 0."""
    turn_reward_moments: Literal["separate", "joint"] = "separate"
    """Of these: their own moments, or those of both together."""
    turn_reward_scale: float | Schedule = 1.0
    """Multiplies what turns earn of their own, by learner step; what inner turns earn after it was normalised, where it
    is, and what a leaf's own turn earns before, as it is part of the outcome then."""
    step: int = 0
    """The learner's batch for which trees are credited: schedules are read at it (``at``)."""
    trace_cap: float = 1.0
    """c-bar: the largest ratio that counts; infinity for none."""
    value_setting: str = "credit.value_mode"
    advantage_setting: str = "credit.advantage_mode"
    """The settings that named the modes, for messages."""

    def at(self, step: int) -> CreditRule:
        """The rule as it is for the learner's batch ``step``."""
        return replace(self, step=step) if isinstance(self.turn_reward_scale, Schedule) else self

    @property
    def reads_ratio(self) -> bool:
        """Whether the value mode weighs turns by their ratios."""
        return bool(mark_of(self.value_mode, "reads_ratio"))

    @property
    def reads_reference(self) -> bool:
        """Whether a mode reads how much likelier the policy makes turns than the reference."""
        return any(mark_of(mode, "reads_reference") for mode in (self.value_mode, self.advantage_mode))

    @property
    def measures(self) -> bool:
        """Whether a mode reads what only log-probs of the whole batch tell, before its first step."""
        return self.reads_ratio or self.reads_reference

    @property
    def measuring_setting(self) -> str:
        """The setting of the mode that does, for messages."""
        by_value = self.reads_ratio or mark_of(self.value_mode, "reads_reference")
        return self.value_setting if by_value else self.advantage_setting

    @property
    def needs_no_comparison(self) -> bool:
        """Whether trees have a signal whose chains all earned the same, and those of a single chain."""
        return bool(mark_of(self.advantage_mode, "needs_no_comparison"))

    @property
    def needs_batch_std(self) -> bool:
        """Whether leaf rewards are divided by the deviation of the batch's."""
        return self.normalise == "batch"

    def credit(
        self,
        tree: TurnTree | TreeArrays,
        *,
        ratio: F64 | None = None,
        reference: F64 | None = None,
        batch_std: float | None = None,
    ) -> Credit:
        """Values and advantages of a pruned tree, in the order of its turns; of a group, of each role's chains alone.

        Args:
            tree: without unfinished chains.
            ratio: float64[N], rho_n; None where nothing is known of it.
            reference: float64[N], nats, as ``TreeArrays.reference``; None where nothing is known of it.
            batch_std: of the leaf rewards of the batch; None where it is not known, as in the buffer: the tree's own.

        Raises:
            ValueError: a ratio is missing, negative or not finite; a tree as ``TreeArrays.of`` refuses it.
            SetupError: a mode failed, or returned something else than finite numbers, one for each turn.
        """
        arrays, ratio = self._measured(tree, ratio, reference)
        if arrays.role.any():
            return self._by_role(arrays, ratio, batch_std)
        arrays = self._normalised(arrays, batch_std)
        value, root = self._values(arrays, ratio)
        signal = self.needs_no_comparison or has_signal(arrays)
        if self.normalise_returns:
            over: Literal["turns", "first"] = "first" if self.normalise_returns == "first" else "turns"
            arrays, value, root = normalised_returns(arrays, value, root, over)
        if not signal:
            # Exactly zero: un-normalised equal rewards would otherwise push every action up or down alike.
            return Credit(values=value, root_value=root, advantages=np.zeros(len(arrays)), has_signal=False)
        found = _result(self.advantage_setting, self.advantage_mode, arrays, value, root)
        advantages = _numbers(self.advantage_setting, found, len(arrays))
        if self.scale == "sqrt-leaves":
            advantages = advantages / np.sqrt(leaves_below(arrays))
        sums = self._sums(arrays, value, root)
        return Credit(values=value, root_value=root, advantages=advantages, has_signal=True, sums=sums)

    def _measured(
        self, tree: TurnTree | TreeArrays, ratio: F64 | None, reference: F64 | None
    ) -> tuple[TreeArrays, F64 | None]:
        """The tree with what was measured of it, and the ratios that count."""
        arrays = TreeArrays.of(tree) if isinstance(tree, TurnTree) else tree
        names = [turn.turn_id for turn in tree] if isinstance(tree, TurnTree) else range(len(arrays))
        if ratio is not None:
            _check_ratio(ratio, names)
            ratio = np.minimum(ratio, self.trace_cap) if self.reads_ratio else None
        if reference is not None and self.reads_reference:
            _check_reference(reference, names)
            arrays = replace(arrays, reference=reference)
        return arrays, ratio

    def counted(self, arrays: TreeArrays) -> TreeArrays:
        """The tree with what its turns earned as far as it counts at this step, and discounted; not normalised."""
        if self.turn_rewards == "posterior":
            arrays = posterior_turns(arrays)
        return self._discounted(self._scaled(arrays))

    def _normalised(self, arrays: TreeArrays, batch_std: float | None) -> TreeArrays:
        """The tree with its rewards as the settings have them."""
        if not self.normalise:
            return self.counted(arrays)
        weights = branch_prob(arrays) if self.leaf_weights == "branch-prob" else None
        if self.turn_rewards == "normalised":
            # What a leaf's own turn earned becomes part of its outcome, and must have faded by then; what inner turns
            # earned fades afterwards, or their deviation would take it out.
            arrays = self._scaled(arrays, where=arrays.is_leaf)
            arrays = normalised_turns(arrays, weights=weights, joint=self.turn_reward_moments == "joint")
            return self._discounted(self._scaled(arrays, where=~arrays.is_leaf))
        of_batch = batch_std if self.needs_batch_std else None
        reward = normalised_leaves(arrays, weights=weights, batch_std=of_batch)
        return self.counted(arrays).with_reward(reward)

    def _scaled(self, arrays: TreeArrays, where: NDArray[np.bool_] | bool = True) -> TreeArrays:
        """What turns ``where`` earned of their own, by the factor of this step."""
        scale = coefficient(self.turn_reward_scale, self.step)
        if scale == 1.0:
            return arrays
        return replace(arrays, turn_reward=np.where(where, arrays.turn_reward * scale, arrays.turn_reward))

    def _discounted(self, arrays: TreeArrays) -> TreeArrays:
        return arrays if self.discount == 1.0 else replace(arrays, discount=self.discount)

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of what the advantage mode says of each tree (``Credit.sums``)."""
        found = mark_of(self.advantage_mode, "logs")
        return () if found is None else tuple(found[0])

    def _sums(self, arrays: TreeArrays, value: F64, root: float) -> Sums:
        found = mark_of(self.advantage_mode, "logs")
        if found is None:
            return {}
        mode = self.advantage_mode
        options = mode.keywords if isinstance(mode, functools.partial) else {}
        return found[1](arrays, value, root, **options)  # type: ignore[no-any-return]

    def _by_role(self, arrays: TreeArrays, ratio: F64 | None, batch_std: float | None) -> Credit:
        """Of a group: each role's chains by themselves, with their own moments and their own baseline."""
        values, advantages, root, signal = np.zeros(len(arrays)), np.zeros(len(arrays)), 0.0, False
        sums: list[Sums] = []
        for _, at, own in by_role(arrays):
            credit = self.credit(own, ratio=None if ratio is None else ratio[at], batch_std=batch_std)
            values[at], advantages[at] = credit.values, credit.advantages
            root += credit.root_value * len(at) / len(arrays)
            signal = signal or credit.has_signal
            sums.append(credit.sums)
        return Credit(
            values=values, root_value=root, advantages=advantages, has_signal=signal, sums=added(sums, self.logged)
        )

    def _values(self, arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
        """A mode that knows nothing of rewards of turns gets the returns of whole chains as its leaves' rewards."""
        if arrays.only_outcomes or mark_of(self.value_mode, "reads_turn_rewards"):
            return self._said(arrays, ratio)
        earned, share = before(arrays)
        sums = in_one_sum(arrays)
        value, root = self._said(sums, ratio)
        more, root_more = self._said(sums.with_reward(sums.reward + 1.0), ratio)
        off = np.abs(np.append(more - value, root_more - root) - 1.0).max()
        if off > 1e-6 * (1.0 + np.abs(sums.reward).max(initial=0.0)) or share.min(initial=1.0) < LEAST_SHARE:
            raise SetupError(
                f"{self.value_setting} cannot be used with rewards of turns, or with credit.discount = "
                f"{arrays.discount:g}: its values must grow by 1 where every leaf earns 1 more, no turn may have a "
                f"discount below {LEAST_SHARE:g}; or add arrays.turn_reward and arrays.discount in the mode itself and "
                "decorate it with atpo_async.core.credit.reads_turn_rewards"
            )
        return (value - earned) / share, root

    def _said(self, arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
        """What the value mode returned, checked."""
        found = _result(self.value_setting, self.value_mode, arrays, ratio)
        try:
            value, root = found
            root = float(root)
        except (TypeError, ValueError):
            raise SetupError(
                f"{self.value_setting} returned {type(found).__name__}; expected the values of the turns and the root's"
            ) from None
        if not np.isfinite(root):
            raise SetupError(f"{self.value_setting} returned {root} as the root's value; expected a finite number")
        return _numbers(self.value_setting, value, len(arrays)), root


def _result(setting: str, mode: Callable[..., Any], *args: Any) -> Any:
    """Calls ``mode`` on a tree.  Raises SetupError naming its setting where it fails."""
    try:
        return mode(*args)
    except AtpoError:
        raise
    except Exception as exc:
        raise SetupError(f"{setting} failed on a tree of {len(args[0])} turns: {of_error(exc)}") from exc


def _numbers(setting: str, found: Any, count: int) -> F64:
    """float64[count].  Raises SetupError where ``found`` is no such thing."""
    try:
        numbers: F64 = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):
        raise SetupError(f"{setting} returned {type(found).__name__}; expected {count} numbers, one a turn") from None
    if numbers.shape != (count,):
        raise SetupError(f"{setting} returned numbers of shape {numbers.shape}; expected {count}, one a turn")
    if not np.isfinite(numbers).all():
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise SetupError(f"{setting} returned {numbers[at]} for turn {at} of {count}; expected finite numbers")
    return numbers


def _check_ratio(ratio: F64, names: Sequence[int]) -> None:
    if len(ratio) != len(names):
        raise ValueError(
            f"credit got {len(ratio)} turn ratios for {len(names)} turns; give one for each turn, in order"
        )
    bad = np.flatnonzero(~(np.isfinite(ratio) & (ratio >= 0)))
    if len(bad):
        raise ValueError(
            f"turn {names[int(bad[0])]} has the ratio {ratio[bad[0]]}; expected finite and not negative: bound the "
            "log-ratio before exp()"
        )


def _check_reference(reference: F64, names: Sequence[int]) -> None:
    if len(reference) != len(names):
        raise ValueError(
            f"credit got {len(reference)} log-ratios to the reference for {len(names)} turns; give one each"
        )
    bad = np.flatnonzero(~np.isfinite(reference))
    if len(bad):
        raise ValueError(
            f"turn {names[int(bad[0])]} has the log-ratio {reference[bad[0]]} to the reference; expected finite"
        )
