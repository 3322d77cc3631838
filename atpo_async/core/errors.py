"""Errors a user can act on.  Each states the fact, the identity and the expectation, and the way out."""

from __future__ import annotations


class AtpoError(Exception):
    """Base of everything that is reported as one line, without a traceback (exit code 2 from the CLI)."""


class ConfigError(AtpoError):
    """Unknown, contradictory or out-of-range configuration; the message begins with the dotted path."""


class SetupError(AtpoError):
    """Something on this machine is missing or in use: a model folder, a package, a device, a port."""


class RunMismatch(AtpoError):
    """A run folder was made by another configuration."""


class BadMessage(AtpoError):
    """A peer sent something that is not a message, or one outside the limits."""


class Conflict(BadMessage):
    """The same key arrived with other bytes."""


class PeerLost(AtpoError):
    """A peer did not answer before the deadline."""


class OutOfMemory(AtpoError):
    """A device's memory was too small for what a role does; the message says what the next start does otherwise."""


class WaitTimeout(AtpoError):
    """A named wait passed its deadline; the message names the waiter, what it waited for, and on which role."""


class WeightsRejected(AtpoError):
    """A weight file is incomplete, altered, of another run, or older than the one in use."""


class ProbeMismatch(AtpoError):
    """After a swap the engine does not hold, or does not compute, what the learner published; names the version, and
    the tensor or the difference."""


class GenerationFailed(AtpoError):
    """One request failed; it ends its branch, not its tree."""


class EngineDead(GenerationFailed):
    """The engine's processes are gone or it failed a swap: no request can succeed any more."""


class EnvironmentBroken(AtpoError):
    """The environment fails on every task; the message holds its latest error."""


class RoleCrashed(AtpoError):
    """A role crashed too often; the message holds the last lines of its log."""
