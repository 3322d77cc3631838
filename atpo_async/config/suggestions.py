"""Suggests the fields that an unknown name may mean: by other trainers' names for them, by shared words, by spelling.

The names on the right of ``MEANT_BY`` are those of TRL, verl, OpenRLHF, prime-rl and of papers.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

MOST = 3
"""Suggestions in one hint."""

MEANT_BY: Mapping[str, str] = {
    "run.name": "run_name experiment_name exp_name project_name wandb_run_name",
    "run.dir": "output_dir out_dir save_path save_dir log_dir logging_dir default_local_dir ckpt_path",
    "run.seed": "random_seed data_seed rng_seed",
    "run.steps": (
        "max_steps num_steps total_steps training_steps train_steps total_training_steps num_train_steps iterations "
        "num_updates num_episodes total_episodes total_epochs num_train_epochs rollout_steps"
    ),
    "run.max_tasks": "max_samples num_examples max_examples num_prompts dataset_size max_train_samples",
    "model.path": (
        "model model_name model_name_or_path model_path model_id pretrain base_model hf_model init_model policy_model"
    ),
    "model.dtype": "torch_dtype precision param_dtype rollout_dtype",
    "model.max_context_tokens": (
        "max_seq_len max_seq_length seq_len max_model_len max_length max_prompt_length prompt_max_len context_length "
        "max_context context_window max_context_len"
    ),
    "environment.name": (
        "env env_name env_id environment environment_id task task_name dataset dataset_name prompt_data train_files "
        "train_file"
    ),
    "environment.options": "env_args env_kwargs environment_args env_config",
    "search.initial_rollouts": (
        "group_size num_generations n_samples_per_prompt rollouts_per_example rollouts_per_prompt num_rollouts "
        "rollouts samples_per_prompt num_samples num_return_sequences n rollout_n num_responses"
    ),
    "search.rounds": "num_rounds tree_rounds expansion_rounds depth tree_depth",
    "search.branches": "branching_factor num_branches branch_factor tree_width",
    "search.max_action_tokens": (
        "max_tokens max_new_tokens max_completion_length generate_max_len max_response_length response_length "
        "max_completion_tokens completion_length max_gen_len max_response_len"
    ),
    "search.temperature": "temp sampling_temperature rollout_temperature",
    "search.generate_timeout_s": "generation_timeout request_timeout rollout_timeout",
    "search.step_timeout_s": "tool_timeout env_timeout environment_timeout",
    "credit.advantage_mode": "adv_estimator advantage_estimator",
    "credit.discount": "gamma discount_factor reward_discount",
    "credit.normalise_leaves": (
        "norm_adv normalize_advantages normalize_advantage scale_rewards whiten_advantages norm_adv_by_std_in_grpo "
        "normalize_reward"
    ),
    "staleness.trees_per_batch": (
        "batch_size train_batch_size global_batch_size rollout_batch_size generation_batch_size prompts_per_step "
        "per_device_train_batch_size num_prompts_per_step"
    ),
    "staleness.max_lag": (
        "staleness max_staleness staleness_threshold max_async_level async_level max_off_policy_steps off_policy_steps "
        "steps_off_policy max_policy_lag max_head_offpolicyness off_by_n"
    ),
    "staleness.max_uses": "replay_ratio reuse num_reuse sample_reuse max_reuse",
    "staleness.publish_every": "sync_every weight_sync_interval sync_interval trigger_parameter_sync_step sync_steps",
    "buffer.max_trees": "buffer_size replay_buffer_size replay_size capacity buffer_capacity",
    "buffer.priority_exponent": "per_alpha prioritized_replay_alpha priority_alpha",
    "buffer.weight_exponent": "per_beta prioritized_replay_beta",
    "correction.action": (
        "use_tis rollout_is importance_sampling vllm_importance_sampling_correction off_policy_correction"
    ),
    "correction.cap": (
        "tis_cap is_cap rollout_is_threshold vllm_importance_sampling_cap tis_imp_ratio_cap truncation_cap "
        "importance_sampling_cap max_is_weight token_mask_high"
    ),
    "objective.clip_low": (
        "clip_eps clip_epsilon eps_clip epsilon cliprange clip_range clip_ratio clip_ratio_low epsilon_low "
        "eps_clip_low ppo_clip clip_param"
    ),
    "objective.clip_high": (
        "clip_eps clip_epsilon eps_clip epsilon cliprange clip_range clip_ratio clip_ratio_high epsilon_high "
        "eps_clip_high ppo_clip clip_param"
    ),
    "objective.dual_clip": "clip_ratio_c dual_clip_c delta",
    "objective.kl_coef": "beta kl_loss_coef init_kl_coef kl_beta kl_penalty kl_weight kl_tau kl",
    "objective.kl_estimator": "kl_loss_type kl_type",
    "objective.entropy_coef": "entropy_coeff ent_coef entropy_bonus entropy_loss_coef entropy_weight",
    "objective.aggregation": "loss_agg_mode loss_aggregation loss_type loss_reduction",
    "objective.ratio_level": "importance_sampling_level ratio_type",
    "learner.lr": "learning_rate actor_learning_rate actor_lr policy_lr step_size base_lr max_lr peak_lr",
    "learner.betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2 betas1 betas2",
    "learner.eps": "adam_eps adam_epsilon",
    "learner.weight_decay": "wd l2 l2_reg",
    "learner.warmup_steps": (
        "num_warmup_steps lr_warmup_steps warmup warmup_ratio lr_warmup_ratio lr_warmup_steps_ratio"
    ),
    "learner.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style warmup_style",
    "learner.max_grad_norm": (
        "grad_clip max_norm clip_grad gradient_clip clip_grad_norm grad_norm_clip gradient_clipping grad_norm "
        "gradient_clip_val"
    ),
    "learner.minibatches": (
        "num_mini_batches num_minibatches mini_batch_size ppo_mini_batch_size minibatch_size steps_per_generation"
    ),
    "learner.epochs": "ppo_epochs num_ppo_epochs max_epochs update_epochs num_epochs num_iterations inner_epochs",
    "learner.micro_batch_tokens": (
        "micro_batch_size micro_train_batch_size ppo_micro_batch_size_per_gpu ppo_micro_batch_size "
        "max_tokens_per_gpu ppo_max_token_len_per_gpu gradient_accumulation_steps grad_accum micro_bs"
    ),
    "learner.checkpoint_every": "save_steps save_interval save_freq save_every ckpt_interval checkpoint_interval",
    "learner.keep_checkpoints": "save_total_limit max_ckpt_num keep_last max_checkpoints",
    "learner.num_processes": (
        "num_gpus n_gpus n_gpus_per_node num_gpus_per_node nproc_per_node world_size actor_num_gpus_per_node num_ranks"
    ),
    "learner.gpus": "num_gpus n_gpus cuda_devices gpu_ids devices trainer_gpus",
    "learner.accelerate_config": "deepspeed ds_config zero_stage fsdp fsdp_config config_file",
    "learner.mixed_precision": "bf16 fp16 amp",
    "learner.gradient_checkpointing": "activation_checkpointing grad_checkpointing enable_gradient_checkpointing",
    "learner.optimizer": (
        "optim optimizer_type optimizer_name optim_type adam_offload optimizer_offload offload_optimizer use_8bit_adam "
        "adam_8bit use_8bit_optimizer cpu_offload optimizer_cpu_offload"
    ),
    "learner.compile": "torch_compile use_torch_compile compile_model use_compile torch_compile_backend",
    "learner.kernels": "use_liger_kernel use_liger liger liger_kernel use_fused_kernels",
    "learner.lora.rank": "lora_rank lora_r r use_lora peft use_peft lora_dim adapter_rank max_lora_rank",
    "learner.lora.alpha": "lora_alpha adapter_alpha",
    "learner.lora.rslora": "use_rslora use_rs_lora",
    "learner.lora.targets": "target_modules lora_target_modules lora_targets modules_to_adapt exclude_modules",
    "learner.lora.init": "lora_adapter_path adapter_path lora_path adapter_name_or_path",
    "learner.lora.publish": "load_lora merge_adapter merge_lora",
    "learner.tensorboard": "use_tensorboard",
    "metrics.sinks": "report_to wandb use_wandb trackio use_trackio logger loggers log_with trackers",
    "actor.count": (
        "num_actors num_workers num_rollout_workers vllm_num_engines num_engines num_inference_workers dp num_replicas"
    ),
    "actor.gpus": "num_gpus n_gpus gpu_ids inference_gpus inference_gpu_ids rollout_gpus",
    "actor.engine": "use_vllm inference_engine rollout_engine backend inference_backend rollout_name vllm_mode",
    "actor.trees_in_flight": "concurrency max_inflight max_inflight_rollouts max_concurrent_rollouts async_queue_size",
    "actor.max_num_seqs": "max_concurrent max_concurrency max_batch_size max_num_sequences max_running_requests",
    "actor.gpu_memory_utilization": "vllm_gpu_memory_utilization gpu_mem_util mem_fraction_static gpu_memory_fraction",
    "actor.tensor_parallel_size": "tensor_model_parallel_size vllm_tensor_parallel_size tp tp_size",
    "eval.every_steps": "eval_steps eval_interval eval_every eval_freq test_freq val_interval val_check_interval",
    "eval.num_tasks": "eval_size num_eval num_eval_examples val_batch_size num_eval_samples max_eval_samples",
    "eval.at_start": "val_before_train eval_on_start eval_at_start",
    "links.host": "address ip master_addr host_ip",
    "links.advertise": "advertise_host public_address external_ip node_ip_address hostname",
    "links.actors_port": "port master_port server_port",
    "supervisor.max_restarts": "max_failures max_retries",
}
"""Field -> what others call it, apart from the field's own last part."""

SAME_WORD: Mapping[str, str] = {
    "learning": "lr", "rate": "lr", "num": "count", "n": "count", "number": "count", "temp": "temperature",
    "coeff": "coef", "coefficient": "coef", "weight": "coef", "dir": "folder", "directory": "folder", "gpu": "gpus",
    "device": "gpus", "grad": "gradient", "val": "eval", "test": "eval", "ckpt": "checkpoint", "save": "checkpoint",
    "interval": "every", "freq": "every", "frequency": "every", "env": "environment", "rollout": "rollouts",
    "len": "tokens", "length": "tokens", "precision": "dtype",
}  # fmt: skip
"""Word of a name -> one word for all that mean the same."""

OF_ONE_METHOD = ("implicit_reward", "imitation", "team")
"""Sections whose fields are meant where the section was written, or where no other field is."""

WEAK = frozenset({"max", "min", "count", "size", "per", "use", "every", "steps", "s", "the", "of", "is", "by"})
"""Words too frequent in names to tell fields apart."""


def near(name: str, known: Collection[str]) -> list[str]:
    """The fields that ``name`` may mean, at most ``MOST``, the likeliest first.  Pure.

    Args:
        name: dotted or not, as a user wrote it.
        known: dotted fields.
    """
    name = name.lower().replace("-", "_")
    section, _, leaf = name.rpartition(".")
    whole = name.replace(".", "_")
    meant = [
        field
        for field in known
        if field.rpartition(".")[2] == leaf or not {leaf, whole}.isdisjoint(MEANT_BY.get(field, "").split())
    ]
    meant = [field for field in meant if _section(field) == section or _section(field) not in OF_ONE_METHOD] or meant
    if meant:
        # First the fields of the section that was written, then those whose last part is the same; a cluster's last.
        meant.sort(
            key=lambda field: (
                field.rpartition(".")[0] != section,
                field.startswith("ray."),
                field.rpartition(".")[2] != leaf,
            )
        )
        return meant[:MOST]
    letters = {field: score for field in known if (score := _letters(name, field)) >= 0.79}
    if letters:
        return _best(letters, share=0.9)
    others = sorted({word for words in MEANT_BY.values() for word in words.split()})
    slips = set(difflib.get_close_matches(leaf, others, n=1, cutoff=0.85))
    if slips:
        return [field for field in known if not slips.isdisjoint(MEANT_BY.get(field, "").split())][:MOST]
    return _best({field: score for field in known if (score := _words_shared(name, field)) >= 0.5}, share=0.8)


def _section(field: str) -> str:
    return field.rpartition(".")[0]


def sections(name: str, known: Collection[str]) -> list[str]:
    """The sections that ``name`` may mean, by spelling."""
    return difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)


def _best(scores: Mapping[str, float], *, share: float) -> list[str]:
    """The fields with at least ``share`` of the highest score, the highest first."""
    least = share * max(scores.values(), default=0.0)
    return sorted((field for field in scores if scores[field] >= least), key=lambda field: -scores[field])[:MOST]


def _letters(name: str, field: str) -> float:
    """Similarity of spelling: of the whole names, or of the last parts where the sections agree or none was written."""
    section, _, leaf = name.rpartition(".")
    its_section, _, its_leaf = field.rpartition(".")
    whole = difflib.SequenceMatcher(None, name, field).ratio()
    if section not in ("", its_section):
        # The section is misspelt; a right last part has been found by `near` already.
        return whole if leaf == its_leaf else 0.0
    return difflib.SequenceMatcher(None, leaf, its_leaf).ratio()


def _words_shared(name: str, field: str) -> float:
    """Share of the words of ``name`` that ``field`` has too, weak ones counting less; 0 where its own last part has no
    strong one of them."""
    section, _, leaf = field.rpartition(".")
    ours, its_own = _words(name.rpartition(".")[2]), _words(leaf)
    if not ours & its_own - WEAK:
        return 0.0
    theirs = its_own | _words(section)
    return sum(map(_weight, ours & theirs)) / (sum(map(_weight, ours)) + 0.1 * len(theirs - ours))


def _weight(word: str) -> float:
    return 0.25 if word in WEAK else 1.0


def _words(name: str) -> set[str]:
    return {SAME_WORD.get(word, word) for word in name.split("_") if word}
