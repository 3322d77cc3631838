"""A configuration as it stands, run for some steps on a made-up policy of its model's size and on made-up tasks.

For a machine with a GPU and without a network: it shows that the configuration starts, fits and learns a batch, and how
long a step takes with engine and learner at work.  What is learned means nothing: weights are random, and so are
rewards (by the first token of a chain's last action).

    .venv/bin/python benchmarks/whole_run.py configs/gpu_80gb.toml --steps 4 --json run.json

Dotted options are the configuration's.  Prints, of the steps after the first: seconds between steps and in the step,
the waits of learner and actors, and what engines and weights report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from atpo_async.config import Config, load, split_options
from atpo_async.core.errors import AtpoError, ConfigError
from atpo_async.run.metrics import Record, read_metrics
from benchmarks.fast_engine import VOCABULARY
from benchmarks.learner_parts.sides import SIZES

SIZE_OF = {"Qwen/Qwen3-0.6B": "0.6b", "Qwen/Qwen3-1.7B": "1.7b", "Qwen/Qwen3-4B": "4b"}
SHOWN = (
    *("time/between_steps_s", "time/step_s", "time/learner_wait_s", "tokens/forward", "grad_norm"),
    *("pack/compilations", "pack/micro_batch_tokens", "pack/checkpointed_layers"),
)
"""Metrics of the learner's steps that are told, where the run has them."""
BESIDE = ("time/actor_wait_s", "time/actor_interval_s", "engine/", "weights/")
"""Beginnings of others, of which the last value is told."""


def settings_of(config: Config, *, folder: Path, model: Path, steps: int) -> dict[str, str]:
    """What is laid over the configuration: the made-up model and tasks, no evaluation, so many steps."""
    action = min(128, config.search.max_action_tokens)
    context = config.model.max_context_tokens
    turns = max(1, min(4, context // (4 * action)))
    prompt = min(512, context // 4)
    observation = max(1, min(200, (context - prompt - turns * action) // (turns + 1)))
    return {
        "run.steps": str(steps),
        "run.dir": str(folder),
        "run.name": "run",
        "model.path": str(model),
        "environment.name": "benchmarks.fast_engine:Chains",
        "environment.options.turns": str(turns),
        "environment.options.prompt": str(prompt),
        "environment.options.observation": str(observation),
        "search.max_action_tokens": str(action),
        "eval.every_steps": "0",
        "eval.at_start": "false",
        "eval.at_end": "false",
        "metrics.trees": "0",
        "learner.checkpoint_every": "100000",
    }


def make_model(size: str, folder: Path, *, dtype: str, device: str) -> Path:
    """A model folder of that size with random weights, and a tokenizer of as many words as the tasks use."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    SIZES[size].make(device=device).to(getattr(torch, dtype)).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def figures(records: Sequence[Record]) -> dict[str, float]:
    """Medians over the steps after the first, by metric; and how many steps there were."""
    steps = [record.metrics for record in records if "time/step_s" in record.metrics]
    found: dict[str, float] = {"steps": len(steps)}
    for name in SHOWN:
        values = [metrics[name] for metrics in steps[1:] if name in metrics]
        if values:
            found[name] = statistics.median(values)
    for record in records:
        found |= {name: value for name, value in record.metrics.items() if name.startswith(BESIDE)}
    return found


def train(config: str, settings: Mapping[str, str], options: Mapping[str, str]) -> tuple[int, str]:
    """(status, the end of what it printed)."""
    words = [sys.executable, "-m", "atpo_async.cli", "train", config]
    words += [f"--{name}={value}" for name, value in (dict(settings) | dict(options)).items()]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stderr.write(done.stdout)
    return done.returncode, done.stdout[-3000:]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", choices=list(SIZES), help="of the policy; default: that of the configuration's model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="gets the figures too")
    try:
        rest, options = split_options(argv)
        args = parser.parse_args(rest)
        config = load([args.config], options)
        size = args.size or SIZE_OF.get(config.model.path)
        if size is None:
            raise ConfigError(f"no made-up policy has the size of {config.model.path!r}: give --size")
        with tempfile.TemporaryDirectory(prefix="atpo-whole-run-") as name:
            folder = Path(name)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = make_model(size, folder / "model", dtype=config.model.dtype, device=device)
            torch.cuda.empty_cache()
            status, said = train(
                args.config, settings_of(config, folder=folder, model=model, steps=args.steps), options
            )
            metrics = folder / "run" / "metrics.jsonl"
            found = figures(list(read_metrics(metrics)) if metrics.is_file() else [])
    except AtpoError as exc:
        print(f"whole_run.py: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, ConfigError) else 1
    print(", ".join(f"{name} {value:g}" for name, value in found.items()))
    if args.json is not None:
        result = {"config": args.config, "size": size, "status": status, "figures": found, "said": said}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
