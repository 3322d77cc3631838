"""Builds an actor's engine from the configuration."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path

from actors.engines.base import Engine, EngineSettings
from actors.engines.checked import CheckedEngine
from atpo_async.config import Config
from atpo_async.config.doors import ENGINE
from atpo_async.core.errors import ConfigError

log = logging.getLogger("atpo.actor")


def engine_name(config: Config) -> str:
    """``auto`` is vLLM where it is installed, the transformers engine elsewhere."""
    if config.actor.engine != "auto":
        return config.actor.engine
    return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"


def engine_seed(run_seed: int, actor: str) -> int:
    """31 bits, from the run's seed and the actor's name: actors draw other numbers, each the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{actor}".encode()).digest()[:4], "big") >> 1


def engine_settings(config: Config, model: Path, *, actor: str, stop_strings: bool = False) -> EngineSettings:
    """The settings of an actor's engine, which is seeded by the actor's name."""
    return EngineSettings(
        model=model,
        dtype=config.model.dtype,
        device=config.actor.device,
        max_model_len=config.model.max_context_tokens,
        max_num_seqs=config.actor.max_num_seqs,
        kv_cache_gb=config.actor.kv_cache_gb,
        gpu_memory_utilization=config.actor.gpu_memory_utilization,
        tensor_parallel_size=config.actor.tensor_parallel_size,
        clear_cache_on_swap=config.actor.clear_cache_on_swap,
        num_threads=config.actor.num_threads,
        seed=engine_seed(config.run.seed, actor),
        swap_deadline_s=config.swap_timeout_s,
        stop_strings=stop_strings,
    )


def make_engine(config: Config, model: Path, *, actor: str, stop_strings: tuple[str, ...] = ()) -> Engine:
    """Not started yet.  Engines are imported only when used; a user's own is watched (``CheckedEngine``).

    Args:
        config: of the run.
        model: folder of the policy.
        actor: name of the actor, by which its sampling is seeded.
        stop_strings: texts at which the environment's actions end.

    Raises:
        ConfigError: there is no engine of that name, it lacks a part, or it does not honour stop strings.
        SetupError: its module cannot be imported, or it cannot be made.
    """
    name = engine_name(config)
    settings = engine_settings(config, model, actor=actor, stop_strings=bool(stop_strings))
    if config.actor.engine == "auto" and name != "vllm":
        log.warning("vLLM is not installed: generating with the transformers engine, which is slower")
    engine: Engine = ENGINE.make(name, settings, options=config.actor.engine_options)
    if stop_strings and getattr(engine, "supports_stop_strings", False) is not True:
        raise ConfigError(
            f"environment {config.task_name!r} ends actions at texts (stop_strings = {stop_strings!r}), which "
            f"actor.engine = {name!r} does not say that it looks for: let its generate() honour Sampling.stop_strings "
            "and give it supports_stop_strings = True, or use --actor.engine vllm or transformers"
        )
    return engine if name in ENGINE.names() else CheckedEngine(engine, settings, name=name)
