"""Which kernels the learner takes, and what it says where it takes none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atpo_async.api import machine
from atpo_async.cli.setup import doctor
from atpo_async.core.errors import SetupError
from atpo_async.run.installed import version_of
from learner.kernels import liger
from learner.kernels.install import install
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.trainer import Trainer
from tests.kernels_support import small_model
from tests.learner_support import make_config, make_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT32 = (torch.float32,)


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(liger.INTERPRETER, raising=False)


def test_on_a_cpu_auto_takes_none_and_says_so(tmp_path: Path) -> None:
    config = make_config(make_model(tmp_path))
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    assert trainer.kernels.name == "none"
    assert trainer.kernels.reason == "none: the learner is on a CPU, and the kernels are for CUDA"
    assert not trainer.policy.compiled_head


def test_none_is_none_on_cuda_too() -> None:
    installed = install(small_model("qwen3"), "none", device=CUDA, dtypes=FLOAT32)
    assert (installed.reason, installed.compiled_head) == ("none: learner.kernels = 'none'", False)


def test_liger_on_a_cpu_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = make_config(make_model(tmp_path), learner={"kernels": "liger"})
    accelerator, policy = make_accelerator(config), load_policy(config)
    said = r"learner\.kernels = 'liger', but the learner is on a CPU, .*; or use --learner\.kernels auto"
    with pytest.raises(SetupError, match=said):
        Trainer(config, accelerator=accelerator, policy=policy)


def test_without_the_library_liger_is_refused_and_auto_compiles_the_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "missing", lambda: ["liger-kernel"])
    monkeypatch.setattr("learner.kernels.install.has_triton", lambda: True)
    said = r"learner\.kernels = 'liger', but liger-kernel is not installed \(pip install 'atpo-async\[gpu\]'\)"
    with pytest.raises(SetupError, match=said):
        install(small_model("qwen3"), "liger", device=CUDA, dtypes=FLOAT32)
    installed = install(small_model("qwen3"), "auto", device=CUDA, dtypes=FLOAT32)
    assert (installed.name, installed.compiled_head) == ("none", True)
    assert installed.reason == (
        "none: liger-kernel is not installed (pip install 'atpo-async[gpu]'); the output head's numbers are compiled"
    )


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> liger.Functions:
        raise OSError("libtriton.so: undefined symbol")

    monkeypatch.setattr(liger, "missing", list)
    monkeypatch.setattr(liger, "functions", broken)
    with pytest.raises(SetupError, match=r"liger-kernel does not load \(OSError: libtriton.so: undefined symbol\)"):
        install(small_model("qwen3"), "liger", device=CUDA, dtypes=FLOAT32)


@pytest.mark.parametrize("wish", ["liger", "auto"])
def test_a_policy_in_float64_keeps_its_own_operations(wish: str) -> None:
    model = small_model("qwen3").double()
    if wish == "liger":
        with pytest.raises(SetupError, match="the policy is in float64, which the kernels do not have"):
            install(model, "liger", device=CUDA, dtypes=FLOAT32)
        return
    installed = install(model, "auto", device=CUDA, dtypes=FLOAT32)
    assert (installed.name, installed.compiled_head) == ("none", False)


def test_a_model_that_the_library_has_nothing_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "obstacle", lambda device, dtype: None)
    monkeypatch.setattr(liger, "functions", lambda: liger.Functions(None, None, None))
    with pytest.raises(
        SetupError, match=r"'liger', but liger-kernel has nothing to replace in a Sequential; use .* none"
    ):
        install(torch.nn.Sequential(torch.nn.Linear(2, 2)), "liger", device=CPU, dtypes=FLOAT32)


@pytest.mark.parametrize("version", [None, "0.8.5"])
def test_the_doctor_names_the_library_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    versions = {"liger-kernel": version}
    monkeypatch.setattr(
        "atpo_async.cli.setup.doctor.version_of", lambda name: versions[name] if name in versions else version_of(name)
    )
    monkeypatch.setattr(machine, "no_cuda_because", lambda: None)
    (found,) = [finding for finding in doctor.findings() if finding.what == "liger-kernel"]
    expected = ("note", "not installed: the learner is slower") if version is None else ("ok", version)
    assert (found.level, found.found) == expected
    monkeypatch.setattr(machine, "no_cuda_because", lambda: "no NVIDIA driver is here")
    assert not [finding for finding in doctor.findings() if finding.what == "liger-kernel"]


def test_a_run_that_asks_for_the_library_is_refused_before_it_starts_where_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(make_model(tmp_path), learner={"kernels": "liger"})
    known = machine.has_module
    for present in (False, True):
        there = {"liger_kernel": present}
        monkeypatch.setattr(machine, "has_module", lambda name, there=there: there.get(name, known(name)))
        found = [finding for finding in doctor.findings_of_run(config) if finding.what == "learner's packages"]
        if present:
            machine.check_kernels(config)
            assert not found
            continue
        with pytest.raises(SetupError, match=r"liger-kernel is not installed here: pip install 'atpo-async\[gpu\]'"):
            machine.check_machine(config)
        assert [finding.level for finding in found] == ["missing"]


def test_an_optimizer_and_an_adapter_folder_that_are_not_here_are_refused_before_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path)
    known = machine.has_module
    monkeypatch.setattr(machine, "has_module", lambda name: name != "torchao" and known(name))
    with pytest.raises(SetupError, match=r"torchao is not installed here: pip install 'atpo-async\[gpu\]'"):
        machine.check_machine(make_config(folder, learner={"optimizer": "adamw8bit"}))
    lora = {"rank": 2, "init": str(tmp_path / "nowhere")}
    with pytest.raises(SetupError, match=r"learner.lora.init = '.*nowhere' is no folder"):
        machine.check_machine(make_config(folder, learner={"lora": lora}))
