"""The learner: batch, pack, loss, step, publish."""
