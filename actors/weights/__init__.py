"""New weights for an actor: fetched, verified, and loaded into the engine."""
