"""What `atpo launch` prints is run on this machine: a real run goes to its end, is stopped, queued again, goes on."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atpo_async.cli.main import main
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from tests.fault_support import until
from tests.placing_support import ATPO, SBCAST, SCONTROL, SRUN, Pods, environment, mounted, moved, put, small_run

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bash, find and links as on a cluster's nodes"),
    pytest.mark.slow,
]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.timeout(300)
def test_a_printed_sbatch_script_takes_a_run_to_its_end(
    hopqa_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tmp_path / "small.toml", hopqa_policy, actors=2)
    script = tmp_path / "job.sh"
    script.write_text(printed(capsys, "slurm", str(config), "--nodes", "2", "--run-dir", str(tmp_path / "runs")))
    fake = put(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, sbcast=SBCAST, atpo=ATPO)
    env = environment(
        fake, FAKE_SLURM=str(tmp_path), FAKE_NODES="127.0.0.1 localhost", SLURM_JOB_ID="77",
        SLURM_JOB_NODELIST="n[1-2]", ATPO_WORK=str(tmp_path / "work"),
    )  # fmt: skip
    done = subprocess.run(["bash", str(script)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    logs = tmp_path / "atpo-77"
    story = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(logs.glob("*.log")))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{story}"
    run = RunDir.open(tmp_path / "runs" / "small")
    trained = [r.step for r in read_metrics(run.metrics_path) if r.source == "learner" and "train/loss" in r.metrics]
    assert len(trained) == 2, story
    assert (run.path / "model" / "config.json").is_file()
    placed = (tmp_path / "placed").read_text()
    role = f"bash {tmp_path / 'work' / 'atpo-77' / 'role.sh'}"
    assert f"127.0.0.1 {role}  atpo train" in placed
    assert f"localhost {role}  atpo actor" in placed
    assert not list((tmp_path / "work").iterdir())
    assert (logs / "buffer.ended").read_text() == "0\n"


def passes(probe: list[str]) -> bool:
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


@pytest.mark.timeout(300)
def test_the_containers_of_printed_manifests_take_a_run_to_its_end(
    hopqa_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tmp_path / "small.toml", hopqa_policy)
    documents = list(yaml.safe_load_all(printed(capsys, "kubernetes", str(config), "--image", "registry/atpo:1")))
    fake = put(tmp_path / "bin", atpo=ATPO)
    pods = Pods(tmp_path, environment(fake, ATPO_STAY=""))
    probes = {}
    try:
        for kind, role in (("StatefulSet", "buffer"), ("Job", "learner"), ("Deployment", "actor")):
            document = next(each for each in documents if each["kind"] == kind)
            root = tmp_path / role
            root.mkdir()
            container = document["spec"]["template"]["spec"]["containers"][0]
            command = [
                # The name that the cluster's DNS has for the buffer's pod.
                word.replace("small-buffer-0.small-buffer", "localhost")
                for word in mounted(document, documents, root)
            ]
            env = {each["name"]: moved(each["value"], root) for each in container["env"] if "value" in each}
            pods.start(role, command, env | {"POD_NAME": f"small-{role}-x7"})
            probes[role] = [moved(word, root) for word in container["livenessProbe"]["exec"]["command"]]
        for role, probe in probes.items():
            until(functools.partial(passes, probe), f"{role} alive", story=pods.story)
        for role, process in pods.running.items():
            until(functools.partial(ended, process), f"the end of {role}", story=pods.story)
        assert {role: process.returncode for role, process in pods.running.items()} == dict.fromkeys(probes, 0)
    finally:
        pods.close()
    run = RunDir.open(tmp_path / "buffer" / "var/lib/atpo/runs" / "small")
    trained = [r.step for r in read_metrics(run.metrics_path) if r.source == "learner" and "train/loss" in r.metrics]
    assert len(trained) == 2, pods.story()
    assert (run.path / "model" / "config.json").is_file()
    # An actor is known by its key and its pod.
    assert any(r.source == "client/small-actor-x7" for r in read_metrics(run.metrics_path))


def test_a_learners_pod_says_that_only_the_user_can_mend_it_whatever_the_launcher_of_its_ranks_ends_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.toml"
    config.write_text('[run]\nname = "small"\n')
    documents = list(yaml.safe_load_all(printed(capsys, "kubernetes", str(config), "--image", "registry/atpo:1")))
    command = mounted(next(each for each in documents if each["kind"] == "Job"), documents, tmp_path)
    ends = '#!/bin/sh\n[ -z "$SAID" ] || echo "$SAID" >"$ATPO_ERROR_FILE"\nexit 1\n'
    fake = put(tmp_path / "bin", atpo=ends)
    codes = [
        subprocess.run(command, env=environment(fake, SAID=said), check=False).returncode
        for said in ('{"code": 2, "error": "x"}', '{"code": 3, "error": "x"}', "")
    ]
    assert codes == [2, 1, 1]


def test_a_learners_pod_passes_the_wish_to_end_on_to_its_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.toml"
    config.write_text('[run]\nname = "small"\n')
    documents = list(yaml.safe_load_all(printed(capsys, "kubernetes", str(config), "--image", "registry/atpo:1")))
    command = mounted(next(each for each in documents if each["kind"] == "Job"), documents, tmp_path)
    fake = put(tmp_path / "bin", atpo=ROLES)
    (tmp_path / "behaviour").write_text(RANKS)
    with subprocess.Popen(command, env=environment(fake, FAKE_SLURM=str(tmp_path)), start_new_session=True) as pod:
        until(lambda: len(started(tmp_path)) == 2, "the launcher and a rank")
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(timeout=60) == 1
    assert (tmp_path / "asked").read_text() == "rank\n"


# --- ends that a script has to handle, with roles of a line each ----------------------------------------------------

ROLES = r"""#!/usr/bin/env bash
role=$1
case $role in
  keys) mkdir -p "$4"; for name in server client; do touch "$4/$name.key" "$4/$name.key_secret"; done; exit 0 ;;
  actor) role=${*: -3:1}; for word in "$@"; do [[ $word == actor-* ]] && role=$word; done ;;
esac
echo "$role $$" >>"$FAKE_SLURM/started"
trap 'echo "$role" >>"$FAKE_SLURM/asked"; exit 143' TERM
source "$FAKE_SLURM/behaviour"
while :; do sleep 0.05; done
"""


def scripted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], behaviour: str, *words: str, device: str = "cpu"
) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """A printed script over roles that do what ``behaviour``, lines of shell, says."""
    config = tmp_path / "small.toml"
    config.write_text(
        f'[run]\nname = "small"\n[actor]\ncount = 1\ndevice = "{device}"\n[learner]\ndevice = "{device}"\n'
    )
    script = tmp_path / "job.sh"
    script.write_text(printed(capsys, "slurm", str(config), *words))
    fake = put(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, sbcast=SBCAST, atpo=ROLES)
    (tmp_path / "behaviour").write_text(behaviour)
    env = environment(
        fake, FAKE_SLURM=str(tmp_path), FAKE_NODES="n1", SLURM_JOB_ID="5", SLURM_JOB_NODELIST="n1",
        ATPO_WORK=str(tmp_path / "work"), ATPO_MOST_SHORT="2", FAKE_GPUS="4,6",
    )  # fmt: skip
    process = subprocess.Popen(
        ["bash", str(script)], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    return process, env


def started(tmp_path: Path) -> list[str]:
    file = tmp_path / "started"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def test_before_the_time_limit_all_are_asked_to_end_the_buffer_last_and_the_job_is_queued_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, _ = scripted(tmp_path, capsys, "")
    until(lambda: len(started(tmp_path)) == 3, "three roles")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped before the run's end; the same script goes on with it" in said
    asked = (tmp_path / "asked").read_text().split()
    assert (sorted(asked), asked[-1]) == (["actor-0", "learner", "train"], "train")
    assert (tmp_path / "requeued").read_text() == "5\n"
    assert not (tmp_path / "work" / "atpo-5").exists()


RANKS = r"""
[[ $role == learner ]] && {
  LOCAL_RANK=0 bash -c 'trap "echo rank >>\"$FAKE_SLURM/asked\"; exit 143" TERM
    echo rank 0 >>"$FAKE_SLURM/started"; while :; do sleep 0.05; done' &
  wait $!
  exit 1
}
"""


def test_of_a_learner_with_ranks_those_are_asked_to_end_as_their_launcher_cuts_the_save_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, _ = scripted(tmp_path, capsys, RANKS)
    until(lambda: len(started(tmp_path)) == 4, "three roles, and a rank of one")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert sorted((tmp_path / "asked").read_text().split()) == ["actor-0", "rank", "train"]


def test_a_role_that_crashes_is_started_again_and_one_that_only_the_user_can_mend_ends_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crash_once = '[[ $role == actor-0 && $(grep -c actor-0 "$FAKE_SLURM/started") == 1 ]] && exit 1\n'
    mend = '[[ $role == actor-0 ]] && { echo "error: model.path is no folder"; exit 2; }\n'
    process, _ = scripted(tmp_path, capsys, crash_once + mend)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2, said
    assert "actor-0 ended with 1; it is started again in 1 s" in said
    assert "error: actor-0 ended with 2" in said
    assert "error: model.path is no folder" in said
    assert started(tmp_path).count("actor-0") == 2
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        # As a learner of several ranks: its launcher has a code of its own.
        ('echo \'{"code": 2, "error": "no such model"}\' >"$ATPO_ERROR_FILE"; exit 1', 2),
        ("exit 127", 127),
    ],
)
def test_a_role_that_no_further_start_would_help_ends_the_job_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: str, code: int
) -> None:
    process, _ = scripted(tmp_path, capsys, f"[[ $role == learner ]] && {{ {ends}; }}\n")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert started(tmp_path).count("learner") == 1


def test_a_learner_that_crashes_at_each_start_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, _ = scripted(tmp_path, capsys, "[[ $role == learner ]] && exit 1\n")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "learner has ended 2 times within minutes of its start; it is given up" in said
    assert started(tmp_path).count("learner") == 2
    assert (tmp_path / "asked").read_text().split()[-1] == "train", "the others were asked to end"


def test_a_role_sees_those_of_the_gpus_that_slurm_gave_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = tmp_path / "gpus"
    seen = 'echo "$role [$CUDA_VISIBLE_DEVICES]" >>"$FAKE_SLURM/gpus"\n'
    process, _ = scripted(tmp_path, capsys, seen, "--gpus-per-node", "2", device="cuda")
    until(lambda: gpus.exists() and gpus.read_text().count("\n") == 3, "three roles")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert set(gpus.read_text().splitlines()) == {"train []", "learner [4]", "actor-0 [6]"}


def test_the_job_ends_with_the_buffer_and_those_that_do_not_notice_are_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, _ = scripted(
        tmp_path, capsys, 'until [[ -e $FAKE_SLURM/go ]]; do sleep 0.02; done; exit 0\n', "--no-requeue"
    )  # fmt: skip
    until(lambda: len(started(tmp_path)) == 3, "three roles")
    (tmp_path / "go").touch()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said


def test_fewer_nodes_than_the_script_was_printed_for_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, _ = scripted(tmp_path, capsys, "", "--nodes", "2")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the allocation has 1 nodes, this script was printed for 2" in said
