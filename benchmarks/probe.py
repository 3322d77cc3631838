"""What the probe says of honest swaps and of faulty ones: how near a false alarm is, and which faults it sees.

  honest  N swaps of weights that change by a small step each (every weight by a normal number times ``--step``),
          through the learner's publisher and the engine's own ``swap``; the probe is drawn anew every 8 swaps, more
          often than a run does.  Shown: the readings (nats of noise on the logits, ``engines.probe``), how the
          logarithm
          of a reading over the median of those before it is spread, and the alarms to expect in 10,000 swaps: by a
          normal fit, and by an exponential fit to the upper tenth, which is heavier.
  faults  each tensor of the model in turn: dropped (it holds other random values of the same size), or stale by one
          step of ``--stale`` (it holds the values of the version before, all others the new ones).  Shown: how many
          the probe sees, the weakest of them in tolerances, and how many the engine names by comparing bit for bit
          (transformers engine: all tensors; vLLM compares in its workers, which the tests show).

    .venv/bin/python benchmarks/probe.py --model models/hopqa-… --dtype bfloat16
    .venv/bin/python benchmarks/probe.py --layers 24 --width 256 --init 0.1 --dtype bfloat16 --swaps 200
    .venv/bin/python benchmarks/probe.py --model Qwen3-0.6B --device cuda --engine vllm --dtype bfloat16 --part honest

Without ``--model`` the model is random: ``--layers``, ``--width``, ``--init`` (standard deviation of its weights).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# A script's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engines.base import Engine, EngineSettings, WeightsFile
from actors.engines.probe import MULTIPLE, NUM_READINGS, Probe
from actors.engines.transformers.engine import TransformersEngine
from atpo_async.config import Config, build
from atpo_async.core.errors import AtpoError, ProbeMismatch, SetupError
from atpo_async.wire.messages import ManifestRequest, WeightsManifest
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from learner.weights.probe import draw_probe, probe_shape
from learner.weights.staging import Stager
from learner.weights.store import WeightsStore

REDRAW_EVERY = 8
ANY = 1e9
"""A tolerance that lets every reading pass: the verdict is made here."""


# --- a learner and an engine


class ForgetfulEngine(TransformersEngine):
    """Leaves the tensors of ``forgotten`` as they are."""

    forgotten: frozenset[str] = frozenset()

    async def start(self) -> None:
        await super().start()
        copy = self.runner.copy

        def copy_most(held: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
            if name not in self.forgotten:
                copy(held, tensor, name)

        self.runner.copy = copy_most


def random_model(folder: Path, args: argparse.Namespace) -> Path:
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=args.width // 4, tie_word_embeddings=True,
        initializer_range=args.init, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def make_engine(model: Path, args: argparse.Namespace, config: Config) -> Engine:
    settings = EngineSettings(
        model=model, dtype=args.dtype, device=args.device, max_model_len=config.model.max_context_tokens,
        max_num_seqs=8, num_threads=args.threads, gpu_memory_utilization=args.memory,
    )  # fmt: skip
    if args.engine == "transformers":
        return ForgetfulEngine(settings)
    from actors.engines.vllm.engine import VllmEngine

    return VllmEngine(settings)


class Source:
    """A learner's weights, that change step by step, as files an engine can take up."""

    def __init__(self, model: Path, folder: Path, args: argparse.Namespace) -> None:
        self.config = build(
            {
                "model": {"path": str(model), "dtype": args.dtype},
                "learner": {"device": "cpu" if args.device == "cpu" else "auto"},
                "weights": {"probe_tolerance": ANY, "shared_memory": True},
            }
        )
        self.trainer = Trainer(self.config, accelerator=make_accelerator(self.config), policy=load_policy(self.config))
        self.store = WeightsStore(run=f"benchmark-{folder.name}", fallback=folder, settings=self.config.weights)
        self.stager = Stager(args.dtype)
        self.version = 0
        self._random = torch.Generator().manual_seed(args.seed)
        self._probe = self.draw()

    def draw(self) -> np.ndarray:
        self._probe = draw_probe(self.trainer, probe_shape(self.config), seed=(self.version,))
        return self._probe

    def step(self, size: float) -> None:
        with torch.no_grad():
            for parameter in self.trainer.policy.parameters():
                noise = torch.randn(parameter.shape, generator=self._random)
                parameter.add_(noise.to(parameter.device), alpha=size)

    def publish(self) -> WeightsFile:
        self.version += 1
        staged = self.stager.stage(self.trainer.whole.tensors(), copied=False)
        if staged is None:
            raise SetupError(f"version {self.version} was not staged")
        announced = self.store.add(
            self.version,
            staged,
            probe_tokens=self._probe,
            probe_logprobs=self.trainer.whole.probe(self._probe),
        )
        staged.release()
        manifest = self.store.answer(ManifestRequest(run=announced.run if announced else "", version=self.version))
        if announced is None or announced.shm_path is None or not isinstance(manifest, WeightsManifest):
            raise SetupError(f"version {self.version} was not published")
        return WeightsFile(path=Path(announced.shm_path), manifest=manifest)


# --- honest swaps


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the logarithm of a reading over the median of those before."""

    mean: float
    deviation: float
    largest: float
    normal_alarms: float
    """In 10,000 swaps."""
    exponential_alarms: float


def spread_of(readings: Sequence[float]) -> Spread:
    """How far honest readings are from ``MULTIPLE`` medians."""
    # An engine that runs the learner's own code is off by nothing at all.
    readings = [max(reading, 1e-9) for reading in readings]
    logs = [
        math.log(readings[i] / statistics.median(readings[max(0, i - NUM_READINGS) : i]))
        for i in range(1, len(readings))
    ]
    mean, deviation = statistics.fmean(logs), max(statistics.stdev(logs), 1e-9)
    limit = math.log(MULTIPLE)
    border = float(np.quantile(logs, 0.9))
    excess = max(statistics.fmean([x - border for x in logs if x > border] or [0.0]), 1e-9)
    return Spread(
        mean=mean,
        deviation=deviation,
        largest=max(logs),
        normal_alarms=1e4 * 0.5 * math.erfc((limit - mean) / deviation / math.sqrt(2)),
        exponential_alarms=1e4 * 0.1 * math.exp(-(limit - border) / excess),
    )


async def honest(source: Source, engine: Engine, args: argparse.Namespace) -> Probe:
    """Prints the figures.  The measure as an engine has it after so many swaps."""
    probe, readings, alarms, spans = Probe(device=args.real_device, dtype=args.dtype), [], 0, []
    for number in range(args.swaps):
        if number:
            source.step(args.step)
        if number % REDRAW_EVERY == 0:
            source.draw()
        weights = source.publish()
        report = await engine.swap(weights)
        readings.append(report.probe_error)
        spans.append(float(np.std(weights.manifest.probe_logprobs)))
        manifest = msgspec.structs.replace(weights.manifest, probe_tolerance=None)
        alarms += not report.probe_error <= probe.tolerance(manifest)
        probe._readings.append(report.probe_error)
    spread = spread_of(readings)
    print(f"honest: {len(readings)} swaps by a step of {args.step:g} a weight, {alarms} refused")
    print(
        f"  reading, nats: first {readings[0]:.3g}, median {statistics.median(readings):.3g}, "
        f"largest {max(readings):.3g}; log-probs differ among themselves by {statistics.median(spans):.3g}"
    )
    print(
        f"  ln(reading / median before): mean {spread.mean:.3f}, deviation {spread.deviation:.3f}, largest "
        f"{spread.largest:.3f}; refused above {math.log(MULTIPLE):.3f}"
    )
    print(
        f"  false alarms to expect in 10,000 swaps: {spread.normal_alarms:.1e} (normal), "
        f"{spread.exponential_alarms:.1e} (exponential tail)",
        flush=True,
    )
    return probe


# --- faulty ones


def groups(manifest: WeightsManifest) -> Iterator[frozenset[str]]:
    """Names that are one tensor: a tied head goes with its embeddings."""
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    names = {spec.name for spec in manifest.tensors}
    if tied <= names:
        yield frozenset(tied)
    for name in sorted(names - tied):
        yield frozenset({name})


def with_others(good: WeightsFile, names: frozenset[str], other: dict[str, bytes], folder: Path) -> WeightsFile:
    """The file with the bytes of ``names`` replaced: what an engine holds that has not taken them up."""
    payload = bytearray(good.path.read_bytes())
    for spec in good.manifest.tensors:
        if spec.name in names:
            payload[spec.offset : spec.offset + spec.nbytes] = other[spec.name]
    path = folder / "faulty.bin"
    path.write_bytes(payload)
    return WeightsFile(path=path, manifest=good.manifest)


def bytes_of(weights: WeightsFile) -> dict[str, bytes]:
    payload = weights.path.read_bytes()
    return {s.name: payload[s.offset : s.offset + s.nbytes] for s in weights.manifest.tensors}


def random_bytes(weights: WeightsFile, seed: int) -> dict[str, bytes]:
    """For each tensor the values of the same tensor in another order."""
    source = np.random.default_rng(seed)
    found = {}
    for spec in weights.manifest.tensors:
        item = np.dtype("u4" if spec.dtype == "float32" else "u2")
        values = np.frombuffer(bytes_of_one(weights, spec.offset, spec.nbytes), dtype=item)
        # A norm's scales are nearly equal: another order changes nothing that matters, ones do.
        if len(spec.shape) == 1:
            value = torch.ones(spec.shape, dtype=getattr(torch, spec.dtype)).view(torch.uint8).numpy().tobytes()
        else:
            value = source.permutation(values).tobytes()
        found[spec.name] = value
    if {"lm_head.weight", "model.embed_tokens.weight"} <= found.keys():
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def bytes_of_one(weights: WeightsFile, offset: int, nbytes: int) -> bytes:
    with weights.path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


@dataclass(slots=True)
class Tally:
    faults: int = 0
    seen: int = 0
    named: int = 0
    weakest: float = math.inf
    """Of all, reading in tolerances."""
    missed: str = ""


async def one_kind(
    source: Source, engine: Engine, probe: Probe, good: WeightsFile, other: dict[str, bytes], folder: Path
) -> Tally:
    """Every tensor of ``good`` in turn as ``other`` has it."""
    tally, given = Tally(), bytes_of(good)
    for names in groups(good.manifest):
        if all(other[name] == given[name] for name in names):
            continue  # the step is below the engine's precision: there is nothing to be stale
        tally.faults += 1
        faulty = with_others(good, names, other, folder)
        report = await engine.swap(faulty)
        tolerance = probe.tolerance(msgspec.structs.replace(good.manifest, probe_tolerance=None))
        tally.seen += not report.probe_error <= tolerance
        if report.probe_error / tolerance < tally.weakest:
            tally.weakest, tally.missed = report.probe_error / tolerance, min(names)
        if isinstance(engine, ForgetfulEngine):
            engine.forgotten = names
            try:
                await engine.swap(good)
            except ProbeMismatch as exc:
                tally.named += any(name in str(exc) for name in names)
            engine.forgotten = frozenset()
    await engine.swap(good)
    return tally


async def faults(source: Source, engine: Engine, probe: Probe, args: argparse.Namespace, folder: Path) -> None:
    kinds: list[tuple[str, float | None]] = [("dropped", None)]
    kinds += [(f"stale by a step of {size:g}", size) for size in args.stale]
    for label, size in kinds:
        before = source.publish()
        old = bytes_of(before)
        await engine.swap(before)
        if size is not None:
            source.step(size)
        good = source.publish()
        other = random_bytes(good, args.seed) if size is None else old
        tally = await one_kind(source, engine, probe, good, other, folder)
        print(
            f"{label}: {tally.faults} tensors differ at {args.dtype}; the probe sees {tally.seen} (weakest: "
            f"{tally.missed}, {tally.weakest:.2g} tolerances); "
            + (f"compared bit for bit: {tally.named} named" if isinstance(engine, ForgetfulEngine) else ""),
            flush=True,
        )


async def measure(args: argparse.Namespace, folder: Path) -> None:
    model = Path(args.model) if args.model else random_model(folder / "model", args)
    source = Source(model, folder, args)
    engine = make_engine(model, args, source.config)
    try:
        await engine.start()
        probe = await honest(source, engine, args)
        if "faults" in args.part:
            await faults(source, engine, probe, args, folder)
    finally:
        await engine.close()
        source.store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("honest", "faults"), default=["honest", "faults"])
    parser.add_argument("--model", help="folder; by default a random model")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--init", type=float, default=0.02)
    parser.add_argument("--device", default="cpu", help="of the engine, and of the learner: cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--step", type=float, default=1e-4, help="an honest step: of each weight, standard deviation")
    parser.add_argument("--stale", type=float, nargs="*", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument(
        "--memory", type=float, default=0.4, help="share of the GPU that vLLM takes; the learner is there"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.real_device = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda"
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.real_device == "cuda" else "CPU"
    model = args.model or f"random, {args.layers} layers of {args.width}, weights of {args.init:g}"
    print(f"{model}; {args.engine} engine, {args.dtype}, {where}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="probe-") as folder:
            asyncio.run(measure(args, Path(folder)))
    except AtpoError as exc:
        sys.exit(f"error: {exc}")


# vLLM starts its processes by spawning: they import this module again.
if __name__ == "__main__":
    main()
