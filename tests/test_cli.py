"""The command line: what a user gets, and one clear line for everything that is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from atpo_async.api import machine, notes
from atpo_async.api.evaluation import EvalResult
from atpo_async.api.policy import ensure_policy
from atpo_async.cli import main
from atpo_async.cli.train import _free_name
from atpo_async.config import Config, build, load
from atpo_async.core.errors import SetupError
from atpo_async.models.policy import assemble, warm_start_command
from atpo_async.models.sources import model_folder
from atpo_async.ops.exits import EXIT_FAILURE, EXIT_USER
from atpo_async.ops.role import parse_address
from atpo_async.ops.specs import RoleSpec
from atpo_async.run import launch, processes
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "configs" / "demo.toml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def config_file(folder: Path, text: str = "") -> str:
    path = folder / "c.toml"
    path.write_text(f'[model]\npath = "model"\n{text}', encoding="utf-8")
    return str(path)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without its prefix."""
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


TRANSFORMERS = '[actor]\nengine = "transformers"\n'


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.rglob("*")} - {"model", "config.json", "c.toml"}


# --- bad input: one line, exit code 2, nothing written ----------------------------------------------------------


def test_an_unknown_option_is_named_with_near_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", config_file(folder), "--learner.learning_rate", "1"]) == 2
    assert said(capsys).startswith("--learner.learning_rate: unknown option; did you mean --learner.")
    assert files(folder) == set()


def test_an_unknown_key_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", config_file(folder, "[learner]\nlrr = 1\n")]) == 2
    assert said(capsys).startswith("learner.lrr: unknown key (value 1)")


def test_a_contradiction_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", config_file(folder), "--correction.action", "none"]) == 2
    assert "--correction.accept_bias true" in said(capsys)
    assert files(folder) == set()


def test_a_missing_configuration_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "nowhere.toml"]) == 2
    assert said(capsys).startswith("configuration nowhere.toml does not exist")


@pytest.mark.parametrize("path", ["", "no/such/folder", "./none", "~/none"])
def test_a_missing_model_folder_is_named(folder: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    assert main.main(["train", config_file(folder), f"--model.path={path}", "--actor.engine", "transformers"]) == 2
    line = said(capsys)
    assert (path or "model.path is empty") in line
    assert "--model.warm_start true" in line
    assert files(folder) == set()


def test_a_mistyped_local_model_folder_is_no_name_on_the_hub(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "models").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert main.main(["train", config_file(folder, TRANSFORMERS), "--model.path", "models/hopqa-typo"]) == 2
    assert said(capsys).startswith("model.path = 'models/hopqa-typo': no model folder (no config.json) there")
    assert files(folder) == {"models"}


def test_a_model_that_the_hub_does_not_give_is_reported_in_one_line_and_nothing_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def refuse(name: str, *, local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        raise ValueError("404 Client Error.\n\nRepository Not Found\nIf you are trying to access a private one …")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert main.main(["train", config_file(folder, TRANSFORMERS), "--model.path", "nobody/nothing"]) == 2
    line = said(capsys)
    assert "could not be fetched: 404 Client Error.  Name a model folder" in line
    assert "Repository Not Found" not in line
    assert asked == [True, False]
    assert files(folder) == set()


def test_a_model_in_the_local_hub_cache_needs_no_network_unless_weights_are_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, fetched = folder / "cached", folder / "fetched"
    cached.mkdir()
    (cached / "config.json").write_text("{}")

    def snapshot(name: str, *, local_files_only: bool = False) -> str:
        return str(cached if local_files_only else fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert model_folder("owner/name") == fetched
    (cached / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}')
    (cached / "a.safetensors").touch()
    assert model_folder("owner/name") == fetched
    (cached / "b.safetensors").touch()
    assert model_folder("owner/name") == cached


def test_an_unknown_environment_is_named_before_anything_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("train", "buffer", "doctor"):
        assert main.main([command, config_file(folder, TRANSFORMERS), "--environment.name", "hopqaa"]) == 2
        assert said(capsys).startswith("environment.name = 'hopqaa' is unknown; did you mean hopqa?  Known: hopqa, ")
    assert main.main(["train", config_file(folder, TRANSFORMERS), "--environment.name", "mine.env:make"]) == 2
    assert said(capsys).startswith("environment.name = 'mine.env:make': there is no package 'mine' here")
    assert main.main(["train", config_file(folder, TRANSFORMERS), "--credit.value_mode", "mine:mode"]) == 2
    assert said(capsys).startswith("credit.value_mode = 'mine:mode': there is no package 'mine' here")
    assert files(folder) == set()


def test_an_environment_in_the_working_folder_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (folder / "mine.py").touch()
    machine.check_environment(build({"environment": {"name": "mine:make"}}))


def test_an_address_off_loopback_needs_keys_before_anything_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(folder, TRANSFORMERS)
    assert main.main(["train", path, "--links.host", "0.0.0.0"]) == 2
    assert said(capsys).startswith(
        "links.host = '0.0.0.0' is no loopback address and needs keys: `atpo keys new --dir DIR`"
    )
    assert main.main(["train", path, "--links.host", "*", "--links.keys_dir", "keys"]) == 2
    assert said(capsys).startswith("links.host = '*': say 0.0.0.0")
    assert main.main(["train", path, "--links.keys_dir", "keys"]) == 2
    assert said(capsys).startswith("links.keys_dir = 'keys' is no folder; `atpo keys new --dir keys` makes it")
    (folder / "keys").mkdir()
    assert main.main(["train", path, "--links.keys_dir", "keys"]) == 2
    assert said(capsys) == (
        "links.keys_dir = 'keys' has no server.key_secret; `atpo keys new --dir keys` makes what is missing"
    )
    assert files(folder) == {"keys"}


def test_keys_are_made_for_this_host_and_for_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["keys", "new"]) == 0
    assert "for this host: --links.keys_dir keys" in capsys.readouterr().out
    keys = folder / "keys"
    pairs = {"server.key", "server.key_secret", "client.key", "client.key_secret"}
    assert {p.name for p in keys.iterdir()} == pairs
    assert (keys / "server.key_secret").stat().st_mode & 0o777 == 0o600
    machine.check_links(build({"links": {"host": "0.0.0.0", "keys_dir": "keys"}}))
    (keys / "client.key_secret").chmod(0o644)
    with pytest.raises(SetupError, match=r"client\.key_secret has mode 0644; others must not read it: chmod 600"):
        machine.check_links(build({"links": {"keys_dir": "keys"}}))
    (keys / "client.key_secret").chmod(0o600)
    before = {p: p.read_bytes() for p in keys.iterdir()}

    assert main.main(["keys", "new", "host-b", "--dir", "keys"]) == 0
    out = capsys.readouterr().out
    assert "keys/host-b.key lets host-b in, as actors; it stays here" in out
    assert "keys/host-b (client.key, client.key_secret, server.key) goes to host-b" in out
    theirs = keys / "host-b"
    assert {p.name for p in theirs.iterdir()} == {"client.key", "client.key_secret", "server.key"}
    assert (theirs / "server.key").read_bytes() == (keys / "server.key").read_bytes()
    assert (keys / "host-b.key").read_bytes() == (theirs / "client.key").read_bytes()
    assert (theirs / "client.key_secret").stat().st_mode & 0o777 == 0o600
    assert {p: p.read_bytes() for p in before} == before

    assert main.main(["keys", "new", "host-c", "--learner"]) == 0
    assert "lets host-c in, as actors and as the learner" in capsys.readouterr().out
    assert (keys / "learners" / "host-c.key").read_bytes() == (keys / "host-c" / "client.key").read_bytes()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["new", "host-b"], "keys/host-b.key exists: that host has its keys"),
        (["new", "host-b", "--learner"], "keys/host-b.key exists: that host has its keys"),
        (["new", "server"], "'server' is no name for a host's keys"),
        (["new", "learners"], "'learners' is no name for a host's keys"),
        (["new", "../up"], "'../up' is no name for a host's keys"),
        (["new", "--learner"], "--learner is for another host's key: atpo keys new NAME --learner"),
        (["new", "host-d", "--dir", "file"], "keys cannot be made in file:"),
        (["list", "--dir", "none"], "none is no folder; `atpo keys new --dir none` makes it"),
    ],
)
def test_keys_that_cannot_be_made_or_listed_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    (folder / "file").touch()
    assert main.main(["keys", "new", "host-b"]) == 0
    capsys.readouterr()
    assert main.main(["keys", *words]) == 2
    assert said(capsys).startswith(error)


def test_keys_list_says_who_is_let_in_and_what_lies_where_it_should_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(["keys", "new", "host-b"])
    main.main(["keys", "new", "host-c", "--learner"])
    (folder / "keys" / "host-c" / "client.key_secret").unlink()
    capsys.readouterr()
    assert main.main(["keys", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[2] for line in lines if "  " in line] == [
        "server: the public key of this host, which others need to connect",
        "client: this host's own roles",
        "host-b: actors",
        "host-c: actors and the learner",
    ]
    assert [line for line in lines if "  " not in line] == [
        "keys/host-b/client.key_secret still lies here: it belongs on host-b, and nowhere else"
    ]


def test_a_port_in_use_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.main(["train", config_file(folder), f"--links.actors_port={port}"]) == 2
    assert said(capsys).startswith(f"links.actors_port = {port} is in use")
    assert files(folder) == set()


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if ``modules`` were not installed."""

    class Blocker:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for module in [m for m in sys.modules if m.partition(".")[0] in modules]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])


def test_vllm_asked_for_and_missing_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "vllm")
    assert main.main(["train", config_file(folder), "--actor.engine", "vllm"]) == 2
    line = said(capsys)
    assert line.startswith("actor.engine = 'vllm', but vLLM is not installed here")
    assert "--actor.engine transformers" in line
    assert files(folder) == set()


def test_without_vllm_the_other_engine_is_taken_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "vllm")
    assert machine.engine_of(Config()) == (
        "transformers",
        "actor.engine = 'auto', and vLLM is not installed: slower, the same results",
    )


@pytest.mark.parametrize("role", ["actor", "learner"])
def test_a_gpu_asked_for_and_absent_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr(machine, "no_cuda_because", lambda: "no NVIDIA driver is here")
    assert main.main(["train", config_file(folder), f"--{role}.device", "cuda", "--actor.engine", "transformers"]) == 2
    assert said(capsys).startswith(f"{role}.device = 'cuda', but no NVIDIA driver is here; set --{role}.device cpu")
    assert files(folder) == set()


def test_a_gpu_that_the_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "no_cuda_because", lambda: None)
    monkeypatch.setattr(machine, "cuda_devices", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SetupError, match=r"^actor\.gpus names GPU 2, but this machine has 2 \(0 to 1\)"):
        machine.check_machine(build({"actor": {"gpus": [2], "engine": "transformers"}}))


def test_gpus_are_counted_within_a_clusters_allotment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "no_cuda_because", lambda: None)
    monkeypatch.setattr(machine, "cuda_devices", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    config = build({"actor": {"gpus": [1], "engine": "transformers"}, "learner": {"gpus": [0]}})
    machine.check_machine(config)
    with pytest.raises(SetupError, match=r"names GPU 4, but CUDA_VISIBLE_DEVICES = '4,6' allots 2 \(0 to 1\)"):
        machine.check_machine(build({"actor": {"gpus": [4], "engine": "transformers"}}))


def test_several_actors_without_numbers_are_refused_where_one_gpu_does_not_hold_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "no_cuda_because", lambda: None)
    monkeypatch.setattr(machine, "cuda_devices", lambda: 2)
    monkeypatch.setattr(machine, "has_module", lambda name: True)
    with pytest.raises(SetupError, match=r"actor\.count = 2 without actor\.gpus .* --actor\.gpus, or lower"):
        machine.check_machine(build({"actor": {"count": 2}}))
    machine.check_machine(build({"actor": {"count": 2, "gpu_memory_utilization": 0.4}}))
    machine.check_machine(build({"actor": {"count": 2, "gpus": [0, 1]}}))
    machine.check_machine(build({"actor": {"count": 2, "device": "cpu"}}))


def test_a_learner_by_hand_is_started_as_the_supervisor_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda file, argv, env: started.append((argv, env)))
    path = config_file(folder, '[learner]\nnum_processes = 2\nnum_threads = 3\ndevice = "cpu"\n')
    run = RunDir.create(load(path))
    main.main(["learner", path, "--name", "me"])
    ((argv, env),) = started
    assert argv[1:4] == ["-P", "-m", "accelerate.commands.launch"]
    assert argv[argv.index("--num_processes") + 1] == "2"
    learner = argv[argv.index("learner") :]
    assert learner[1] == str(run.path.resolve())
    assert learner[-2:] == ["--name", "me"]
    assert (env["OMP_NUM_THREADS"], env["ACCELERATE_USE_CPU"]) == ("3", "true")


def test_every_command_lays_several_configurations_over_one_another(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []

    def train(config: Config, *, again: str, begin_from: str | None = None, on: str | None = None) -> int:
        seen.append(config)
        said_again.append(again)
        return 0

    said_again: list[str] = []
    monkeypatch.setattr("atpo_async.cli.train.train", train)
    base = config_file(folder, "[learner]\nlr = 0.1\nweight_decay = 0.5\n")
    (folder / "top.toml").write_text("[learner]\nlr = 0.2\n")
    assert main.main(["train", base, "top.toml"]) == 0
    assert main.main(["train", base, "--learner.weight_decay", "0.25", "top.toml"]) == 0
    assert main.main(["demo", base, "top.toml"]) == 0
    assert [(c.learner.lr, c.learner.weight_decay) for c in seen] == [(0.2, 0.5), (0.2, 0.25), (0.2, 0.5)]
    assert said_again[-1] == f"atpo train {base} top.toml --run.name demo-0-1"

    assert main.main(["config", base, "top.toml"]) == 0
    out = capsys.readouterr().out
    assert "\nlr = 0.2\n" in out
    assert "\nweight_decay = 0.5\n" in out
    found: list[Config] = []

    def nothing_found(config: Config) -> list[object]:
        found.append(config)
        return []

    monkeypatch.setattr("atpo_async.cli.setup.doctor.findings", nothing_found)
    main.main(["doctor", base, "top.toml"])
    main.main(["doctor"])
    assert found == [load([base, "top.toml"]), Config()]

    (folder / "bad.toml").write_text("[learner]\nlr = 0\n")
    for command in ("train", "config", "doctor", "buffer", "learner", "actor", "demo"):
        capsys.readouterr()
        assert main.main([command, base, "bad.toml"]) == 2
        assert said(capsys) == "learner.lr must be > 0, got 0 in bad.toml"


def test_a_role_by_hand_gets_what_further_files_set_as_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda file, argv, env: started.append(argv))
    base = config_file(folder, TRANSFORMERS)
    (folder / "top.toml").write_text('[actor]\ntrees_in_flight = 3\n[objective]\ndual_clip = "none"\n')
    main.main(["actor", base, "--join", "localhost:5000", "top.toml", "--actor.max_num_seqs", "9"])
    ((_, _, program, role, *argv),) = started
    assert (program, role) == (launch.HERE, "actors")
    body = "c = context.config; a = c.actor; print(a.trees_in_flight, c.objective.dual_clip, a.max_num_seqs, a.engine)"
    assert run_role(body, argv).stdout == "3 None 9 transformers\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["version", "more"], "more: `atpo version` takes no such word"),
        (["trian", "c.toml"], "trian is no command; did you mean `atpo train`?  There are train, demo, "),
        (["c.toml"], "c.toml is no command; did you mean `atpo train c.toml`?"),
        (["model"], "model is no command; did you mean `atpo status model`, or `atpo report model`?"),
        (
            ["train"],
            "the following arguments are required: CONFIG  (name a TOML file: `atpo train configs/demo.toml`; ",
        ),
        (["eval"], "the following arguments are required: RUN|MODEL  (`atpo eval --help` shows"),
        (["study", "freshness"], "a study takes an axis at least"),
        (["report", "x", "--figure"], "argument --figure: expected one argument"),
        (["train", "c.toml", "--learner.lr"], "--learner.lr needs a value"),
        (["train", "c.toml", "--learner.lr", "--run.steps", "3"], "--learner.lr needs a value"),
        (["train", "c.toml", "--run.name", "../x"], "run.name is the name of a folder in run.dir: letters, digits, "),
        (["train", "model"], "configuration model is a folder; name a TOML file"),
        (["train", "c.toml", "--join", "x"], "--join: unknown option; `atpo config CONFIG` lists every field"),
    ],
)
def test_a_slip_on_the_command_line_is_one_line_and_nothing_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    config_file(folder)
    assert main.main(words) == 2
    assert said(capsys).startswith(line)
    assert files(folder) == set()


def test_a_folder_that_may_not_be_read_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(load(config_file(folder)))

    def denied(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    for command in ("status", "report", "eval"):
        assert main.main([command, str(run.path)]) == 2
        assert said(capsys).startswith(f"run folder {run.path} cannot be read: Permission denied")
    assert main.main(["config", "c.toml"]) == 2
    assert said(capsys) == "configuration c.toml cannot be read: Permission denied"
    monkeypatch.setattr("atpo_async.config.load", denied)
    assert main.main(["config", "c.toml"]) == 2
    assert said(capsys) == "['c.toml']: this user may not read or write it"


def test_an_interruption_before_anything_runs_is_one_word(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "check_machine", interrupted)
    assert main.main(["train", config_file(folder)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert files(folder) == set()


def test_an_option_of_the_look_up_task_that_is_no_number_is_reported_before_a_policy_is_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", config_file(folder, TRANSFORMERS), "--model.warm_start", "--environment.options.hops"]
    assert main.main(words) == 2
    assert said(capsys) == "environment.options.hops must be a whole number, got True"
    assert files(folder) == set()


def test_an_option_that_is_given_twice_is_reported_and_the_last_one_holds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["config", config_file(folder), "--learner.lr", "1", "--run.seed=3", "--learner.lr=2"]) == 0
    out, err = capsys.readouterr()
    assert "\nlr = 2.0\n" in out
    assert err == "note: --learner.lr is given 2 times; the last one holds: 2\n"


def test_a_run_of_another_configuration_is_refused_and_left_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(folder, '[actor]\nengine = "transformers"\n')
    run = RunDir.create(load(path))
    (run.checkpoints / "step-000001-v000001").mkdir()
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    assert main.main(["train", path, "--search.temperature", "0.5"]) == 2
    assert "search.temperature was 1.0, is 0.5" in said(capsys)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_a_run_in_use_is_refused_and_left_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(folder, '[actor]\nengine = "transformers"\n')
    with RunDir.held(load(path)) as run:
        before = (run.path / "config.json").read_bytes()
        assert main.main(["train", path, "--run.steps", "7"]) == 2
        assert (run.path / "config.json").read_bytes() == before
    assert f"is in use by process {os.getpid()}" in said(capsys)


def test_a_missing_accelerate_configuration_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", config_file(folder), "--learner.accelerate_config", "none.yaml", "--actor.engine", "transformers"]
    assert main.main(words) == 2
    assert said(capsys).startswith("learner.accelerate_config = 'none.yaml' is no file")


def test_a_traceback_comes_only_with_debug(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "nowhere.toml", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("error: configuration nowhere.toml does not exist")


def test_a_wrong_address_to_join_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["actor", config_file(folder), "--join", "host", "--actor.engine", "transformers"]) == 2
    assert (
        said(capsys) == "--join host: neither a run folder nor an address: expected HOST:PORT with a port up to 65535"
    )
    assert main.main(["buffer", config_file(folder), "--join", "host:5000"]) == 2
    assert said(capsys) == "--join host:5000 is no run folder here; a buffer works in the run's folder"


@pytest.mark.parametrize("listens", [False, True])
def test_an_actor_says_that_nothing_listens_where_it_joins_before_a_policy_is_made(
    listens: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def makes(config: Config, console: Console) -> Config:
        heard.append(capsys.readouterr().err)
        return config

    monkeypatch.setattr("atpo_async.cli.roles.ensure_policy", makes)
    monkeypatch.setattr(os, "execve", lambda file, argv, env: None)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if listens:
            bound.listen()
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        main.main(
            ["actor", config_file(folder, TRANSFORMERS), "--join", address, "--model.path=", "--model.warm_start"]
        )
    (before,) = heard
    assert before.startswith("" if listens else f"note: nothing listens at {address} yet (Connection refused); ")
    assert bool(before) is not listens


def run_for_actors(folder: Path, endpoint: str) -> tuple[str, RunDir]:
    """A configuration file, and a run of it in which the buffer once listened at ``endpoint``."""
    config = config_file(folder, TRANSFORMERS + "[run]\nsteps = 5\n")
    run = RunDir.create(load(config))
    run.write_endpoints(Endpoints(actors=endpoint))
    return config, run


def test_an_actor_that_joins_a_finished_run_is_refused_at_once_and_leaves_nothing_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda file, argv, env: started.append(argv))
    config, run = run_for_actors(folder, "tcp://127.0.0.1:1")
    (run.checkpoints / "step-000005-v000005").mkdir()
    (run.path / "model").mkdir()
    before = files(run.path)
    where = os.path.relpath(run.path)
    assert main.main(["actor", config, "--join", where]) == 2
    assert said(capsys).startswith(f"run {where} has done its 5 steps; there is nothing to join")
    assert (started, files(run.path)) == ([], before)
    with run.locked():  # a supervisor may still evaluate, or go on for more steps
        main.main(["actor", config, "--join", where])
    assert len(started) == 1


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("by_folder", [False, True])
def test_an_actor_says_that_nothing_listens_where_it_joins_before_an_engine_is_loaded(
    by_folder: bool,
    listens: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(os, "execve", lambda file, argv, env: heard.append(capsys.readouterr().err))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if listens:
            bound.listen()
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        config, run = run_for_actors(folder, f"tcp://{address}")
        main.main(["actor", config, "--join", str(run.path) if by_folder else address])
    (before,) = heard
    said = f"note: nothing listens at {address} yet (Connection refused); this actor goes on all the same, and loads "
    assert before.startswith("" if listens else said)
    assert bool(before) is not listens


def test_addresses_are_read_with_and_without_their_scheme() -> None:
    assert parse_address("tcp://h:1") == parse_address("h:1") == "tcp://h:1"


def test_evaluating_what_is_neither_run_nor_model_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", "nothing"]) == 2
    assert said(capsys) == (
        "nothing is neither a run folder (run.json) nor a model folder (config.json); "
        "name the folder of a run: runs/<run.name>"
    )


def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, str]]:
    """What was asked to be evaluated; every evaluation succeeds."""
    asked: list[tuple[Config, str]] = []

    def fake(config: Config, model: Path, name: str) -> EvalResult:
        asked.append((config, str(model)))
        return EvalResult(success=0.5, num_tasks=config.eval.num_tasks, unknown=0, reward_mean=0.5)

    monkeypatch.setattr("atpo_async.cli.evaluate.evaluate_policy", fake)
    return asked


def test_an_evaluation_of_a_run_takes_the_options_of_the_configuration_another_model_among_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = evaluated(monkeypatch)
    run = RunDir.create(load(config_file(folder, f"{TRANSFORMERS}[eval]\nnum_tasks = 7\n")))
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text("{}")
    options = ["--model.path", "other", "--search.max_action_tokens=5", "--learner.lr", "1"]
    assert main.main(["eval", str(run.path), *options]) == 0
    [(config, model)] = asked
    assert (model, config.search.max_action_tokens, config.eval.num_tasks) == ("other", 5, 7)
    out, err = capsys.readouterr()
    assert out == "other: success 0.500 on 7 held-out tasks, greedy\n"
    assert err.splitlines() == [
        "note: --learner.lr has no effect on an evaluation",
        "evaluating other on 7 held-out tasks with transformers …",
    ]


def test_an_evaluation_is_of_one_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", "model", config_file(folder), "--model.path", "other"]) == 2
    assert said(capsys) == "model and --model.path other: an evaluation is of one model; name one of them"
    run = RunDir.create(load(config_file(folder)))
    assert main.main(["eval", str(run.path), "--model.path", "./none"]) == 2
    assert said(capsys).startswith("model.path = './none': no model folder (no config.json) there")
    assert main.main(["eval", "c.toml"]) == 2
    assert said(capsys).startswith("c.toml is a file; name a run folder or a model folder")


def test_a_run_without_metrics_has_no_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.create(load(config_file(folder)))
    assert main.main(["report", str(run.path)]) == 2
    assert "has no metrics yet" in said(capsys)


@pytest.mark.parametrize(("broken", "lines"), [(1, "1 line"), (2, "2 lines")])
def test_a_report_says_how_many_damaged_lines_of_the_metrics_it_leaves_out(
    broken: int, lines: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(load(config_file(folder)))
    with MetricsWriter(run.metrics_path, source="learner") as writer:
        writer.write(step=1, version=1, metrics={"train/loss": 1.0})
    assert main.main(["report", str(run.path)]) == 0
    assert capsys.readouterr().err == ""
    with run.metrics_path.open("a") as file:
        file.write("{broken\n" * broken)
    assert main.main(["report", str(run.path)]) == 0
    assert (
        capsys.readouterr().err == f"note: {run.metrics_path.resolve()}: {lines} left out, damaged: no metrics record\n"
    )


# --- what works -------------------------------------------------------------------------------------------------


def test_the_resolved_configuration_and_the_table_of_knobs_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["config", DEMO, "--staleness.max_lag=3"]) == 0
    out = capsys.readouterr().out
    assert "max_lag = 3  # " in out
    for words in ("staleness.max_lag", "correction.cap", "trees pending", "asynchronous"):
        assert words in out


def test_the_doctor_names_what_is_missing_and_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "no_cuda_because", lambda: "no NVIDIA driver is here")
    without(monkeypatch, "zmq")
    assert main.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"missing\s+pyzmq\s+not installed", out)
    assert "missing: pyzmq" in out


@pytest.mark.parametrize(
    ("options", "what", "says"),
    [
        (["--environment.name", "nope:x"], "environment", r"environment\.name = 'nope:x': there is no package 'nope'"),
        (
            ["--objective.surrogate", "nope:x"],
            "packages",
            r"objective\.surrogate = 'nope:x': there is no package 'nope'",
        ),
        (["--metrics.sinks", '["nope.y:x"]'], "packages", r"metrics\.sinks = 'nope\.y:x': there is no package 'nope'"),
        (["--model.path", "/nope"], "model", r"model\.path = '/nope': no model folder"),
        (["--model.path", ""], "model", r"model\.path is empty"),
        (["--model.path", "/nope", "--model.warm_start"], "model", r"model\.path = '/nope' is not there, and the warm"),
        (["--learner.accelerate_config", "no.yaml"], "launcher", r"learner\.accelerate_config = 'no\.yaml' is no file"),
        (["--links.keys_dir", "no"], "links", r"links\.keys_dir = 'no' is no folder"),
        (["--buffer.journal_dir", "model/config.json"], "journal", r"buffer\.journal_dir = 'model/config\.json'"),
    ],
)
def test_the_doctor_refuses_what_the_start_of_training_refuses(
    options: list[str], what: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(folder, TRANSFORMERS)
    assert main.main(["doctor", path, *options]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"missing\s+{what}\s+{says}", " ".join(out.split()))
    assert out.splitlines()[-1] == f"missing: {what}"
    assert main.main(["train", path, *options]) == 2
    assert re.match(says, said(capsys))
    assert files(folder) == set()


def test_the_doctor_names_the_model_and_the_environment_and_fetches_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file(folder, TRANSFORMERS)
    assert main.main(["doctor", path]) == 0
    assert re.search(r"ok\s+model\s+model\nok\s+environment\s+hopqa\n", re.sub(r" +\n", "\n", capsys.readouterr().out))
    assert main.main(["doctor", path, "--model.path", "somebody/something"]) == 0
    assert re.search(r"note\s+model\s+somebody/something, on the Hub", capsys.readouterr().out)


def test_help_and_version_load_nothing_heavy() -> None:
    code = textwrap.dedent("""
        import sys
        from atpo_async.cli.main import main
        assert main(["version"]) == 0
        heavy = {"torch", "zmq", "vllm", "transformers", "pydantic", "rich", "numpy"} & set(sys.modules)
        assert not heavy, heavy
    """)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("atpo-async ")


def test_the_demo_takes_a_new_run_each_time(folder: Path) -> None:
    assert _free_name(folder / "runs", "demo-1") == "demo-1-1"
    (folder / "runs" / "demo-1-1").mkdir(parents=True)
    assert _free_name(folder / "runs", "demo-1") == "demo-1-2"


def test_the_warm_start_is_asked_for_what_the_environment_needs() -> None:
    command = warm_start_command(load(DEMO, {"run.seed": "3", "environment.options.num_names": "16"}))
    assert command[2:4] == [launch.HERE, "atpo_async.environments.hopqa.warm_start"]
    asked = dict(zip(command[4::2], command[5::2], strict=True))
    assert asked["--seed"] == "3"
    assert (asked["--min-hops"], asked["--max-hops"], asked["--num-names"]) == ("3", "3", "16")


def test_a_warm_start_for_another_environment_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my.py").touch()
    words = ["train", config_file(folder), "--model.warm_start", "true", "--environment.name", "my.env:make"]
    assert main.main([*words, "--actor.engine", "transformers"]) == 2
    assert said(capsys).startswith(
        "model.warm_start makes a policy for hopqa or ledger_qa or passage_qa or next_text, these only, not for env"
    )


def fake_warm_start(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    monkeypatch.setattr("atpo_async.api.policy.warm_start_command", lambda config: command)


def test_the_run_takes_the_policy_that_the_warm_start_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import pathlib, sys
        print("warm start: step 1 of 1", file=sys.stderr)
        path = pathlib.Path("models/p"); path.mkdir(parents=True); (path / "config.json").write_text("{}")
        print("noise"); print(path)
    """
    fake_warm_start(monkeypatch, code)
    out = io.StringIO()
    config = ensure_policy(build({"model": {"warm_start": True}}), Console(file=out))
    assert config.model.path == "models/p"
    assert out.getvalue().splitlines()[-1] == "the policy is in models/p"
    fake_warm_start(monkeypatch, "raise SystemExit('not again')")
    assert ensure_policy(config, Console(file=out)) == config


def test_a_warm_start_that_fails_is_reported_in_its_own_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('warm start: steps must be >= 0', file=sys.stderr); sys.exit(2)"
    fake_warm_start(monkeypatch, code)
    with pytest.raises(SetupError, match=r"^the warm start failed: steps must be >= 0$"):
        ensure_policy(build({"model": {"warm_start": True}}), Console(file=io.StringIO()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_warm_start_that_was_killed_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    fake_warm_start(monkeypatch, f"import os; os.kill(os.getpid(), {int(number)})")
    assert main.main(["train", config_file(folder, TRANSFORMERS), "--model.path=", "--model.warm_start"]) == 2
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    assert said(capsys) == f"the warm start was killed by {number.name}{hint}"
    assert files(folder) == set()


def test_an_interrupted_warm_start_is_an_interruption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_warm_start(monkeypatch, f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})")
    assert main.main(["train", config_file(folder, TRANSFORMERS), "--model.path=", "--model.warm_start"]) == 130


def test_the_demo_names_a_command_that_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def train(config: Config, *, again: str) -> int:
        told.append(again)
        return 0

    monkeypatch.setattr("atpo_async.cli.train.train", train)
    path = config_file(folder)
    assert main.main(["demo", path, "--run.seed", "3"]) == 0
    assert main.main(["demo", "--run.name=x", path]) == 0
    assert told == [f"atpo train {path} --run.seed=3 --run.name demo-3-1", f"atpo train {path} --run.name x"]


def test_a_checkpoint_becomes_a_model_folder_with_the_names_that_engines_know(tmp_path: Path) -> None:
    source, checkpoint, target = (tmp_path / name for name in ("source", "step-000001-v000002", "target"))
    for path in (source, checkpoint, target):
        path.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("{}")
    for path, name, values in ((source, "model.w", (7.0, 7.0)), (checkpoint, "hf.model.w", (1.0, 2.0))):
        header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        data = struct.pack("<2f", *values)
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assemble(source, checkpoint, target)
    load_file = pytest.importorskip("safetensors.numpy").load_file
    tensors = load_file(target / "model.safetensors")
    assert {name: list(values) for name, values in tensors.items()} == {"model.w": [1.0, 2.0]}
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


SCRIPTED = """
import json, os, sys, time
from pathlib import Path
from atpo_async.run.metrics import MetricsWriter
run = Path({run!r})
with MetricsWriter(run / "metrics.jsonl", source="learner") as writer:
    for step in range(1, 6):
        writer.write(step=step, version=step, metrics={{"train/success": 0.2 * step, "train/loss": 0.1}})
"""


def scripted(monkeypatch: pytest.MonkeyPatch, learner: str) -> None:
    def specs(config: Config, rundir: Path, **_: object) -> list[RoleSpec]:
        code = learner.format(run=str(rundir))
        return [RoleSpec(name="learner", argv=(sys.executable, "-c", code), ends_run=True)]

    monkeypatch.setattr("atpo_async.api.training.role_specs", specs)


def test_a_run_goes_to_its_end_and_names_its_report(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, SCRIPTED)
    path = config_file(folder, '[actor]\nengine = "transformers"\n[run]\nsteps = 5\n')
    assert main.main(["train", path]) == 0
    out = capsys.readouterr().out
    assert "engine transformers: actor.engine = 'transformers'" in out
    assert "step 5/5" in out
    assert out.strip().splitlines()[-1] == "report: runs/run/report.html"
    assert (folder / "runs" / "run" / "report.html").is_file()
    assert "join" not in out  # no role of this script listens anywhere
    assert main.main(["train", path]) == 0
    assert "goes on" in capsys.readouterr().out


def test_a_setting_without_effect_is_reported_at_the_start_of_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, SCRIPTED)
    path = config_file(folder, f"{TRANSFORMERS}[run]\nsteps = 5\n")
    assert main.main(["train", path, "--objective.tv_limit", "0.3"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: objective.tv_limit = 0.3 has no effect with objective.surrogate = 'clip' (it has with 'tv')"
    ]


def test_a_role_that_crashes_too_often_ends_the_run_with_exit_code_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "print('out of paper'); raise SystemExit(1)")
    path = config_file(folder, '[actor]\nengine = "transformers"\n[supervisor]\nmax_restarts = 0\n')
    assert main.main(["train", path]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: learner crashed 1 times within 300 s")
    assert "  | out of paper" in err
    assert "Traceback" not in err


def test_an_error_that_only_the_user_can_mend_ends_the_run_with_exit_code_two(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "print('error: tokenizer lacks <end>'); raise SystemExit(2)")
    assert main.main(["train", config_file(folder, '[actor]\nengine = "transformers"\n')]) == 2
    assert said(capsys).startswith("learner: tokenizer lacks <end>")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_leaves_no_process_and_says_how_to_go_on(folder: Path) -> None:
    path = config_file(folder, '[actor]\nengine = "transformers"\n')
    code = textwrap.dedent(f"""
        import sys
        from atpo_async.cli import main
        from atpo_async.ops import specs as role_commands
        sleeper = role_commands.RoleSpec(
            name="learner",
            argv=(sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(1000)"), ends_run=True)
        role_commands.role_specs = lambda *a, **k: [sleeper]
        sys.exit(main.main(["train", {path!r}]))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder
    )
    log = folder / "runs" / "run" / "logs" / "learner.0.log"
    try:
        while process.poll() is None and not (log.exists() and "ready" in log.read_text()):
            with_deadline(process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"The run goes on with:  atpo train {path}" in out
    run_id = RunDir.open(folder / "runs" / "run").run_id
    assert processes.marked(f"{run_id}/learner/0") == []


@pytest.mark.parametrize("merged", [False, True])
def test_a_run_whose_reader_has_gone_goes_on_to_its_end_and_says_so(merged: bool, folder: Path) -> None:
    path = config_file(folder, f"{TRANSFORMERS}[run]\nsteps = 5\n")
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from atpo_async.cli import main
        from atpo_async.ops import specs as role_commands
        def specs(config, rundir, **_):
            text = {SCRIPTED!r}.format(run=str(rundir))
            return [role_commands.RoleSpec(name="learner", argv=(sys.executable, "-c", text), ends_run=True)]
        role_commands.role_specs = specs
        code = main.main(["train", {path!r}])
        Path("ended").write_text(str(code))
        sys.exit(code)
    """)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writer,
        stderr=writer if merged else subprocess.PIPE,
        text=True,
        cwd=folder,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (folder / "ended").read_text() == "0"
    assert done.returncode == 0
    assert (folder / "runs" / "run" / "report.html").is_file()
    if not merged:
        assert done.stderr == (
            "note: the terminal's output is closed; the run goes on, `atpo status runs/run` shows it\n"
        )


def with_deadline(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(timeout=0.05)
    except subprocess.TimeoutExpired:
        return


# --- the frame of a role's process ------------------------------------------------------------------------------

ROLE = """
import sys
from atpo_async.core import errors
from atpo_async.ops import role

async def main(context):
    {body}

role.run("actor", main, {argv!r})
"""


def run_role(body: str, argv: Sequence[str], **env: str) -> subprocess.CompletedProcess[str]:
    code = ROLE.format(body=body, argv=list(argv))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **env}, check=False
    )


def joined(folder: Path) -> list[str]:
    return ["--config", config_file(folder), "--join", "localhost:5000"]


def test_an_actor_joins_by_address_without_the_runs_folder(folder: Path) -> None:
    body = "print(context.endpoints.actors, context.rundir, repr(context.run_id), context.name != 'actor-0')"
    result = run_role(body, joined(folder))
    assert (result.returncode, result.stdout) == (0, "tcp://localhost:5000 None '' True\n")


def test_a_role_says_an_error_in_one_line_and_shows_a_traceback_only_with_debug(folder: Path) -> None:
    body = "raise errors.SetupError('no tokenizer here')"
    plain = run_role(body, joined(folder))
    assert (plain.returncode, plain.stderr) == (2, "error: no tokenizer here\n")
    assert "Traceback" in run_role(body, [*joined(folder), "--debug"]).stderr


def test_an_error_out_of_a_task_group_is_one_line_too(folder: Path) -> None:
    body = "raise ExceptionGroup('tasks', [ExceptionGroup('more', [errors.SetupError('no tokenizer here')])])"
    result = run_role(body, joined(folder))
    assert (result.returncode, result.stderr) == (2, "error: no tokenizer here\n")


def test_a_crash_shows_its_traceback_and_has_another_exit_code(folder: Path) -> None:
    result = run_role("raise RuntimeError('boom')", joined(folder))
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: RuntimeError: boom"


@pytest.mark.parametrize(("error", "code"), [("SetupError", EXIT_USER), ("PeerLost", EXIT_FAILURE)])
def test_the_supervisor_learns_whether_another_attempt_may_help(folder: Path, error: str, code: int) -> None:
    file = folder / "said"
    env = {"ATPO_SUPERVISOR_PID": str(os.getpid()), "ATPO_ERROR_FILE": str(file)}
    result = run_role(f"raise errors.{error}('tcp://x:1')", joined(folder), **env)
    assert result.returncode == code
    assert json.loads(file.read_text()) == {"code": code, "error": "tcp://x:1"}


def test_a_rank_that_loses_its_peer_does_not_hide_what_the_user_can_mend_there(folder: Path) -> None:
    file = folder / "said"
    env = {"ATPO_SUPERVISOR_PID": str(os.getpid()), "ATPO_ERROR_FILE": str(file)}
    for error in ("SetupError('no such loss')", "PeerLost('connection closed by peer')"):
        run_role(f"raise errors.{error}", joined(folder), **env)
    assert json.loads(file.read_text()) == {"code": EXIT_USER, "error": "no such loss"}


def test_a_role_in_a_run_folder_takes_its_configuration_from_there(folder: Path) -> None:
    run = RunDir.create(load(config_file(folder)))
    refused = run_role("pass", [str(run.path)])
    assert refused.returncode == 2
    assert "start the buffer first" in refused.stderr
    run.write_endpoints(Endpoints("tcp://h:1", "tcp://h:2", "tcp://h:3", "tcp://h:4"))
    body = "print(context.name, context.index, context.run_id, context.config.actor.count)"
    result = run_role(body, [str(run.path), "--index", "3", "--actor.count", "7"])
    assert result.stdout == f"actor-3 3 {run.run_id} 7\n"
    # Also where nothing was trained: a role that joins makes no other run of it.
    other = run_role(body, [str(run.path), "--search.temperature", "0.5"])
    assert other.returncode == 2
    assert "search.temperature was 1.0, is 0.5" in other.stderr


def test_a_run_that_is_resumed_names_the_files_that_it_lacks(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    assert notes.missing(run) == []  # nothing was done yet
    checkpoint = run.checkpoints / "step-000004-v000007"
    checkpoint.mkdir(parents=True)
    (line,) = notes.missing(run)
    assert line.startswith(f"{run.journal} is gone")
    run.journal.mkdir()
    assert notes.missing(run) == []
    checkpoint.rmdir()
    MetricsWriter(run.metrics_path, source="learner").write(step=4, version=7, metrics={"train/loss": 0.5})
    (line,) = notes.missing(run)
    assert f"{run.checkpoints} holds no checkpoint: the learner begins at step 0 once more" in line


def test_a_resumed_run_without_checkpoints_here_goes_on_from_those_at_the_url(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/elsewhere"
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}, "learner": {"checkpoint_url": url}}))
    MetricsWriter(run.metrics_path, source="learner").write(step=4, version=7, metrics={"train/loss": 0.5})
    (line,) = notes.missing(run)
    assert f"goes on from the newest at learner.checkpoint_url = '{url}', and where none is there" in line
