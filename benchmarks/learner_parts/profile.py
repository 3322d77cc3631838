"""Where the time of one step goes: torch's profiler over it, as seconds by kernel (on a CPU: by operator)."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OPTIMIZER = "Optimizer.step"
"""How torch marks the range of an optimizer's step; on the GPU's own timeline too."""


def seconds_by_kernel(run: Callable[[], object], device: str) -> dict[str, float]:
    """Name -> seconds of one call.  On CUDA kernels alone, summed over streams; on a CPU each operator's own time.

    What an optimizer launches carries its range's name in front: compiled, its kernels have names like all others.
    """
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    events: list[Any] = list(profiler.events() or ())
    return of_device(events) if cuda else of_cpu(events)


def of_cpu(events: list[Any]) -> dict[str, float]:
    """Each operator's own time, without that of those it calls."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CPU and not event.is_async:
            found[event.name] += event.self_cpu_time_total / 1e6
    return dict(found)


def of_device(events: list[Any]) -> dict[str, float]:
    """Kernels, without the ranges that annotations span over them."""
    mine = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in mine
        if _is_range(event) and event.name.startswith(OPTIMIZER)
    )
    starts = [start for start, _ in spans]
    found: dict[str, float] = defaultdict(float)
    for event in mine:
        if _is_range(event):
            continue
        at = bisect_right(starts, event.time_range.start) - 1
        inside = at >= 0 and event.time_range.start < spans[at][1]
        found[f"{OPTIMIZER}: {event.name}" if inside else event.name] += event.time_range.elapsed_us() / 1e6
    return dict(found)


def _is_range(event: Any) -> bool:
    """Whether a GPU event is an annotation and no kernel."""
    marked = bool(getattr(event, "is_user_annotation", False))
    return marked or event.name.startswith((OPTIMIZER, "Optimizer.zero_grad", "ProfilerStep"))
