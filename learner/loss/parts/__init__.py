"""The loss terms and token weights that a run names: loaded, checked, measured over the batch, and summed up."""
