"""The demo's policy: a small Qwen3 model made from nothing and warm-started on noisy demonstrations.

What comes out is an ordinary model folder (config.json, generation_config.json, model.safetensors, tokenizer files)
that vLLM and transformers load, and ``warm_start.json``, which records how it was made.  The demonstrations' faults
(``world.Habits``) are what reinforcement learning has to remove; copying names and the form of the
calls are learnt here.

torch is imported only when there is something to make: to see that nothing changed takes no time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.environments.hopqa.world import END, PAD, Habits, World, demonstrate, save_tokenizer
from atpo_async.run import processes, scratch

if TYPE_CHECKING:
    import torch

RECIPE_VERSION = 1
"""Of the recipe; raise it when the same settings would give another model (architecture, demonstrations, optimizer)."""

RECORD = "warm_start.json"

_ASIDE = re.compile(r"\.hopqa-[0-9a-f]{8}\.([0-9]+)\.tmp")
"""Folder in which a policy is made before it is renamed; the number is the process that makes it."""

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, mean loss of late)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what the model becomes."""

    seed: int = 0
    """Of the world, the model and the order of the examples."""
    steps: int = 200
    min_hops: int = 3
    max_hops: int = 3
    num_names: int = 64
    num_relations: int = 10
    """As of ``World``."""
    noise: float = 0.38
    mixed_up: int = 2
    mix_up_rate: float = 0.7
    """As of ``Habits``."""
    lr: float = 4e-3
    batch_size: int = 32
    layers: int = 4
    width: int = 128

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"warm start: {name} must be >= {least}, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ConfigError(f"warm start: lr must be > 0, got {self.lr}")
        if self.width < 32 or self.width % 32:
            raise ConfigError(f"warm start: width must be a multiple of 32 (the head size), got {self.width}")
        if not 0 <= self.mixed_up <= self.num_relations // 2:
            raise ConfigError(
                f"warm start: mixed_up must be 0 to {self.num_relations // 2} (half of num_relations), "
                f"got {self.mixed_up}"
            )
        _ = self.world, self.habits  # refuse what these refuse before anything is made

    @property
    def world(self) -> World:
        return World(
            seed=self.seed, min_hops=self.min_hops, max_hops=self.max_hops,
            num_names=self.num_names, num_relations=self.num_relations,
        )  # fmt: skip

    @property
    def habits(self) -> Habits:
        return Habits(noise=self.noise, mixed_up=self.mixed_up, mix_up_rate=self.mix_up_rate)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that differ where settings do."""
        text = json.dumps({"version": RECIPE_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartReport:
    path: Path
    reused: bool
    """Whether the folder was there already, made by the same recipe."""
    loss: float
    """Nats per action token, mean of the last tenth of the steps."""
    num_parameters: int
    duration_s: float
    """Seconds that making it took; as recorded then if the folder was reused."""


def recipe_for(*, seed: int, steps: int | None = None, options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that fits an environment's options (``environment.options``); its other options are left aside.

    Raises ConfigError for values out of range.
    """
    given = dict(options or {})
    chosen: dict[str, Any] = {"seed": seed}
    if "hops" in given:
        chosen |= {"min_hops": given["hops"], "max_hops": given["hops"]}
    for key in ("seed", "min_hops", "max_hops", "num_names", "num_relations"):
        if key in given:
            chosen[key] = given[key]
    if steps is not None:
        chosen["steps"] = steps
    return Recipe(**chosen)


def policy_folder(root: Path, recipe: Recipe) -> Path:
    """Where a recipe's model belongs: ``<root>/hopqa-<fingerprint>``."""
    return root / f"hopqa-{recipe.fingerprint}"


def make_policy(
    path: Path,
    recipe: Recipe,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> WarmStartReport:
    """Make the policy at ``path`` unless the same recipe has made it already.

    Args:
        path: the model folder; ``policy_folder`` gives one that no other recipe claims.
        recipe: what to make.
        device: where to train; ``auto`` is Accelerate's choice.
        num_threads: torch threads while training; None for torch's choice.
        progress: called every ten steps.

    Raises:
        SetupError: ``path`` holds something else, or cannot be written.
    """
    scratch.sweep_unheld(path.parent, _is_left_behind)
    if (there := _already_made(path, recipe)) is not None:
        return there
    lock: int | None = None
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        with contextlib.suppress(OSError):  # a file system without locks: its maker's number tells
            lock = scratch.hold(aside)
        record = _make(aside, recipe, device=device, num_threads=num_threads, progress=progress)
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            aside.rename(path)
        except OSError:
            # Another process was quicker with the same recipe: its model is as good as ours.
            if (there := _already_made(path, recipe)) is not None:
                return there
            raise
    except OSError as exc:
        raise SetupError(f"model folder {path} cannot be written: {exc}; set model.path to a folder that can") from exc
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return _report(path, record, reused=False)


def _is_left_behind(folder: Path) -> bool:
    """Whether the process that made the folder is gone from this machine; one on another machine holds its lock."""
    found = _ASIDE.fullmatch(folder.name)
    return found is not None and processes.started(int(found[1])) is None


def _already_made(path: Path, recipe: Recipe) -> WarmStartReport | None:
    if not path.exists():
        return None
    way_out = "remove it, or name another folder"
    if not path.is_dir():
        raise SetupError(f"model folder {path} is a file; {way_out}")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        made_by = record["fingerprint"]
    except FileNotFoundError:
        if not any(path.iterdir()):
            path.rmdir()
            return None
        raise SetupError(f"model folder {path} was not made by the warm start (no {RECORD}); {way_out}") from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise SetupError(f"model folder {path} has an unreadable {RECORD} ({exc}); {way_out}") from exc
    if made_by != recipe.fingerprint:
        was = record.get("recipe", {})
        other = ", ".join(
            f"{f.name} {was.get(f.name)!r} not {getattr(recipe, f.name)!r}"
            for f in fields(recipe)
            if was.get(f.name) != getattr(recipe, f.name)
        )
        other = other or f"recipe version {record.get('recipe_version')!r} not {RECIPE_VERSION}"
        raise SetupError(f"model folder {path} was warm-started with other settings ({other}); {way_out}")
    return _report(path, record, reused=True)


def _report(path: Path, record: Mapping[str, Any], *, reused: bool) -> WarmStartReport:
    return WarmStartReport(
        path=path,
        reused=reused,
        loss=float(record["loss"]),
        num_parameters=int(record["num_parameters"]),
        duration_s=float(record["duration_s"]),
    )


def _make(
    folder: Path,
    recipe: Recipe,
    *,
    device: Literal["auto", "cpu", "cuda"],
    num_threads: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Build, train and save the model; returns what goes into its record."""
    import torch
    import transformers

    began = time.monotonic()
    threads_before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        # The caller's generator is left as it was.
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            model = new_model(recipe)
            loss = _train(model, recipe, device=device, progress=progress)
    finally:
        torch.set_num_threads(threads_before)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    save_tokenizer(recipe.world, folder)
    return {
        "fingerprint": recipe.fingerprint,
        "recipe_version": RECIPE_VERSION,
        "recipe": asdict(recipe),
        "loss": loss,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "duration_s": round(time.monotonic() - began, 3),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def new_model(recipe: Recipe) -> Any:
    """A random ``Qwen3ForCausalLM`` with tied embeddings over the world's words, float32, from torch's generator."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ids = _token_ids(recipe.world)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(ids),
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // 32,
            num_key_value_heads=recipe.width // 32,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            # A width this small needs more than the usual 0.02: telling names apart, and copying them, is learnt three
            # times sooner.
            initializer_range=0.08,
            pad_token_id=ids[PAD],
            eos_token_id=ids[END],
            bos_token_id=None,
        )
    ).float()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=ids[PAD], eos_token_id=ids[END]
    )
    return model


def _train(model: Any, recipe: Recipe, *, device: str, progress: Progress | None) -> float:
    """Train on demonstrations; returns the mean loss of the last tenth of the steps, in nats per action token."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    if device == "cuda" and not torch.cuda.is_available():
        raise SetupError("learner.device = 'cuda' but torch finds no GPU here; use 'auto' or 'cpu'")
    accelerator = Accelerator(cpu=device == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    trained, optimizer = accelerator.prepare(model, optimizer)
    trained.train()
    rng, losses = Random(recipe.seed), [0.0] if recipe.steps == 0 else []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, recipe.steps)
        rows, is_action = send_to_device(demonstration_batch(recipe, step, rng), accelerator.device)
        logits = trained(input_ids=rows[:, :-1]).logits.float()
        token_losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = (token_losses * is_action[:, 1:]).sum() / is_action[:, 1:].sum()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress is not None and (step + 1) % 10 == 0:
            progress(step + 1, recipe.steps, sum(losses[-10:]) / 10)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def lr_factor(step: int, steps: int) -> float:
    """Share of the learning rate: twenty steps up, then a half cosine down to a tenth."""
    return min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1.0 + math.cos(math.pi * step / steps)))


def demonstration_batch(recipe: Recipe, step: int, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """int64[B, L] tokens, padded at the right, and float32[B, L], 1 where the token belongs to an action."""
    import torch

    world, ids = recipe.world, _token_ids(recipe.world)
    rows: list[list[int]] = []
    masks: list[list[float]] = []
    for index in range(step * recipe.batch_size, (step + 1) * recipe.batch_size):
        task = world.task("demo", index)
        row = [ids[word] for word in task.question]
        mask = [0.0] * len(row)
        for seen, action in demonstrate(task, rng, recipe.habits):
            row += [ids[word] for word in (*seen, *action)]
            mask += [0.0] * len(seen) + [1.0] * len(action)
        rows.append(row)
        masks.append(mask)
    longest = max(len(row) for row in rows)
    return (
        torch.tensor([row + [ids[PAD]] * (longest - len(row)) for row in rows]),
        torch.tensor([mask + [0.0] * (longest - len(mask)) for mask in masks]),
    )


def _token_ids(world: World) -> dict[str, int]:
    """The tokenizer numbers words as the world lists them."""
    return {word: i for i, word in enumerate(world.words)}


class _Ended(BaseException):
    """SIGTERM or SIGINT."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def _tidied_before_the_end() -> Iterator[None]:
    """Lets the block clean up when SIGTERM or SIGINT comes; the process then ends by that signal."""

    def end(signum: int, frame: object) -> None:
        raise _Ended(signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _Ended as ended:
        signal.signal(ended.signum, signal.SIG_DFL)
        os.kill(os.getpid(), ended.signum)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Make a policy by hand; prints its folder.  Exit code 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m atpo_async.environments.hopqa.warm_start", description=main.__doc__
    )
    parser.add_argument("--root", type=Path, default=Path("models"), help="folder of the models")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-threads", type=int, default=None)
    defaults = Recipe()
    for field in fields(Recipe):
        value = getattr(defaults, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, dest=field.name, type=type(value), default=value, help=f"default {value}")
    given = vars(parser.parse_args(argv))
    root, device, num_threads = given.pop("root"), given.pop("device"), given.pop("num_threads")

    def tell(done: int, total: int, loss: float) -> None:
        print(f"warm start: step {done} of {total}, loss {loss:.3f}", file=sys.stderr, flush=True)

    try:
        recipe = Recipe(**given)
        path = policy_folder(root, recipe)
        with _tidied_before_the_end():
            report = make_policy(path, recipe, device=device, num_threads=num_threads, progress=tell)
    except AtpoError as exc:
        print(f"warm start: {exc}", file=sys.stderr)
        return 2
    print(report.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
