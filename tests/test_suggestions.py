"""A name that is no field is answered with the field that was meant."""

from __future__ import annotations

import pytest

from atpo_async.cli import main
from atpo_async.config import fields
from atpo_async.config.suggestions import MEANT_BY, MOST, near

KNOWN = fields()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learner.learning_rate", ["learner.lr"]),
        # TRL
        ("per_device_train_batch_size", ["staleness.trees_per_batch"]),
        ("num_generations", ["search.initial_rollouts"]),
        ("max_completion_length", ["search.max_action_tokens"]),
        ("beta", ["objective.kl_coef"]),
        ("epsilon_high", ["objective.clip_high"]),
        ("save_total_limit", ["learner.keep_checkpoints"]),
        ("model_name_or_path", ["model.path"]),
        ("learner.num_iterations", ["learner.epochs"]),
        # verl
        ("actor_rollout_ref.actor.optim.lr", ["learner.lr"]),
        ("actor_rollout_ref.rollout.n", ["search.initial_rollouts"]),
        ("algorithm.kl_ctrl.kl_coef", ["objective.kl_coef"]),
        ("trainer.total_training_steps", ["run.steps"]),
        ("trainer.test_freq", ["eval.every_steps"]),
        ("data.train_batch_size", ["staleness.trees_per_batch"]),
        ("actor_rollout_ref.actor.fsdp_config.optimizer_offload", ["learner.optimizer"]),
        ("trainer.n_gpus_per_node", ["learner.num_processes"]),
        # OpenRLHF
        ("pretrain", ["model.path"]),
        ("eps_clip", ["objective.clip_low", "objective.clip_high"]),
        ("n_samples_per_prompt", ["search.initial_rollouts"]),
        ("generate_max_len", ["search.max_action_tokens"]),
        ("vllm_num_engines", ["actor.count"]),
        ("actor_learning_rate", ["learner.lr"]),
        # prime-rl
        ("max_async_level", ["staleness.max_lag"]),
        ("rollouts_per_example", ["search.initial_rollouts"]),
        ("trainer.optim.weight_decay", ["learner.weight_decay"]),
        ("max_steps", ["run.steps"]),
        ("orchestrator.seq_len", ["model.max_context_tokens"]),
        # ours, in the wrong section, without one, or mistyped
        ("actor.temperature", ["search.temperature"]),
        ("seed", ["run.seed"]),
        ("num_gpus", ["learner.num_processes", "learner.gpus", "actor.gpus"]),
        ("learner.lerning_rate", ["learner.lr"]),
        ("learner.lrr", ["learner.lr"]),
        ("learnr.lr", ["learner.lr"]),
        ("max-action-token", ["search.max_action_tokens"]),
        ("learner.warmup_stesp", ["learner.warmup_steps"]),
        ("journal", ["buffer.journal_dir", "buffer.journal_sync"]),
    ],
)
def test_the_field_that_is_meant_comes_first_and_nothing_unrelated_after_it(name: str, meant: list[str]) -> None:
    assert near(name, KNOWN) == meant


@pytest.mark.parametrize("name", ["foo.bar", "xyzzy", "learner.dropout", "max_size", ""])
def test_nothing_is_suggested_for_what_nothing_is_like(name: str) -> None:
    assert near(name, KNOWN) == []


def test_every_suggestion_is_a_field_and_there_are_never_many() -> None:
    assert set(MEANT_BY) <= set(KNOWN)
    for field, names in MEANT_BY.items():
        for name in names.split():
            found = near(name, KNOWN)
            assert 0 < len(found) <= MOST, name
            assert set(found) <= set(KNOWN)
            assert field in found, name


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--learner.learning_rate", "unknown option; did you mean --learner.lr?"),
        ("--learning-rate", "unknown option; did you mean --learner.lr?"),
        ("--learner", "is a section and takes no value; name a field of it, for instance --learner.lr"),
        ("--frobnicate", "unknown option; `atpo config CONFIG` lists every field"),
    ],
)
def test_the_command_line_suggests_in_one_line(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "c.toml", option, "1"]) == 2
    assert capsys.readouterr() == ("", f"error: {option}: {said}\n")
