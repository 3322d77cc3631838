"""The trained policy as a folder: the source's precision, tensor by tensor, and its files as they lie there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from learner.policy.export import GENERATION, export_model, precision
from learner.policy.model import Policy, load_policy
from tests.learner_support import make_config, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def in_precision(model: Path, folder: Path, dtype: torch.dtype, **own: torch.dtype) -> Path:
    """A copy whose files hold ``dtype``; ``own``: tensors whose names end so, in another."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {
            name: tensor.to(next((other for end, other in own.items() if name.endswith(f"{end}.weight")), dtype))
            for name, tensor in tensors.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def exported(source: Path, target: Path, wanted: str = "source") -> tuple[Policy, dict[str, torch.Tensor]]:
    policy = load_policy(make_config(source))
    tensors = {name: tensor.detach() for name, tensor in policy.hf.state_dict().items()}
    export_model(policy, tensors, source, target, precision(source, wanted))
    return policy, load_file(target / "model.safetensors")


def said_dtype(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_source_s_precision_is_kept_and_said(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    source = in_precision(model, tmp_path / "source", dtype)
    _, found = exported(source, tmp_path / "model")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert said_dtype(tmp_path / "model") == str(dtype).removeprefix("torch.")
    # Nothing was trained: the same bytes, tied tensors once.
    expected = load_file(source / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_tensors_that_the_source_keeps_in_another_precision_stay_in_it(model: Path, tmp_path: Path) -> None:
    source = in_precision(model, tmp_path / "source", torch.bfloat16, norm=torch.float32)
    _, found = exported(source, tmp_path / "model")
    expected = load_file(source / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16, torch.float32}


def test_an_option_names_another_precision(model: Path, tmp_path: Path) -> None:
    source = in_precision(model, tmp_path / "source", torch.bfloat16)
    _, found = exported(source, tmp_path / "model", "float32")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert said_dtype(tmp_path / "model") == "float32"
    assert precision(source, "float32").why == "learner.export_dtype = 'float32'"


def test_a_policy_put_together_from_a_checkpoint_goes_back_to_what_it_began_as(model: Path, tmp_path: Path) -> None:
    """Its files hold float32, its configuration says bfloat16."""
    source = in_precision(model, tmp_path / "source", torch.bfloat16)
    shutil.copyfile(model / "model.safetensors", source / "model.safetensors")
    _, found = exported(source, tmp_path / "model")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_generation_settings_that_load_but_cannot_be_saved_are_kept_as_they_are(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    settings = json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2})
    (source / GENERATION).write_text(settings)
    policy = load_policy(make_config(source))
    with pytest.raises(ValueError, match="temperature"):
        policy.hf.save_pretrained(tmp_path / "plain")
    kept = policy.hf.generation_config
    tensors = {name: tensor.detach() for name, tensor in policy.hf.state_dict().items()}
    export_model(policy, tensors, source, tmp_path / "model", precision(source, "source"))
    assert (tmp_path / "model" / GENERATION).read_text() == settings
    assert policy.hf.generation_config is kept
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_write_that_fails_leaves_the_old_folder_and_nothing_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    policy, before = exported(model, target)

    def refuse(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learner.policy.export.shutil.copyfile", refuse)
    tensors = {name: tensor.detach() + 1 for name, tensor in policy.hf.state_dict().items()}
    with pytest.raises(OSError, match="No space"):
        export_model(policy, tensors, model, target, precision(model, "source"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    after = load_file(target / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
