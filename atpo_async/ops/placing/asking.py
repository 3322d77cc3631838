"""How a role that a shell has started is asked to end: lines for the scripts of all clusters."""

from __future__ import annotations

ASK = r"""# ask: SIGTERM to the role, or to its ranks where it has several, which their launcher would kill after 30 s.
ask() {
  ranks=
  for process in /proc/[0-9]*; do
    if grep -qs "^PPid:[[:space:]]*$role\$" "$process/status" && grep -qs 'LOCAL_RANK=' "$process/environ"; then
      ranks="$ranks ${process##*/}"
    fi
  done
  kill -TERM ${ranks:-$role} 2>/dev/null || true
}
"""
"""``$role`` is its process.  Any POSIX shell takes it."""
