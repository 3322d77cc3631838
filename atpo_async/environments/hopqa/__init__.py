"""hopqa: multi-hop questions over a world of random facts, answered through a look-up tool."""
