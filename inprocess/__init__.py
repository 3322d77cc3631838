"""A run in one process: its generation, its buffer's arithmetic and its learner take turns, without sockets."""
