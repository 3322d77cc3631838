"""What a run takes of a Ray cluster, and what is said where that is not there; without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atpo_async import config as configuration
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.ops.launchers.ray import plan, roles
from atpo_async.ops.launchers.ray.plan import GIB, HEAD, PIN, Need, Node

HERE = "node:10.0.0.1"


def config_of(**sections: Any) -> Config:
    return configuration.build(sections)


def node(name: str, address: str = "10.0.0.1", labels: dict[str, str] | None = None, **total: float) -> Node:
    amounts = {"CPU": 8.0, f"node:{address}": 1.0, "object_store_memory": 1e9, **total}
    return Node(node_id=name, address=address, hostname=name, total=amounts, labels=labels or {})


def test_each_actor_takes_a_bundle_and_the_ranks_of_the_learner_one_a_node() -> None:
    config = config_of(
        learner={"num_processes": 4},
        actor={"count": 2, "tensor_parallel_size": 2},
        ray={
            "max_actors": 6,
            "learner": {"nodes": 2, "num_cpus": 8, "memory_gb": 2},
            "actor": {"resources": {"fast": 1}, "labels": {"zone": "a"}},
        },
    )
    found = plan.plan(config, [node("gpu", GPU=8.0)], here=HERE)
    assert found.learner == (Need(amounts={"CPU": 8.0, "GPU": 2.0, "memory": 2.0 * GIB}),) * 2
    assert found.actor == Need(amounts={"CPU": 1.0, "GPU": 2.0, "fast": 1.0}, labels={"zone": "a"})
    assert found.actors == 6
    assert found.buffer == Need(amounts={"CPU": 1.0})
    assert found.pin == Need(amounts={HERE: PIN})


def test_a_cluster_without_gpus_and_a_role_on_the_cpu_are_asked_for_none() -> None:
    config = config_of(learner={"device": "cpu"}, ray={"actor": {"num_gpus": 0.5}})
    on_cpus = plan.plan(config_of(), [node("a")], here=HERE)
    assert "GPU" not in on_cpus.actor.amounts
    assert "GPU" not in on_cpus.learner[0].amounts
    on_gpus = plan.plan(config, [node("a", GPU=1.0)], here=HERE)
    assert "GPU" not in on_gpus.learner[0].amounts
    assert on_gpus.actor.amounts["GPU"] == 0.5


@pytest.mark.parametrize(
    ("buffer", "pin"),
    [
        ({}, Need(amounts={HERE: PIN})),
        ({"node": "10.0.0.9"}, Need(amounts={"node:10.0.0.9": PIN})),
        ({"resources": {"journal": 1}}, Need(amounts={"journal": PIN})),
        ({"labels": {"disk": "nvme"}}, Need(amounts={}, labels={"disk": "nvme"})),
    ],
)
def test_the_buffers_node_is_named_by_what_it_keeps_when_it_comes_back(buffer: dict[str, Any], pin: Need) -> None:
    assert plan.plan(config_of(ray={"buffer": buffer}), [], here=HERE).pin == pin


def test_what_no_node_can_ever_hold_is_refused_with_the_numbers() -> None:
    nodes = [node("small", CPU=4.0), node("big", "10.0.0.2", CPU=64.0, GPU=4.0, memory=512.0 * GIB)]
    config = config_of(ray={"actor": {"num_gpus": 8}})
    with pytest.raises(SetupError) as refused:
        plan.check(plan.plan(config, nodes, here=HERE), nodes, wait=False)
    assert str(refused.value) == (
        "an actor needs 1 CPU, 8 GPU on one node, and none can ever have that: big (10.0.0.2) has 64 CPU, 4 GPU, 512 "
        "GiB of memory; small (10.0.0.1) has 4 CPU; see ray.actor, or say --ray.wait_for_nodes true where such a node "
        "is to come"
    )
    plan.check(plan.plan(config, nodes, here=HERE), nodes, wait=True)


@pytest.mark.parametrize(
    ("ray", "words"),
    [
        ({"learner": {"num_cpus": 9}}, "the learner needs 9 CPU on one node"),
        ({"buffer": {"num_cpus": 9}}, "the buffer needs 9 CPU on one node"),
        ({"buffer": {"node": "10.0.0.7"}}, "no node of the cluster is the one for the buffer.*node 10.0.0.7"),
        ({"actor": {"labels": {"zone": "b"}}}, "an actor needs 1 CPU, label zone = b on one node"),
        ({"actor": {"resources": {"tpu": 1}}}, "an actor needs 1 CPU, 1 tpu on one node"),
    ],
)
def test_each_role_is_checked_against_the_nodes(ray: dict[str, Any], words: str) -> None:
    nodes = [node("a", labels={"zone": "a"})]
    with pytest.raises(SetupError, match=words):
        plan.check(plan.plan(config_of(ray=ray), nodes, here=HERE), nodes, wait=False)


def test_the_buffers_node_has_to_be_there_even_where_others_may_come() -> None:
    with pytest.raises(SetupError, match="it has no node"):
        plan.check(plan.plan(config_of(), [], here=HERE), [], wait=True)


def test_the_head_and_a_share_of_a_resource_are_said_in_words() -> None:
    assert str(Need(amounts={HEAD: PIN})) == "the head's node"
    assert str(Need(amounts={"journal": PIN})) == "journal"
    assert str(Need(amounts={})) == "nothing"


def test_a_node_with_another_python_package_or_protocol_is_named() -> None:
    ours = ("3.11", "0.1.0", 7)
    assert plan.mismatch("actor-0", "n (10.0.0.2)", theirs=ours, ours=ours) is None
    said = plan.mismatch("actor-0", "n (10.0.0.2)", theirs=("3.12", "0.1.0", 7), ours=ours)
    assert said is not None
    assert said.startswith("actor-0 cannot run on node n (10.0.0.2): Python is 3.12 there and 3.11 on the supervisor's")
    said = plan.mismatch("learner", "n", theirs=("3.11", "0.1.0", 6), ours=ours)
    assert said is not None
    assert "atpo-async's protocol is 6 there and 7" in said


def test_learner_and_actors_join_by_address_and_the_buffer_has_the_folder() -> None:
    specs = {s.name: s for s in roles.cluster_specs(config_of(), Path("/runs/r"), actors=2, gpus=False)}
    assert list(specs) == ["buffer", "learner", "actor-0", "actor-1"]
    assert specs["buffer"].argv == (
        *("{python}", "-P", "{launch}", "buffer", "/runs/r", "--links.host={host}", "--links.keys_dir={keys}"),
    )
    assert specs["buffer"].stops_last
    for name, module, more in (("learner", "learner", ()), ("actor-1", "actors", ("--index", "1"))):
        argv = specs[name].argv
        assert argv[:4] == ("{python}", "-P", "{launch}", module)
        assert argv[4 : 4 + len(more)] == more
        assert argv[4 + len(more) :][:4] == ("--config", "{config}", "--join", "{join}")
        assert ("--name" in argv) is (name != "learner")  # that one has its name
        assert "/runs/r" not in argv
    assert specs["learner"].ends_run


def test_ranks_on_several_nodes_meet_at_the_first_one() -> None:
    config = config_of(learner={"num_processes": 4}, ray={"learner": {"nodes": 2}})
    learner = roles.cluster_specs(config, Path("/runs/r"), actors=0, gpus=True)[1]
    words = " ".join(learner.argv)
    assert "--num_processes 4" in words
    assert "--machine_rank {rank} --main_process_ip {head} --num_machines 2" in words
    assert "--main_process_port {port}" in words
    assert not [name for name in learner.env if name.startswith("PET_")]  # those are of ranks on one machine


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"learner": {"gpus": [0, 1], "num_processes": 2}}, r"learner\.gpus = \[0, 1\] .*--ray\.learner\.num_gpus"),
        ({"actor": {"gpus": [0]}}, r"actor\.gpus = \[0\] .*--ray\.actor\.num_gpus"),
        (
            {"learner": {"num_processes": 2}, "ray": {"learner": {"nodes": 2}}},
            r"2 needs learner\.checkpoint_url",
        ),
        ({"supervisor": {"launcher": "nice:Nice"}}, "supervisor.launcher = 'nice:Nice' and --on ray both say"),
    ],
)
def test_settings_of_one_machine_are_refused_on_a_cluster(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(SetupError, match=words):
        roles.check(config_of(**sections))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"actor": {"count": 3}, "ray": {"max_actors": 2}}, "ray.max_actors = 2 is below actor.count = 3"),
        ({"learner": {"num_processes": 3}, "ray": {"learner": {"nodes": 2}}}, "ray.learner.nodes = 2 does not divide"),
        ({"ray": {"actor": {"resources": {"CPU": 1}}}}, "CPU is Ray's own"),
        ({"ray": {"buffer": {"resources": {"journal": 0}}}}, "journal = 0.0 is no amount"),
        ({"ray": {"namespace": "a b"}}, "ray.namespace"),
    ],
)
def test_a_contradictory_section_is_refused_when_it_is_loaded(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(**sections)


def test_variables_that_look_like_numbers_are_texts() -> None:
    config = config_of(ray={"env_vars": {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 4}})
    assert config.ray.env_vars == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
