"""The store of leaves worth imitating: which there are, what they are worth now, which go with a batch."""
