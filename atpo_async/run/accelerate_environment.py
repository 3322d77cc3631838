"""Variables by which a shell can change what Accelerate does to the learner, without a word in the configuration.

Accelerate reads them when it starts: ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4`` quarters every gradient, others
change the precision, compile the model or shard it.  Only the configuration decides what a run does: ``learner.*``, or
the file that ``learner.accelerate_config`` names, which ``accelerate launch`` hands on in the same variables.
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
HARMLESS = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DISABLE_RICH")

ONE_MACHINE = {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "localhost"}
"""For ``accelerate launch`` of ranks on one machine: torch's launcher binds a port, and then says which.

Accelerate itself picks a free port, closes it, and hands its number on to be bound later, when another process may have
it.  It has no option for torch's ``--standalone``; torch reads its own options from these variables.
"""

SEVERAL_MACHINES = {"PET_STANDALONE": "0", "PET_LOCAL_ADDR": ""}
"""For ranks on several machines, where an outer environment may be that of ``ONE_MACHINE``."""

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "ACCELERATE_DYNAMO_", "ACCELERATE_CPU_AFFINITY")
"""Variables that ``accelerate launch`` sets for plain ranks; no user set them, so they are not reported."""


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of ``environ`` that Accelerate would obey."""
    return {
        name: value for name, value in sorted(environ.items()) if name.startswith(PREFIXES) and name not in HARMLESS
    }


def not_heeded(names: Mapping[str, str]) -> str:
    """The warning about variables that are ignored, on one line."""
    told = ", ".join(f"{name}={value}" for name, value in names.items())
    return (
        f"not heeded, though set in the environment: {told}; the configuration says what the learner does (learner.*, "
        "or a file for accelerate named by learner.accelerate_config)"
    )
