"""What the buffer says of each actor, for the run's status: where it is, how fast, how old its turns are.  Pure."""

from __future__ import annotations

from buffer.leases.ledger import Ledger


def actor_rows(ledger: Ledger, now: float) -> dict[str, dict[str, object]]:
    """Actor -> what is known of it, of those that have not left.

    ``turns_per_s`` is while it holds leases, ``share`` of the turns of all actors of late, ``lag`` by how many versions
    its turns were behind the learner when they came, the mean; each None where not known yet.
    """
    rates, presence = ledger.rates, ledger.actors
    rates.now = max(rates.now, now)
    found: dict[str, dict[str, object]] = {}
    received: dict[str, float] = {}
    for actor, heard_at in presence.present():
        host = presence.host_of(actor)
        if actor not in rates and not host.name:
            continue  # heard of through its link alone: it has not joined
        received[actor], lag = rates.received(actor)
        rate = rates.turns_per_s(actor)
        found[actor] = {
            "host": host.name,
            "turns_per_s": None if rate is None else round(rate, 3),
            "lag": None if lag is None else round(lag, 2),
            "trees": rates.held(actor, "train") + rates.held(actor, "eval"),
            "done": rates.trees(actor),
            "silent_s": round(max(now - heard_at, 0.0), 1),
            "silent": presence.is_silent(actor, now),
        }
    total = sum(received.values())
    for actor, row in found.items():
        row["share"] = round(received[actor] / total, 4) if total else None
    return found
