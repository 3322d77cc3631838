"""The output head alone, forward and backward: seconds, and the memory that it takes besides its inputs.

  whole     logits of all tokens at once, log-softmax, and autograd
  chunks    the same, chunk by chunk, each checkpointed
  fused     the policy's own head (``learner/policy/head.py``)
  liger     Liger-Kernel's fused linear cross entropy, log-probs alone: on CUDA, where it is installed

Weights are float32 as the optimizer holds them, products in ``--dtype``; on CUDA numbers are compiled.  The memory is
the allocator's peak there; on a CPU the sum of what is kept for the backward pass, and seconds are the processor's.

    .venv/bin/python benchmarks/head.py
    .venv/bin/python benchmarks/head.py --tokens 8192 --channels 2560 --device cuda --entropy
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A script's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.script import machine, table
from learner.kernels import liger
from learner.kernels.vocabulary import Scoring, Wanted
from learner.policy.head import MAX_LOGITS, scored

Side = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def plain(head: nn.Linear, hidden: Tensor, target: Tensor, *, entropy: bool) -> Tensor:
    logs = head(hidden).float().log_softmax(-1)
    logp = logs.gather(-1, target[:, None])[:, 0]
    return torch.stack([logp, -(logs.exp() * logs).sum(-1)]) if entropy else logp


def in_chunks(head: nn.Linear, hidden: Tensor, target: Tensor, *, entropy: bool) -> Tensor:
    size = max(1, MAX_LOGITS // len(head.weight) // (1 + entropy))
    parts = zip(torch.split(hidden, size), torch.split(target, size), strict=True)
    found = [checkpoint(plain, head, h, t, entropy=entropy, use_reentrant=False) for h, t in parts]
    return torch.cat(found, dim=-1)


def by_liger(head: nn.Linear, hidden: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Fused

    loss: Tensor = Fused.apply(hidden, head.weight, target, None, None, -100, 0.0, 0.0, "none")[0]
    return -loss


def sides(device: torch.device, *, entropy: bool) -> dict[str, Side]:
    scoring = Scoring(scale=1.0, wanted=Wanted(entropy=entropy), compiled=device.type == "cuda")
    found: dict[str, Side] = {
        "whole": lambda head, hidden, target: plain(head, hidden, target, entropy=entropy),
        "chunks": lambda head, hidden, target: in_chunks(head, hidden, target, entropy=entropy),
        "fused": lambda head, hidden, target: scored(head, hidden, target, scoring),
    }
    if device.type == "cuda" and not entropy and not liger.missing():
        found["liger"] = by_liger
    return found


def measured(side: Side, args: argparse.Namespace) -> tuple[float, float]:
    """(seconds of a forward and backward pass, the least of the repeats; GB that they took besides their inputs)."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    head = nn.Linear(args.channels, args.vocab, bias=False, device=device)
    hidden = torch.randn(args.tokens, args.channels, device=device, requires_grad=True)
    target = torch.randint(0, args.vocab, (args.tokens,), device=device)
    # Other programs' share of the processor is not the head's.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: list[float] = []
    kept: dict[int, int] = {}  # where a tensor lies -> its bytes

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for _ in range(args.repeats + 1):  # the first one warms up
        head.weight.grad = hidden.grad = None
        kept.clear()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
        begin = clock()
        with (
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            result = side(head, hidden, target)
        result.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - begin)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (head.weight, hidden)}
    taken = sum(size for at, size in kept.items() if at not in inputs)
    if device.type == "cuda":
        taken = torch.cuda.max_memory_allocated() - base
    return min(seconds[1:]), taken / 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--entropy", action="store_true", help="entropies too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    print(machine(), *([torch.cuda.get_device_name()] if args.device.startswith("cuda") else []))
    print(f"{args.tokens} tokens, {args.vocab} tokens of vocabulary, {args.channels} channels, {args.dtype}")
    rows = [
        (name, *measured(side, args)) for name, side in sides(torch.device(args.device), entropy=args.entropy).items()
    ]
    print(table(("head", "s", "GB"), [(name, f"{seconds:.3f}", f"{size:.2f}") for name, seconds, size in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
