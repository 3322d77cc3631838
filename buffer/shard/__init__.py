"""What a shard has beside a whole buffer's parts: the handlers of its two sockets."""
