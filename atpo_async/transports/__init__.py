"""Weight transports: how the bytes of a version get from the learner to an actor."""
