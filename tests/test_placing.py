"""Which role goes to which node, and scripts and manifests that Slurm, bash and Kubernetes take whatever is in them."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from atpo_async import config as configuration
from atpo_async.cli.main import main
from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.links.keys import load_pair
from atpo_async.ops.placing.placement import learner_nodes, place
from atpo_async.ops.specs import Machines, learner_spec, role_shares, role_specs

SCHEMAS = ("1.29", "1.33")


def configured(*, ranks: int = 1, actors: int = 1, each: int = 1, device: str = "auto") -> Config:
    return configuration.build(
        {
            "learner": {"num_processes": ranks, "device": device},
            "actor": {"count": actors, "tensor_parallel_size": each, "device": device},
        }
    )


def at(config: Config, *, nodes: int, gpus: int) -> list[tuple[str, int, tuple[int, ...]]]:
    found = place(config, nodes=nodes, gpus=gpus)
    return [(each.role, each.node, each.gpus) for each in (*found.learner, *found.actors)]


def test_the_learner_comes_first_then_actors_on_other_nodes_and_where_gpus_are_left() -> None:
    assert at(configured(ranks=2, actors=3, each=2), nodes=2, gpus=4) == [
        ("learner", 0, (0, 1)), ("actor-0", 1, (0, 1)), ("actor-1", 1, (2, 3)), ("actor-2", 0, (2, 3)),
    ]  # fmt: skip
    assert at(configured(ranks=8, actors=1), nodes=3, gpus=4) == [
        ("learner", 0, (0, 1, 2, 3)), ("learner", 1, (0, 1, 2, 3)), ("actor-0", 2, (0,)),
    ]  # fmt: skip


def test_nodes_that_get_no_role_are_named_when_the_script_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[actor]\ncount = 1\n")
    assert main(["launch", "slurm", str(file), "--nodes", "4"]) == 0
    printed = capsys.readouterr()
    assert "1 actor(s), 2 node(s) without a role." in printed.out
    assert "2 of 4 nodes get no role, and are held for the job all the same: raise actor.count (it is 1)" in printed.err
    assert main(["launch", "slurm", str(file), "--nodes", "2"]) == 0
    assert "no role" not in capsys.readouterr().err


def test_without_gpus_actors_are_spread_over_the_nodes_that_the_learner_leaves() -> None:
    config = configured(actors=3, device="cpu")
    assert at(config, nodes=3, gpus=0) == [
        ("learner", 0, ()), ("actor-0", 1, ()), ("actor-1", 2, ()), ("actor-2", 1, ()),
    ]  # fmt: skip
    assert {node for _, node, _ in at(config, nodes=1, gpus=0)} == {0}


@pytest.mark.parametrize(
    ("config", "nodes", "gpus", "fact"),
    [
        (configured(ranks=16), 2, 4, r"16 ranks take a GPU each, and 2 nodes with 4 GPUs have 8: raise --nodes to 4"),
        (configured(ranks=7), 2, 4, r"7 cannot be divided evenly over up to 2 nodes with 4 GPUs each"),
        (
            configured(actors=4, each=2),
            2,
            4,
            r"do not fit: beside the learner 7 GPUs are left .* hold 3 of them",
        ),
        (configured(each=8), 2, 4, r"tensor_parallel_size = 8 GPUs of one actor are on one node, and a node has 4"),
        (configured(device="cuda"), 2, 0, r"learner.device = 'cuda', and the nodes have no GPUs: set --gpus-per-node"),
    ],
)
def test_roles_that_do_not_fit_are_refused_with_the_numbers(config: Config, nodes: int, gpus: int, fact: str) -> None:
    with pytest.raises(SetupError, match=fact):
        place(config, nodes=nodes, gpus=gpus)


def test_the_supervisor_and_the_clusters_start_the_same_roles() -> None:
    config = configured(ranks=2, actors=3)
    specs = role_specs(config, Path("run"), has_cuda=lambda: False, environ={})
    assert [spec.name for spec in specs] == [share.name for share in role_shares(config)]
    assert learner_nodes(12, gpus=8, nodes=12) == 2


def test_ranks_on_several_machines_meet_at_the_first() -> None:
    config = configured(ranks=4)
    machines = Machines(count=2, index=1, meet_at="n1:7003")
    argv = learner_spec(config, ["--config", "c"], has_cuda=lambda: True, environ={}, machines=machines).argv
    words = " ".join(argv)
    for option in ("--num_machines 2", "--machine_rank 1", "--main_process_ip n1", "--main_process_port 7003"):
        assert option in words


# --- what is printed ------------------------------------------------------------------------------------------------

HOSTILE = 'it\'s $(touch pwned) `touch pwned` "x" \\ #: {a} - END_OF_FILE é'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration with text that a shell and YAML could take for something else."""
    path = tmp_path / "my run.toml"
    lines = ['[run]\nname = "small"\ndir = ', '\n[environment]\nname = "hopqa"\noptions = { note = ', " }\n"]
    quoted = json.dumps(HOSTILE)
    path.write_text(quoted.join(lines[:2]) + quoted + lines[2] + "[actor]\ncount = 2\n[learner]\nnum_processes = 2\n")
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(["launch", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words]) == 2
    return capsys.readouterr().err


def test_a_script_is_sound_bash_and_carries_the_configuration_unchanged(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--nodes", "2", "--gpus-per-node", "2", "--partition", "gpu", "--time", "1-00:00:00"]
    text = printed(capsys, "slurm", str(file), *options, "--sbatch=--qos=high", "--setup", "module load cuda")
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=small\n")
    for line in ("--nodes=2", "--gpus-per-node=2", "--partition=gpu", "--time=1-00:00:00", "--qos=high", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "\nset -euo pipefail\n" in text
    # The part that writes the files, alone: nothing of the configuration is taken for a command.
    body = text[text.index("write_files()") : text.index("\noptions=()")]
    (tmp_path / "out").mkdir()
    subprocess.run(["bash", "-euc", f"{body}\nwrite_files out"], cwd=tmp_path, check=True)
    assert not list(tmp_path.rglob("pwned"))
    found = configuration.load(tmp_path / "out" / "run.json", {})
    assert str(found.run.dir) == HOSTILE
    assert found.environment.options["note"] == HOSTILE
    assert (found.links.host, found.links.actors_port, found.links.learner_port) == ("0.0.0.0", 7000, 7001)
    assert found.actor.count == 2


@pytest.mark.parametrize("version", SCHEMAS)
def test_manifests_fit_the_schemas_of_kubernetes_and_carry_the_configuration_unchanged(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    words = ["--image", "registry.example/atpo:1.0", "--namespace", "train", "--cpus", "8", "--storage-class", "fast"]
    documents = list(yaml.safe_load_all(printed(capsys, "kubernetes", str(file), *words)))
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
        assert document["metadata"]["namespace"] == "train"
    kinds = [document["kind"] for document in documents]
    assert kinds == [
        "ConfigMap", "Secret", "Secret", "Service", "StatefulSet", "PodDisruptionBudget",
        "PersistentVolumeClaim", "Job", "Deployment",
    ]  # fmt: skip
    by_kind: dict[str, Any] = {document["kind"]: document for document in documents}
    (tmp_path / "run.json").write_text(by_kind["ConfigMap"]["data"]["run.json"])
    assert configuration.load(tmp_path / "run.json", {}).environment.options["note"] == HOSTILE
    learner, actors = (by_kind[kind]["spec"]["template"]["spec"]["containers"][0] for kind in ("Job", "Deployment"))
    assert learner["resources"] == {"requests": {"cpu": "8"}, "limits": {"nvidia.com/gpu": 2}}
    assert actors["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert by_kind["Deployment"]["spec"]["replicas"] == 2
    for kind in ("StatefulSet", "Job", "Deployment"):
        # Else an image whose user is not root reads no key and writes to no volume.
        assert by_kind[kind]["spec"]["template"]["spec"]["securityContext"]["fsGroup"]
    for container in (learner, actors, by_kind["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]):
        subprocess.run(["sh", "-n", "-c", container["command"][2]], check=True)


def test_a_learner_of_more_ranks_than_a_node_has_gpus_gets_a_pod_for_each_node(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = ["--learner.checkpoint_url", "s3://bucket/runs"]
    words = ["--image", "i", "--gpus-per-node", "4", "--learner.num_processes", "8", *url]
    documents = list(yaml.safe_load_all(printed(capsys, "kubernetes", str(file), *words)))
    job = next(document for document in documents if document["kind"] == "Job")
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    assert spec["backoffLimit"] == 40, "one crash ends the pods of all ranks"
    command = spec["template"]["spec"]["containers"][0]["command"][2]
    assert '--machine "$JOB_COMPLETION_INDEX/2@small-learner-0.small-learner:7003"' in command
    assert "small-learner" in [d["metadata"]["name"] for d in documents if d["kind"] == "Service"]


def test_the_learners_checkpoints_outlast_its_pod_and_the_job(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the URL; without one on a volume of the learner's own, and beside the run's folder."""
    slurm = ["slurm", str(file), "--run-dir", "/shared/my runs", "--gpus-per-node", "4"]
    kubernetes, url = ["kubernetes", str(file), "--image", "i"], ["--learner.checkpoint_url", "s3://bucket/runs"]
    assert "--dir '/shared/my runs/small.learner'" in printed(capsys, *slurm)
    assert '--dir "$work/learner"' in printed(capsys, *slurm, *url)
    jobs = []
    for words in (kubernetes, [*kubernetes, *url]):
        documents = list(yaml.safe_load_all(printed(capsys, *words)))
        pod = next(each for each in documents if each["kind"] == "Job")["spec"]["template"]["spec"]
        claims = [each["metadata"]["name"] for each in documents if each["kind"] == "PersistentVolumeClaim"]
        mounted = [
            each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each
        ]
        jobs.append((claims, mounted, "--dir /var/lib/atpo/learner" in pod["containers"][0]["command"][2]))
    assert jobs == [(["small-learner"], ["small-learner"], True), ([], [], False)]


def test_the_keys_of_a_secret_are_the_runs_own_or_fresh_ones_and_actors_get_no_servers_secret(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    assert main(["keys", "new", "--dir", str(keys)]) == 0
    assert main(["keys", "new", "big", "--learner", "--dir", str(keys)]) == 0
    capsys.readouterr()
    words = ["kubernetes", str(file), "--image", "i"]
    own = list(yaml.safe_load_all(printed(capsys, *words, "--links.keys_dir", str(keys))))
    fresh = list(yaml.safe_load_all(printed(capsys, *words)))
    serving, joining = ({**d["data"]} for d in own if d["kind"] == "Secret")
    assert base64.b64decode(serving["server.key_secret"]) == (keys / "server.key_secret").read_bytes()
    assert "learners__big.key" in serving
    assert not [name for name in serving if "big.key_secret" in name]
    assert set(joining) == {"client.key", "client.key_secret", "server.key"}
    other = next(d["data"] for d in fresh if d["kind"] == "Secret")
    assert other["server.key_secret"] != serving["server.key_secret"]
    (keys / "server.key").unlink()
    assert "has no server.key; `atpo keys new" in refused(capsys, *words, "--links.keys_dir", str(keys))


def test_a_mounted_secret_passes_for_private_and_its_copy_too(tmp_path: Path) -> None:
    assert main(["keys", "new", "--dir", str(tmp_path / "keys")]) == 0
    for file in (tmp_path / "keys").iterdir():
        file.chmod(0o400)
    (tmp_path / "mount").symlink_to("keys")
    load_pair(tmp_path / "mount", "client")
    (tmp_path / "keys" / "client.key_secret").chmod(0o440)
    with pytest.raises(SetupError, match="has mode 0440; others must not read it"):
        load_pair(tmp_path / "mount", "client")


def test_what_is_written_to_a_file_is_for_its_user_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run.yaml"
    output.write_text("old")
    output.chmod(0o644)
    assert main(["launch", "kubernetes", str(file), "--image", "i", "--output", str(output)]) == 0
    assert "`kubectl apply -f" in capsys.readouterr().err
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert "kind: StatefulSet" in output.read_text()


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["slurm", "--nodes", "0"], "--nodes 0"),
        (["slurm", "--job-name", "a b; rm"], "--job-name 'a b; rm': letters, digits"),
        (["slurm", "--time", "soon"], "--time 'soon' is no limit of Slurm's"),
        (["slurm", "--sbatch=qos"], "--sbatch 'qos' is no directive"),
        (["slurm", "--setup", "a\nb"], "--setup takes one line"),
        (["slurm", "--gpu-per-node", "2"], "did you mean --gpus-per-node?"),
        (["slurm", "--learner.lrr", "2"], "did you mean"),
        (["slurm", "--nodes", "1", "--gpus-per-node", "1"], "2 ranks take a GPU each, and 1 nodes with 1 GPUs have 1"),
        (
            ["slurm", "--learner.accelerate_config", "none.yaml"],
            "accelerate_config = 'none.yaml' cannot be read",
        ),
        (["slurm", "--nodes", "2", "--gpus-per-node", "1", "--actor.device", "cpu"], "2 ranks are on 2 nodes, which"),
        (
            ["kubernetes", "--image", "i", "--gpus-per-node", "1"],
            "set learner.checkpoint_url, where each of them finds",
        ),
        (["kubernetes"], "--image"),
        (["kubernetes", "--image", "a b"], "--image 'a b' is no reference"),
        (["kubernetes", "--image", "i", "--run.name", "My_Run"], "run.name = 'My_Run' is no name in Kubernetes"),
        (["kubernetes", "--image", "i", "--run.name", "My_Run"], "give --name my-run"),
        (["kubernetes", "--image", "i", "--name", "x" * 41], "up to 40 lower-case letters"),
        (["kubernetes", "--image", "i", "--namespace", "A"], "--namespace 'A' is none"),
        (["kubernetes", "--image", "i", "--volume", "big"], "--volume 'big' is no quantity"),
        (["kubernetes", "--image", "i", "--gpu-resource", "gpu"], "--gpu-resource 'gpu' is none"),
        (["kubernetes", "--image", "i", "--links.keys_dir", "absent"], "links.keys_dir = 'absent' is no folder"),
        (["helm"], "helm"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_before(
    file: Path, capsys: pytest.CaptureFixture[str], words: list[str], fact: str
) -> None:
    said = refused(capsys, words[0], str(file), *words[1:])
    assert fact in said
    assert said.count("\n") == 1
