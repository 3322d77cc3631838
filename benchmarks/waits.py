"""Who waits for whom: runs whose engine computes nothing and whose policy is tiny, so that hand-overs are what is left.

Each side is a whole run (`atpo train`: buffer, learner, actor) with the made-up engine of ``benchmarks/fast_engine.py``
and its own settings; sides take turns, ``--rounds`` times.  The first steps of a run are left out.

    .venv/bin/python benchmarks/waits.py                                 the demo's shape, as configured by default
    .venv/bin/python benchmarks/waits.py --side a --side b actor.trees_in_flight=4
    .venv/bin/python benchmarks/waits.py --commit-ms 40      as on a disk whose commits take 40 ms

``--side NAME [SETTING=VALUE …]`` names a side and what it differs in; ``--base SETTING=VALUE …`` applies to all.

Prints for each side the share of its time that learner and actors waited, steps and trees a second; ``--json`` all of
it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from atpo_async.run.metrics import read_metrics
from benchmarks.fast_engine import VOCABULARY
from benchmarks.script import machine, table

ROOT = Path(__file__).resolve().parent.parent
RUN_S = 300.0
SKIPPED_STEPS = 5
DEMO: dict[str, str] = {
    "run.seed": "1",
    "model.max_context_tokens": "128",
    "environment.name": "benchmarks.fast_engine:Chains",
    "search.initial_rollouts": "6",
    "search.branches": "3",
    "search.rounds": "1",
    "search.max_action_tokens": "8",
    "staleness.max_lag": "2",
    "staleness.trees_per_batch": "12",
    "learner.lr": "1e-9",
    "learner.device": "cpu",
    "learner.num_threads": "1",
    "learner.checkpoint_every": "100000",
    "actor.engine": "benchmarks.fast_engine:FastEngine",
    "actor.max_num_seqs": "256",
    "actor.device": "cpu",
    "weights.probe_tolerance": "1000",
    "eval.every_steps": "0",
    "eval.at_start": "false",
    "eval.at_end": "false",
    "metrics.trees": "0",
}
"""The demo's shape."""


def make_policy(folder: Path) -> Path:
    """A policy of one narrow layer, all but uniform over its tokens, as the made-up engine samples."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, max_position_embeddings=512,
        )
    ).save_pretrained(folder)  # fmt: skip
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def run_once(model: Path, folder: Path, settings: Mapping[str, str], *, steps: int) -> Path:
    """A whole run; returns its folder.  Ends the benchmark where it fails."""
    run = folder / "run"
    options = {**settings, "run.steps": str(steps), "run.dir": str(folder), "run.name": "run", "model.path": str(model)}
    file = folder / "run.toml"
    folder.mkdir()
    file.write_text("", encoding="utf-8")
    command = [sys.executable, "-m", "atpo_async.cli", "train", str(file)]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
    if done.returncode:
        raise SystemExit(f"a run failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return run


def shares(run: Path) -> dict[str, float]:
    """What the run's metrics say after its first steps."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if r.step >= SKIPPED_STEPS]
    steps = [r.metrics for r in records if "time/between_steps_s" in r.metrics]
    reports = [r.metrics for r in records if "time/actor_interval_s" in r.metrics]
    between = sum(m["time/between_steps_s"] for m in steps)
    interval = sum(m["time/actor_interval_s"] for m in reports)

    def over(found: Sequence[Mapping[str, float]], name: str, seconds: float) -> float:
        return sum(m.get(name, 0.0) for m in found) / max(seconds, 1e-9)

    def mean(found: Sequence[Mapping[str, float]], name: str) -> float:
        values = [m[name] for m in found if name in m]
        return statistics.fmean(values) if values else 0.0

    return {
        "learner_waits": over(steps, "time/learner_wait_s", between),
        "learner_steps": over(steps, "time/step_s", between),
        "learner_publishes": over(steps, "weights/publish_s", between),
        "actor_waits": over(reports, "time/actor_wait_s", interval),
        "steps_per_s": len(steps) / max(between, 1e-9),
        "step_s": mean(steps, "time/step_s"),
        "publish_s": mean(steps, "weights/publish_s"),
        "trees_per_s": over(reports, "actor/trees", interval),
        "turns_per_s": over(reports, "actor/turns", interval),
        "in_flight": mean(reports, "engine/in_flight"),
        "trees_in_flight": mean(reports, "actor/trees_in_flight"),
        "fetch_s": mean(reports, "weights/fetch_s"),
        "swap_s": mean(reports, "weights/swap_s"),
        "swaps_per_step": over(reports, "weights/swaps", 1.0) / max(len(steps), 1),
        "commit_s": mean(steps, "buffer/commit_s/mean"),
        "lag": mean(steps, "lag/mean"),
        "masked": mean(steps, "lag/masked_share"),
    }


def settings_of(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def measure(sides: Mapping[str, Mapping[str, str]], *, steps: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="atpo-bench-") as scratch:
        model = make_policy(Path(scratch) / "policy")
        for number in range(rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                folder = Path(scratch) / f"{name}-{number}"
                found[name].append(shares(run_once(model, folder, {**DEMO, **sides[name]}, steps=steps)))
    return found


def summary(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The median over the rounds of every figure of every side."""
    return {
        name: {figure: round(statistics.median(each[figure] for each in rounds), 4) for figure in rounds[0]}
        for name, rounds in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", action="append", nargs="+", metavar="WORD", help="NAME [SETTING=VALUE …]")
    parser.add_argument("--base", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--commit-ms", type=float, default=0.0, help="how much longer a commit of the journal takes")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file that gets everything")
    args = parser.parse_args()
    base = settings_of(args.base)
    if args.commit_ms:
        base |= {
            "buffer.sampling": "benchmarks.slow_disk:make",
            "buffer.sampling_options.commit_ms": str(args.commit_ms),
        }
    sides = {words[0]: base | settings_of(words[1:]) for words in args.side or [["default"]]}
    found = measure(sides, steps=args.steps, rounds=args.rounds)
    medians = summary(found)
    print(table(("figure", *medians), [(figure, *(medians[name][figure] for name in medians))
                                       for figure in next(iter(medians.values()))]))  # fmt: skip
    if args.json:
        record = {"machine": machine(), "sides": sides, "steps": args.steps, "medians": medians, "rounds": found}
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
