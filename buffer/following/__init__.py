"""A follower's copy of the buffer's journal: how the buffer sends it, how a follower keeps it, how it is promoted."""
