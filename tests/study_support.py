"""Studies for tests: plans over the demo, made-up results, runners that end each cell at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atpo_async.study.cells import Cell, CellResult
from atpo_async.study.grid.axes import Axis
from atpo_async.study.grid.making import Wanted, make_plan
from atpo_async.study.plan import Plan
from atpo_async.study.results.summary import Summary
from atpo_async.study.runner import Job, OnStep

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo.toml"
FILES = [DEMO, ROOT / "configs" / "staleness.toml"]


def plan_of(
    *,
    lags: str = "0,4",
    corrections: str = "none,turn",
    axes: Sequence[str] | None = None,
    options: Mapping[str, str] | None = None,
    **more: object,
) -> Plan:
    """A study of six steps; ``options`` by dotted path, ``more`` are fields of ``Wanted``."""
    given: dict[str, object] = {"name": "staleness", "files": FILES, "seeds": 2} | more
    wanted = Wanted(
        axes=axes if axes is not None else [f"lag={lags}", f"correction={corrections}"],
        options={"run.steps": "6"} | dict(options or {}),
        given=list(options or {}),
        **given,  # type: ignore[arg-type]
    )
    return make_plan(wanted, root=ROOT)


def cell(seed: int = 1, *, stage: str = "", **at: object) -> Cell:
    """A cell by its axes' values; ``__`` in a name stands for a dot."""
    return Cell(at=tuple((name.replace("__", "."), str(value)) for name, value in at.items()), seed=seed, stage=stage)


def done(of: Cell, sampled: float = 0.9, **more: float) -> CellResult:
    figures = {"sampled": sampled + of.seed % 1000 / 1000, "greedy": 1.0, "ess_turn": 0.9, "kl_k3": 0.01}
    return CellResult(cell=of, status="done", figures=figures | {"seconds": 2.0} | more, curve=[(1, 0.1), (2, sampled)])


def failed(of: Cell) -> CellResult:
    return CellResult(cell=of, status="failed", reason="learner: loss is nan", figures={"seconds": 1.0})


FAILED = "failed"
Value = float | str | None
"""Final sampled success, FAILED, or None for a cell that has not ended."""
Key = tuple[str, ...]


def summary_of(
    grid: Mapping[tuple[object, ...], Sequence[Value]],
    names: Sequence[str] = ("lag", "correction"),
    *,
    results: Callable[[CellResult], CellResult] = lambda result: result,
    by_tokens: bool = False,
    reference: str = "",
    **more: float,
) -> Summary:
    """Of results by the values of the axes ``names``; ``more``: further figures, the same in every cell."""
    made = []
    for at, values in grid.items():
        for seed, value in enumerate(values, 1):
            of = Cell(at=tuple((name, str(v)) for name, v in zip(names, at, strict=True)), seed=seed)
            if value == FAILED:
                made.append(failed(of))
            elif value is not None:
                figures = {"sampled": float(value), "ess_turn": 0.5, "kl_k3": 0.01, "seconds": 9.0} | more
                curve = [(1, 0.1), (2, float(value))]
                made.append(results(CellResult(cell=of, status="done", figures=figures, curve=curve)))
    axes = tuple(
        Axis(name=name, values=tuple(dict.fromkeys(str(at[i]) for at in grid)), reference=reference if i else "")
        for i, name in enumerate(names)
    )
    seeds = tuple(range(1, 1 + max(len(values) for values in grid.values())))
    return Summary.of(made, axes=axes, seeds=seeds, by_tokens=by_tokens)


@dataclass
class FakeRunner:
    """Ends each cell at once, or as ``ends`` says; notes what it ran."""

    ends: Callable[[Cell], CellResult | BaseException] = lambda of: done(of)
    ran: list[str] = field(default_factory=list)
    models: list[str | None] = field(default_factory=list)

    async def __call__(self, job: Job, on_step: OnStep) -> CellResult:
        self.ran.append(job.cell.name)
        self.models.append(job.config.model.path)
        on_step(1, 0.5)
        end = self.ends(job.cell)
        if isinstance(end, BaseException):
            raise end
        return end
