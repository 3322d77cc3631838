"""How many graphs of one function torch keeps, in whatever thread it compiles one."""

from __future__ import annotations

import torch

VARIANTS = 64
"""Of one function, before torch falls back to the function as it stands.  Its own limit, 8, is soon met by the shapes
that FlexAttention is compiled for, each with a gradient and without; what it falls back to holds T * T."""


def raise_limit() -> None:
    """Let torch keep ``VARIANTS`` of a function, in this thread.

    Torch's settings may be each thread's own (2.13), and on CUDA backward passes run in a thread of autograd's: what
    may be compiled there calls this first.
    """
    if torch._dynamo.config.recompile_limit < VARIANTS:
        torch._dynamo.config.recompile_limit = VARIANTS
