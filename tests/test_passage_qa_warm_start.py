"""Making the chat policy of passage_qa, and a short run of its demo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atpo_async.config import load
from atpo_async.core.errors import ConfigError
from atpo_async.environments.passage_qa.recipe import Recipe, policy_folder
from atpo_async.environments.passage_qa.warm_start import main, make_policy
from atpo_async.models.policy import warm_start_command
from atpo_async.run.metrics import read_metrics
from tests.e2e_support import BASE, DEADLINE_S, ROOT, Process

WORLD: dict[str, int] = {"num_towns": 1, "num_names": 8, "num_relations": 2, "min_hops": 1, "max_hops": 1}
"""So small that a guess is right once in seven, so that a policy that has learnt the form alone has a signal."""
TINY = Recipe(seed=1, steps=70, batch_size=8, width=64, layers=2, mixed_up=0, careful=0.6, **WORLD)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = policy_folder(tmp_path_factory.mktemp("models"), TINY)
    assert not make_policy(path, TINY, device="cpu").reused
    return path


@pytest.mark.slow
def test_the_policy_is_an_ordinary_chat_model_of_qwen3s_architecture(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == (
        "<|im_start|>user\nHello<|im_end|>\n"
    )
    record = json.loads((made / "warm_start.json").read_text())
    assert record["recipe"]["num_names"] == 8
    assert record["fingerprint"] == TINY.fingerprint
    assert record["loss"] < 1.0, "the form of the calls is learnt"


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_policy_and_is_not_followed_twice(made: Path, tmp_path: Path) -> None:
    assert make_policy(made, TINY).reused
    few = Recipe(seed=1, steps=3, batch_size=4, width=32, layers=1, mixed_up=0, **WORLD)
    state = torch.random.get_rng_state()
    for name in ("one", "two"):
        make_policy(tmp_path / name, few, device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()


def test_the_warm_start_is_asked_for_what_the_demo_needs() -> None:
    words = warm_start_command(load(ROOT / "configs" / "demo_agent.toml", {"environment.options.num_towns": "4"}))
    assert words[3] == "atpo_async.environments.passage_qa.warm_start"
    asked = dict(zip(words[4::2], words[5::2], strict=True))
    assert (asked["--num-towns"], asked["--steps"], asked["--seed"]) == ("4", "220", "1")


def test_recipes_that_cannot_be_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "--width", "33"]) == 2
    assert capsys.readouterr().err == "warm start: warm start: width must be a multiple of 32 (the head size), got 33\n"
    with pytest.raises(ConfigError, match="careful must be from 0 to 1"):
        Recipe(careful=1.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_of_an_agent_trains_and_names_its_report(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make demo-agent` runs, with a smaller policy and world and the quicker engine."""
    assert re.search(r"^demo-agent:.*\n\t@\$\(BIN\)/atpo demo agent", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    world: dict[str, object] = {f"environment.options.{name}": value for name, value in WORLD.items()}
    settings = {
        **BASE, **world, "environment.options.train_tasks": 64, "model.max_context_tokens": 256,
        "search.max_action_tokens": 28, "run.steps": 2, "eval.every_steps": 2, "eval.num_tasks": 8,
        "model.path": made, "model.warm_start": False,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    process = Process(["demo", "agent", *words], tmp_path / "demo.txt")
    try:
        code = process.popen.wait(timeout=2 * DEADLINE_S)
    finally:
        process.end()
    said = process.said()
    assert code == 0, said
    assert "report: runs/demo-agent-1-1/report.html" in said
    records = read_metrics(tmp_path / "runs" / "demo-agent-1-1" / "metrics.jsonl")
    seen = {name for record in records for name in record.metrics}
    assert {"reward/correct", "tool/search/calls"} <= {name.removeprefix("actor/") for name in seen}, sorted(seen)
