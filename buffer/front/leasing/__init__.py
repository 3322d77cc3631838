"""Requests for leases at the front: in which order they are answered, and which shards are asked for what."""
