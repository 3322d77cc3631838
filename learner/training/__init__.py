"""One batch: forward passes, their loss, the optimizer's steps, and what is reported of them."""
