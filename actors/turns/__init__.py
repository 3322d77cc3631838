"""How an actor's turns get to the buffer."""
