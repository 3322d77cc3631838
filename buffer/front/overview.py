"""What the shards say of each actor, put together for the run's status.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from buffer.front.messages import ActorRow

Rows = Mapping[str, ActorRow]


def put_together(shards: Sequence[Rows]) -> dict[str, dict[str, object]]:
    """Actor -> what is known of it, as ``leases.overview.actor_rows`` has it of one buffer.

    A shard counts for the share and the lag of an actor as far as turns come to it.
    """
    weights = [sum(row.turns_per_s or 0.0 for row in rows.values()) for rows in shards]
    total = sum(weights)
    found: dict[str, dict[str, object]] = {}
    for actor in sorted({actor for rows in shards for actor in rows}):
        there = [(rows[actor], weight) for rows, weight in zip(shards, weights, strict=True) if actor in rows]
        rates = [row.turns_per_s for row, _ in there if row.turns_per_s is not None]
        parts = [(row, (row.share or 0.0) * weight) for row, weight in there]
        turns = sum(part for _, part in parts)
        late = [(row.lag, part) for row, part in parts if row.lag is not None and part]
        found[actor] = {
            "host": next((row.host for row, _ in there if row.host), ""),
            "turns_per_s": round(sum(rates), 3) if rates else None,
            "lag": round(sum(lag * part for lag, part in late) / sum(part for _, part in late), 2) if late else None,
            "trees": sum(row.trees for row, _ in there),
            "done": sum(row.done for row, _ in there),
            "silent_s": min(row.silent_s for row, _ in there),
            "silent": all(row.silent for row, _ in there),
            "share": round(turns / total, 4) if total else None,
        }
    return found
