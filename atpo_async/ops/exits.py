"""How a role reports its end to its supervisor: exit codes, and the files that environment variables name."""

from __future__ import annotations

EXIT_DONE, EXIT_CRASH, EXIT_USER, EXIT_FAILURE = 0, 1, 2, 3
"""The role's work is done; a crash; something that only the user can mend, so that the supervisor does not try again;
a failure with a name, which another attempt may mend.  128 + n: ended by signal n."""

SUPERVISOR_PID = "ATPO_SUPERVISOR_PID"
"""Environment variable: the process whose end ends the role; set in supervised roles only."""

PLACED = "ATPO_PLACED"
"""Environment variable: a cluster looks after the role, which ends with the exit codes above as if it were
supervised."""

ERROR_FILE = "ATPO_ERROR_FILE"
"""Environment variable: where a role that is supervised, or placed, writes ``{"code", "error"}`` when it fails."""

STATUS_FOLDER = "ATPO_STATUS_FOLDER"
"""Environment variable: where a role that has no run folder on its machine writes its status, for what started it."""

DOING = ".doing"
"""Suffix, in place of the error file's own, of a file that names the call of the environment that is under way: an
environment's code may end the process without an error."""

ERROR_PREFIX = "error: "
"""Begins the line in which a role or the command line reports what went wrong."""
