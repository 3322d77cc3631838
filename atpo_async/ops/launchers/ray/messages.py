"""What the supervisor and the hosts of the roles tell each other.  Ray carries it; none of it is a secret unless it
says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from atpo_async.ops.launchers.base import RoleUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One attempt of a role, for the host on the node where it is to run."""

    run_id: str
    role: str
    mark: str
    argv: tuple[str, ...]
    """With fields in braces that the host fills in: ``{python}``, ``{launch}``, ``{config}``, ``{join}``, ``{host}``,
    ``{keys}``, ``{policy}``, ``{head}``, ``{port}``, ``{rank}``."""
    env: Mapping[str, str]
    """On top of the host's own environment."""
    config: str
    """The resolved configuration, as JSON."""
    folder: str
    """The driver's working folder: also this host's, where its node has it."""
    policy: str
    """The model's folder or name, as the configuration has it."""
    files: Mapping[str, int] | None = None
    """Of the policy, name -> bytes, where it is a folder on the supervisor's node."""
    hides_gpus: bool = False
    """Ray allots it none."""
    with_key: bool = True
    """It joins by address, with a key of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a host tells of itself before its role is started."""

    address: str
    """At which other nodes reach it."""
    hostname: str
    node_id: str
    pid: int
    python: str
    """``3.11``: code of one minor version cannot be relied on in another."""
    package: str
    protocol: int
    public_key: str
    """Text of the file with its public key; empty where it was asked for none.  The secret never leaves the host."""
    lacks_policy: bool
    """The policy's folder is not on its node, or is another one: it has to be sent."""
    meeting_port: int
    """For the ranks of a learner that is on several nodes to meet at, held by the host; 0 where it is on one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """All that a host needs to start its role."""

    join: str
    """HOST:PORT of the buffer; empty for the buffer itself."""
    host: str
    """Where the role binds its sockets."""
    server_key: str
    """Text of the file with the run's public key."""
    server_secret: str = field(default="", repr=False)
    """Text of the file with the run's secret key, for a role that serves; a secret."""
    keys_dir: str = ""
    """The folder with the run's keys, for a role on the supervisor's node."""
    head: str = ""
    """Address of the node with the learner's first rank."""
    port: int = 0
    rank: int = 0
    """Of the node, among those of the learner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What the supervisor tells a host whenever it asks for news."""

    log_from: int
    """Bytes of the role's log that it has."""
    admitted: Mapping[str, str] | None = None
    """Name -> public key of all that may connect to this role; None where that is as it was."""
    statuses: Mapping[str, bytes] = field(default_factory=dict)
    """Name of the file -> the newest status of each other role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a role's first process ended."""

    code: int
    """-n: signal n killed it."""
    error: bytes = b""
    """What it wrote into its error file (``ops.exits``)."""
    doing: Mapping[str, bytes] = field(default_factory=dict)
    """End of the name -> content of its files about calls of environments that were under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a host tells when it is asked."""

    log: bytes = b""
    """What the role wrote to its output and error, from ``Push.log_from`` on; a part of it where there is much."""
    statuses: Mapping[str, bytes] = field(default_factory=dict)
    """Name of the file -> status, of its processes; those that are new."""
    notices: tuple[bytes, ...] = ()
    """Lines for the terminal, as ``ops.notices`` writes them."""
    usage: RoleUsage | None = None
    memory_mb: float | None = None
    end: End | None = None
    """Once it has ended and the whole log was told."""
