"""The rules of a configuration: which settings contradict one another, and how to resolve each contradiction.

Settings that merely have no effect are not refused: ``idle_settings`` reports them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from atpo_async.config import doors, loss_rules
from atpo_async.config.loss_rules import word
from atpo_async.config.sections.expansion import fault_of
from atpo_async.config.sections.generation import fault_of_team
from atpo_async.core.errors import AtpoError
from atpo_async.core.loss_traits import CorrectionTraits

if TYPE_CHECKING:
    from atpo_async.config.schema import Config


def check(config: Config) -> None:
    """Raises ValueError with the first contradiction: the settings, their values and the way out."""
    for rule in RULES:
        rule(config)


def _lag_leaves_room(config: Config) -> None:
    s = config.staleness
    if s.max_lag < s.least_max_lag:
        raise ValueError(
            f"staleness.max_lag = {s.max_lag} cannot hold with staleness.publish_every = {s.publish_every} and "
            f"staleness.max_uses = {s.max_uses}: a tree begins up to {s.publish_every - 1} versions behind and is "
            f"used for the last time {s.max_uses - 1} versions after the first; raise max_lag to at least "
            f"{s.least_max_lag}, or lower publish_every or max_uses"
        )


def _one_or_several_environments(config: Config) -> None:
    several, one = config.environments, config.environment
    if several and one != type(one)():
        raise ValueError(
            f"environment.name = {one.name!r} ([environment]) stands beside {len(several)} [[environments]]: leave "
            "[environment] out, and make it an entry of [[environments]] if it belongs to the run"
        )
    labels = [each.label for each in several]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(
            f"environments: {labels.count(twice[0])} of them have the label {twice[0]!r}, under which their metrics "
            "would be mixed up: give each a label of its own, label = 'easy'"
        )


def _off_policy_is_corrected(config: Config) -> None:
    loss_rules.check_bias(config, loss_rules.correction_traits(config.correction.action) or CorrectionTraits())
    if (config.search.top_p < 1 or config.search.top_k > 0) and not config.correction.accept_bias:
        raise ValueError(
            f"search.top_p = {config.search.top_p} with search.top_k = {config.search.top_k} samples from a cut "
            "distribution that the learner's log-probs are not of: every importance weight would be off; use "
            "top_p 1 and top_k 0, or --correction.accept_bias true"
        )


def _batches_and_trees(config: Config) -> None:
    s = config.staleness
    if config.learner.minibatches > s.trees_per_batch:
        raise ValueError(
            f"learner.minibatches = {config.learner.minibatches} exceeds staleness.trees_per_batch = "
            f"{s.trees_per_batch}: a mini-batch holds at least one tree"
        )
    if config.max_leaves < 2 and not loss_rules.learns_from_one_chain(config.credit.advantage_mode):
        raise ValueError(
            f"search.initial_rollouts = {config.search.initial_rollouts} without branches gives trees of one leaf, "
            "which never have a signal; use at least 2, or --credit.advantage_mode optimal_value"
        )
    if config.search.max_action_tokens >= config.model.max_context_tokens:
        raise ValueError(
            f"search.max_action_tokens = {config.search.max_action_tokens} must be below model.max_context_tokens = "
            f"{config.model.max_context_tokens}"
        )


def _expansion(config: Config) -> None:
    online, known = doors.ONLINE_RULE.names(), doors.STRATEGY.names()
    if fault := fault_of(config.search, strategy=config.search.strategy, online=online, known=known):
        raise ValueError(fault)


def _teams(config: Config) -> None:
    if fault := fault_of_team(config):
        raise ValueError(fault)


def _a_transport_is_left(config: Config) -> None:
    if config.weights.transport == "file" and not config.weights.shared_memory:
        raise ValueError(
            "weights.transport = 'file' with weights.shared_memory = false leaves actors no way to the weights: set "
            "--weights.transport chunks, or --weights.shared_memory true"
        )


def _swap_before_give_up(config: Config) -> None:
    if config.swap_timeout_s >= config.links.give_up_s:
        raise ValueError(
            f"weights.swap_timeout_s = {config.swap_timeout_s:g} must be below links.give_up_s = "
            f"{config.links.give_up_s:g}: roles that wait for the new weights would give up before the swap does"
        )


def _correction(config: Config) -> None:
    c = config.correction
    if c.prox == "first-step" and config.learner.minibatches > 1:
        raise ValueError(
            f"correction.prox = 'first-step' with learner.minibatches = {config.learner.minibatches}: all but the "
            "first part would take updated weights for the batch's start; use --correction.prox auto or recompute"
        )
    if c.exponent == "ess" and c.ess_floor > c.ess_target:
        raise ValueError(
            f"correction.ess_floor = {c.ess_floor} is above correction.ess_target = {c.ess_target}, which decides "
            "with exponent = 'ess': lower the floor or raise the target"
        )
    # What a user's own declares is checked by the learner, which imports it.
    loss_rules.check_correction(c, loss_rules.correction_traits(c.action) or CorrectionTraits())
    loss_rules.check_surrogate(config)
    loss_rules.check_parts(config)
    # A user's own mode is checked by the learner, when it loads it.
    if c.prox == "interpolate" and config.credit.value_mode in doors.VALUE_MODE.names():
        from atpo_async.config.credit_rule import credit_rule  # needs numpy, which the command line does without

        if credit_rule(config.credit, reads_files=False).reads_ratio:
            raise ValueError(loss_rules.needs_log_probs(f"credit.value_mode = {config.credit.value_mode!r}"))


def _modes_of_credit(config: Config) -> None:
    """Options of built-in modes; a user's own are tried before a run."""
    c = config.credit
    if c.advantage_mode not in doors.ADVANTAGE_MODE.names() or (c.advantage_mode, c.advantage_options) == PLAIN:
        return
    from atpo_async.config.credit_rule import credit_rule, try_credit

    if c.value_mode in doors.VALUE_MODE.names():
        try:
            try_credit(c, reads_files=False)
        except AtpoError as exc:
            raise ValueError(str(exc)) from None
    rule = credit_rule(c.model_copy(update={"value_mode": "child_mean", "value_options": {}}), reads_files=False)
    if rule.reads_reference and config.correction.prox == "interpolate":
        raise ValueError(loss_rules.needs_log_probs(f"credit.advantage_mode = {c.advantage_mode!r}"))
    if rule.reads_reference and (c.whiten_advantages or c.advantage_scale != "none"):
        which, value, off = (
            ("whiten_advantages", "true", "false")
            if c.whiten_advantages
            else ("advantage_scale", repr(c.advantage_scale), "none")
        )
        raise ValueError(
            f"credit.{which} = {value} with credit.advantage_mode = {c.advantage_mode!r}: its advantages are the "
            f"gradient of a loss, which it would change into that of none; set --credit.{which} {off}"
        )
    if rule.reads_reference and config.implicit_reward.enabled:
        raise ValueError(
            f"implicit_reward.enabled = true with credit.advantage_mode = {c.advantage_mode!r}: its advantages are the "
            "gradient of a loss, to which rewards of turns cannot be added; set --implicit_reward.enabled false, or "
            "--credit.advantage_mode node_value"
        )
    if rule.needs_no_comparison and config.buffer.keep_share < 1:
        raise ValueError(
            f"buffer.keep_share = {config.buffer.keep_share:g} with credit.advantage_mode = {c.advantage_mode!r}, "
            "which learns from trees whose chains all earned the same, too: these would be left out for their spread; "
            "set --buffer.keep_share 1"
        )
    if rule.needs_no_comparison and (c.normalise_leaves or c.normalise_returns):
        which = "normalise_leaves" if c.normalise_leaves else "normalise_returns"
        raise ValueError(
            f"credit.{which} = {word(getattr(c, which))} with credit.advantage_mode = {c.advantage_mode!r} would take "
            f"out what every chain of a tree earned alike, which that mode learns from: set --credit.{which} false"
        )


def _shaping(config: Config) -> None:
    if (fault := loss_rules.overlong_fault(config) or loss_rules.keep_share_fault(config)) is not None:
        raise ValueError(fault)


PLAIN: tuple[str, dict[str, object]] = ("node_value", {})
"""The default: it is not loaded to be checked, for that needs numpy, which the command line does without."""


def _normalised_once(config: Config) -> None:
    returns, leaves = config.credit.normalise_returns, config.credit.normalise_leaves
    if returns and leaves:
        raise ValueError(
            f"credit.normalise_returns = {word(returns)} with credit.normalise_leaves = {word(leaves)} would "
            "normalise twice: the returns of turns are made of the leaves' rewards; set --credit.normalise_leaves false"
        )


def _exact_lag(config: Config) -> None:
    s = config.staleness
    if s.exact_lag is None:
        return
    if s.max_lag < s.exact_lag:
        raise ValueError(
            f"staleness.exact_lag = {s.exact_lag} would be masked by staleness.max_lag = {s.max_lag}: raise max_lag"
            f" to {s.exact_lag}"
        )
    if s.max_uses != 1 or s.publish_every != 1 or config.buffer.ready != "complete":
        raise ValueError(
            f"staleness.exact_lag = {s.exact_lag} needs staleness.max_uses = 1, staleness.publish_every = 1 and "
            f"buffer.ready = 'complete', got {s.max_uses}, {s.publish_every} and {config.buffer.ready!r}"
        )
    if config.run.max_tasks is not None:
        raise ValueError(
            f"staleness.exact_lag = {s.exact_lag} ends with run.steps, not with run.max_tasks = "
            f"{config.run.max_tasks}: leave one of them out"
        )


def _max_tasks(config: Config) -> None:
    run, s = config.run, config.staleness
    if run.max_tasks is None:
        return
    least = -(-run.max_tasks * s.max_uses // s.trees_per_batch)
    if run.steps < least:
        raise ValueError(
            f"run.max_tasks = {run.max_tasks} with staleness.max_uses = {s.max_uses} may take {least} batches of "
            f"staleness.trees_per_batch = {s.trees_per_batch} trees, run.steps = {run.steps} would end before: set "
            f"--run.steps {least} or more"
        )


def _buffer(config: Config) -> None:
    s = config.staleness
    if config.buffer.follower_wait and not config.buffer.follower:
        raise ValueError(
            "buffer.follower_wait = true needs a follower to wait for: set --buffer.follower true, or leave it out"
        )
    if config.buffer.max_trees is not None and config.buffer.max_trees < s.trees_per_batch:
        raise ValueError(
            f"buffer.max_trees = {config.buffer.max_trees} is below staleness.trees_per_batch = {s.trees_per_batch}: "
            "no batch would ever be complete"
        )
    if config.buffer.ready == "partial" and config.buffer.partial_min_leaves > config.search.max_leaves:
        raise ValueError(
            f"buffer.partial_min_leaves = {config.buffer.partial_min_leaves} exceeds the {config.search.max_leaves} "
            "leaves that search grows"
        )


def _shards(config: Config) -> None:
    b, links, s = config.buffer, config.links, config.staleness
    if b.shards == 1:
        return
    if s.exact_lag is not None:
        raise ValueError(
            f"buffer.shards = {b.shards} with staleness.exact_lag = {s.exact_lag}: an exact lag decides on each tree "
            "by the order in which all trees of the run come, which no shard knows; set --buffer.shards 1"
        )
    if b.follower:
        raise ValueError(
            f"buffer.shards = {b.shards} with buffer.follower = true: a follower copies one journal, and each shard "
            "has one of its own; set --buffer.shards 1, or keep the run's folder on a disk that is mirrored"
        )
    if b.max_bytes // b.shards < 1024 * 1024:
        raise ValueError(
            f"buffer.max_bytes = {b.max_bytes} leaves each of buffer.shards = {b.shards} less than 1 MiB: raise it to "
            f"{b.shards * 1024 * 1024} at least"
        )
    if b.max_trees is not None and b.max_trees < b.shards:
        raise ValueError(
            f"buffer.max_trees = {b.max_trees} leaves some of buffer.shards = {b.shards} none: raise it to {b.shards}"
        )
    if links.shards_port and links.shards_port + b.shards - 1 > 65535:
        raise ValueError(
            f"links.shards_port = {links.shards_port} leaves no port to the last of buffer.shards = {b.shards}: the "
            f"highest that does is {65536 - b.shards}"
        )


def _imitation(config: Config) -> None:
    i = config.imitation
    if not i.rows:
        return
    if config.buffer.shards > 1:
        raise ValueError(
            f"imitation.rows = {i.rows} with buffer.shards = {config.buffer.shards}: each shard would judge its rows "
            "by the rewards of its own trees only; set --buffer.shards 1, or --imitation.rows 0"
        )
    if i.per_batch > i.rows:
        raise ValueError(
            f"imitation.per_batch = {i.per_batch:g} exceeds imitation.rows = {i.rows}, the most that are kept: raise "
            "rows or lower per_batch"
        )
    if i.clip_cov_low >= i.clip_cov_high:
        raise ValueError(
            f"imitation.clip_cov_low = {i.clip_cov_low:g} must be below imitation.clip_cov_high = {i.clip_cov_high:g}: "
            "tokens between them may be left out"
        )
    if i.clip_cov and config.correction.prox == "interpolate":
        raise ValueError(loss_rules.needs_log_probs(f"imitation.clip_cov = {i.clip_cov:g}"))
    traits = loss_rules.correction_traits(config.correction.action) or CorrectionTraits()
    if not traits.corrects and not config.correction.accept_bias:
        raise ValueError(
            f"correction.action = {config.correction.action!r} with imitation.rows = {i.rows} imitates rows of up to "
            f"imitation.max_lag = {i.max_lag} versions uncorrected: set --correction.action truncate, or "
            "--correction.accept_bias true if the bias is what you study"
        )


def _gpus(config: Config) -> None:
    learner, actor = config.learner, config.actor
    if learner.gpus and len(learner.gpus) != learner.num_processes:
        raise ValueError(
            f"learner.gpus names {len(learner.gpus)} GPUs for learner.num_processes = {learner.num_processes}: "
            "each rank needs one"
        )
    needed = actor.count * actor.tensor_parallel_size
    if actor.gpus and len(actor.gpus) != needed:
        raise ValueError(
            f"actor.gpus names {len(actor.gpus)} GPUs, but actor.count = {actor.count} actors with "
            f"actor.tensor_parallel_size = {actor.tensor_parallel_size} need {needed}"
        )
    for path, gpus in (("learner.gpus", learner.gpus), ("actor.gpus", actor.gpus)):
        if len(set(gpus)) != len(gpus) or any(gpu < 0 for gpu in gpus):
            raise ValueError(f"{path} = {list(gpus)} must be different numbers from 0")
    shared = sorted(set(learner.gpus) & set(actor.gpus))
    if shared:
        raise ValueError(f"learner.gpus and actor.gpus both name GPU {shared[0]}: a GPU belongs to one role")
    for path, device, gpus in (
        ("learner", learner.device, learner.gpus),
        ("actor", actor.device, actor.gpus),
    ):
        if device == "cpu" and gpus:
            raise ValueError(f"{path}.device = 'cpu' contradicts {path}.gpus = {list(gpus)}")


def _ports(config: Config) -> None:
    ports = {
        f"links.{name}": port
        for name in ("actors_port", "learner_port", "weights_port", "announce_port", "follower_port")
        if (port := getattr(config.links, name))
    }
    if config.links.shards_port and config.buffer.shards > 1:
        first = config.links.shards_port
        ports |= {f"links.shards_port (of shard {k})": first + k for k in range(config.buffer.shards)}
    for name, port in ports.items():
        twin = next((other for other in ports if other != name and ports[other] == port), None)
        if twin:
            raise ValueError(
                f"{name} and {twin} are both {port}: each needs a port of its own, or 0 to have one picked"
            )


def _cluster(config: Config) -> None:
    ray, learner = config.ray, config.learner
    if ray.max_actors is not None and ray.max_actors < config.actor.count:
        raise ValueError(
            f"ray.max_actors = {ray.max_actors} is below actor.count = {config.actor.count}: it counts all actors, "
            "those that come later included"
        )
    if learner.num_processes % ray.learner.nodes:
        raise ValueError(
            f"ray.learner.nodes = {ray.learner.nodes} does not divide learner.num_processes = {learner.num_processes}: "
            "each node gets as many ranks as the others"
        )


RULES: tuple[Callable[[Config], None], ...] = (
    _one_or_several_environments,
    _lag_leaves_room,
    _off_policy_is_corrected,
    _batches_and_trees,
    _expansion,
    _teams,
    _a_transport_is_left,
    _swap_before_give_up,
    _correction,
    _modes_of_credit,
    _normalised_once,
    loss_rules.check_turn_rewards,
    loss_rules.check_implicit_reward,
    _shaping,
    _exact_lag,
    _max_tasks,
    _buffer,
    _shards,
    _imitation,
    _gpus,
    _ports,
    _cluster,
)
"""In the order in which they are checked."""
