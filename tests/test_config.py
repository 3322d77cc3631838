"""Configuration: what is refused, with which words, and what is derived."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_async import config as configuration
from atpo_async.config import Config, as_options, build, load, parse_value, split_options, to_toml
from atpo_async.config.doors import DOORS
from atpo_async.core.doors import Door
from atpo_async.core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_configurations_that_come_with_the_project_load() -> None:
    demo = load(ROOT / "configs" / "demo.toml")
    search = demo.search
    assert search.max_leaves == search.initial_rollouts + search.rounds * search.branches >= 2
    big = load(ROOT / "configs" / "gpu_8x80gb.toml")
    assert big.actor.engine == "vllm"
    assert big.learner.num_processes == len(big.learner.gpus)
    assert (ROOT / str(big.learner.accelerate_config)).is_file()


def test_the_configuration_for_search_names_data_and_a_server_and_loads_anywhere() -> None:
    config = load(ROOT / "configs" / "search_qa.toml")
    assert config.environment.name == "search_qa"
    assert config.environment.options["retriever"] == "http://127.0.0.1:8000/retrieve"
    assert config.search.max_leaves == 22
    assert (config.model.path, config.actor.engine) == ("Qwen/Qwen3-4B", "vllm")


def test_the_papers_set_up_is_the_papers() -> None:
    config = load(ROOT / "configs" / "at2po_qwen3_4b.toml")
    search, learner = config.search, config.learner
    assert (search.initial_rollouts, search.rounds, search.branches, search.max_leaves) == (10, 2, 6, 22)
    assert (search.temperature, search.truncated_reward) == (1.0, -1.0)
    assert (config.staleness.trees_per_batch, learner.minibatches, config.staleness.max_lag) == (64, 8, 0)
    assert (learner.lr, learner.weight_decay, learner.schedule, learner.warmup_steps) == (1e-6, 0.01, "constant", 0)
    assert (config.run.steps, config.model.max_context_tokens, search.max_action_tokens) == (240, 2000 + 6192, 6192)
    assert (config.objective.clip_low, config.objective.clip_high, config.objective.dual_clip) == (3e-3, 4e-3, None)
    paper = load([ROOT / "configs" / "at2po_qwen3_4b.toml", ROOT / "configs" / "recipes" / "at2po_paper.toml"])
    assert paper == config


def test_an_unknown_key_is_refused_with_its_path_and_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"learner\.lrr: unknown key \(value 0\.1\).*did you mean learner\.lr\?  Known in \[learner\]: lr, ",
    ):
        load(write(tmp_path, "[learner]\nlrr = 0.1\n"))


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lerner: unknown key.*did you mean learner\?  Known in the file: run, model"
    ):
        load(write(tmp_path, "[lerner]\nlr = 0.1\n"))


def test_a_value_out_of_range_is_refused_with_its_path_bound_and_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^staleness\.max_lag must be >= 0, got -1$"):
        load(write(tmp_path, "[staleness]\nmax_lag = -1\n"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"buffer": {"max_bytes": 1000000}}, "buffer.max_bytes must be >= 1_048_576, got 1_000_000"),
        ({"run": {"seed": 2**31}}, "run.seed must be < 2_147_483_648, got 2_147_483_648"),
        ({"search": {"top_p": 1.5}}, "search.top_p must be <= 1, got 1.5"),
        ({"learner": {"max_grad_spike": 0.1}}, "learner.max_grad_spike must be > 1, got 0.1"),
    ],
)
def test_a_bound_is_a_number_that_can_be_read_and_typed(tmp_path: Path, data: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(data)
    assert str(caught.value) == words
    assert load(write(tmp_path, "[buffer]\nmax_bytes = 1_048_576\n")).buffer.max_bytes == parse_value("1_048_576")


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"learner": {"lr": 0}, "search": {"strategy": "best"}})
    first, second = sorted(str(caught.value).splitlines())
    assert first == "learner.lr must be > 0, got 0"
    assert second.startswith(
        "search.strategy = 'best' is unknown; known: chains, diverse, entropy, entropy-rise, none, random, "
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"staleness": {"max_lag": 1, "publish_every": 4}}, "staleness.max_lag = 1 cannot hold with"),
        ({"staleness": {"max_lag": 0, "max_uses": 2}}, "raise max_lag to at least 1, or lower publish_every"),
        ({"staleness": {"max_lag": 2, "max_uses": 2, "publish_every": 3}}, "staleness.max_uses = 2"),
        ({"correction": {"action": "none"}}, "--correction.accept_bias true"),
        ({"weights": {"transport": "file", "shared_memory": False}}, "set --weights.transport chunks"),
        ({"learner": {"minibatches": 17}}, "learner.minibatches = 17 exceeds staleness.trees_per_batch = 16"),
        ({"search": {"initial_rollouts": 1, "rounds": 0}}, "search.initial_rollouts = 1"),
        ({"search": {"max_action_tokens": 512}}, "must be below model.max_context_tokens"),
        ({"links": {"actors_port": 7000, "weights_port": 7000}}, "links.actors_port and links.weights_port are both"),
        ({"learner": {"gpus": [0, 1]}}, "learner.gpus names 2 GPUs for learner.num_processes = 1"),
        ({"actor": {"gpus": [0], "tensor_parallel_size": 2}}, "actor.gpus names 1 GPUs"),
        ({"actor": {"gpus": [0]}, "learner": {"gpus": [0]}}, "both name GPU 0"),
        ({"actor": {"gpus": [0], "device": "cpu"}}, "actor.device = 'cpu' contradicts actor.gpus = [0]"),
        ({"correction": {"floor": 2.0}}, "correction.floor = 2.0 must be below correction.cap = 2.0"),
        ({"correction": {"action": "icepop"}}, "works by token, but correction.level = 'turn'"),
        ({"correction": {"action": "m2po", "level": "token", "exponent": "ess"}}, "by its own measure"),
        ({"correction": {"action": "none", "accept_bias": True, "gate": 0.1}}, "correction.gate = 0.1 does nothing"),
        ({"correction": {"exponent": "ess", "numerator": "policy"}}, "numerator"),
        ({"correction": {"exponent": "ess", "prox": "interpolate"}}, "ess needs them: use recompute"),
        ({"correction": {"prox": "interpolate"}, "credit": {"value_mode": "tree_trace"}}, "'tree_trace' needs them"),
        ({"correction": {"numerator": "policy"}}, "twice"),
        ({"correction": {"action": "mask", "cap": 0.9}}, "ratios of 1 must lie between them"),
        ({"correction": {"prox": "first-step"}, "learner": {"minibatches": 2}}, "use --correction.prox auto"),
        ({"correction": {"exponent": "ess", "ess_target": 0.05}}, "lower the floor or raise the target"),
        ({"staleness": {"exact_lag": 9}}, "raise max_lag to 9"),
        ({"weights": {"swap_timeout_s": 600}}, "weights.swap_timeout_s = 600 must be below links.give_up_s = 600"),
        ({"staleness": {"exact_lag": 2, "max_uses": 2}}, "needs staleness.max_uses = 1"),
    ],
)
def test_a_contradiction_is_refused_naming_both_sides(data: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(data)
    assert words in str(caught.value)


def test_a_swap_may_take_a_minute_or_half_of_what_others_wait_for_it() -> None:
    assert build({}).swap_timeout_s == 60
    assert build({"links": {"give_up_s": 40}}).swap_timeout_s == 20
    assert build({"weights": {"swap_timeout_s": 300}}).swap_timeout_s == 300


def test_a_missing_file_a_folder_and_bad_toml_are_each_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist; configs/demo\.toml is one to start from"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="is a folder; name a TOML file"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is no valid TOML"):
        load(write(tmp_path, "[run\n"))


def test_dotted_options_go_on_top_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[learner]\nlr = 0.1\n")
    config = load(path, {"learner.lr": "1e-5", "run.name": "x", "objective.dual_clip": "none", "actor.gpus": "[0]"})
    assert config.learner.lr == 1e-5
    assert config.run.name == "x"
    assert config.objective.dual_clip is None
    assert config.actor.gpus == (0,)


def layers(folder: Path, *texts: str) -> list[Path]:
    """Files a.toml, b.toml, … with these contents."""
    paths = [folder / f"{letter}.toml" for letter in "abcdef"[: len(texts)]]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_later_files_go_over_earlier_ones_key_by_key_and_options_over_all(tmp_path: Path) -> None:
    files = layers(
        tmp_path,
        "[learner]\nlr = 0.1\nweight_decay = 0.5\n[environment]\noptions = { hops = 3, num_names = 8 }\n",
        "[learner]\nlr = 0.2\nwarmup_steps = 4\n[environment.options]\nhops = 2\n",
        "[search]\nbranches = 5\n",
    )
    config = load(files, {"learner.warmup_steps": "5"})
    assert (config.learner.lr, config.learner.weight_decay, config.learner.warmup_steps) == (0.2, 0.5, 5)
    assert config.environment.options == {"hops": 2, "num_names": 8}
    assert config.search.branches == 5
    assert load(files[::-1]).learner.lr == 0.1
    assert load([]) == Config()


def test_a_runs_own_configuration_takes_files_on_top(tmp_path: Path) -> None:
    run = tmp_path / "config.json"
    run.write_text(json.dumps(build({"learner": {"lr": 0.1, "num_threads": None}}).model_dump(mode="json")))
    (file,) = layers(tmp_path, "[learner]\nnum_threads = 2\n")
    assert load([run, file]).learner.num_threads == 2
    assert load([file, run]).learner.num_threads is None


def test_of_several_files_an_error_names_the_one_that_holds_the_value(tmp_path: Path) -> None:
    a, b = layers(tmp_path, "[staleness]\nmax_lag = 2\n[search]\nbranches = 3\n", "[staleness]\nmax_lag = -1\n")
    with pytest.raises(ConfigError) as caught:
        load([a, b])
    assert str(caught.value) == f"staleness.max_lag must be >= 0, got -1 in {b}"
    with pytest.raises(ConfigError) as caught:
        load([b, a], {"search.strategy": "best"})
    assert str(caught.value).startswith(
        "search.strategy = 'best' in --search.strategy is unknown; known: chains, diverse, entropy, "
    )
    assert load([b, a]).staleness.max_lag == 2
    c, d = layers(tmp_path, "[learner]\nlrr = 1\n[lerner]\nlr = 1\n", "[learner]\nlr = 1e-3\n")
    with pytest.raises(ConfigError) as caught:
        load([c, d])
    first, second = sorted(str(caught.value).splitlines())
    assert first.startswith(
        f"learner.lrr: unknown key (value 1) in {c}; did you mean learner.lr?  Known in [learner]: lr, "
    )
    assert second.startswith(
        f"lerner: unknown key (value {{'lr': 1}}) in {c}; did you mean learner?  Known in the file: run, "
    )


def test_of_several_files_a_contradiction_names_the_file_of_each_side(tmp_path: Path) -> None:
    a, b = layers(tmp_path, "[staleness]\nmax_lag = 1\n", "[staleness]\npublish_every = 4\n")
    with pytest.raises(ConfigError) as caught:
        load([a, b], {"staleness.max_uses": "2"})
    sides = f"  (staleness.max_lag: {a}; staleness.publish_every: {b}; staleness.max_uses: --staleness.max_uses)"
    assert str(caught.value).endswith(f"lower publish_every or max_uses{sides}")
    with pytest.raises(ConfigError) as caught:
        load(a, {"staleness.publish_every": "4"})
    assert str(caught.value).endswith("or lower publish_every or max_uses"), "one file needs no name"


def test_of_several_files_the_missing_the_broken_and_the_misshapen_one_is_named(tmp_path: Path) -> None:
    a, b, c = layers(tmp_path, "[learner]\nlr = 1\n", "learner = 3\n", "[learner\n")
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load([a, tmp_path / "nowhere.toml"])
    with pytest.raises(ConfigError, match=r"c\.toml is no valid TOML"):
        load([a, c])
    with pytest.raises(ConfigError, match=rf"^learner is a value in {b}, but a section in {a}: make them agree$"):
        load([a, b])
    with pytest.raises(ConfigError, match=rf"^learner is a section in {a}, but a value in {b}: make them agree$"):
        load([b, a])
    (listed := tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"list\.json holds a list, no sections"):
        load([a, listed])


def test_what_files_set_can_be_written_as_options(tmp_path: Path) -> None:
    a, b = layers(
        tmp_path,
        "[learner]\nlr = 0.1\nbetas = [0.5, 0.6]\n",
        '[run]\nname = "7"\n[learner]\nmax_grad_spike = "none"\ngpus = []\ngradient_checkpointing = true\n'
        '[objective]\nclip_high = 1e-3\ndual_clip = "none"\n[search]\nstrategy = "none"\n[links]\nkeys_dir = "none"\n'
        '[environment]\noptions = { day = "7", "odd key" = "a\\"b", hops = 2, fast = true }\n',
    )
    assert load(a, as_options(b)) == load([a, b])
    assert load(a, as_options([a, b])) == load([a, b])
    assert as_options([]) == {}


RECIPE = '[recipe]\nname = "mine"\nsource = "here"\n'


def test_a_recipe_takes_the_algorithm_out_of_the_files_before_it_and_leaves_the_rest(tmp_path: Path) -> None:
    a, b = layers(
        tmp_path,
        '[search]\nstrategy = "random"\ninitial_rollouts = 3\ntruncated_reward = -1.0\n'
        '[credit]\nvalue_mode = "leaf_mean"\n'
        "value_options = { odd = 1 }\n[correction]\naccept_bias = true\ncap = 7.0\n"
        "[learner]\nlr = 0.1\nminibatches = 4\n[staleness]\nmax_lag = 3\nmax_oversampling = 9.0\n",
        f"{RECIPE}[objective]\nkl_coef = 0.5\n",
    )
    mine = load([a, b])
    assert mine == load(
        [],
        {
            "search.initial_rollouts": "3",
            "search.truncated_reward": "-1.0",
            "correction.accept_bias": "true",
            "learner.lr": "0.1",
            "staleness.max_lag": "3",
            "objective.kl_coef": "0.5",
        },
    )
    assert load([b, a]).credit.value_mode == "leaf_mean", "what lies above a recipe goes over it"
    assert load(a, as_options(b)) == mine, "a role's process takes the further files as options"
    assert configuration.recipe_of(b) == configuration.recipes.Recipe(name="mine", source="here")
    assert configuration.recipe_of(a) is None


def test_every_field_of_an_algorithms_sections_is_begun_anew_but_those_named(tmp_path: Path) -> None:
    names = configuration.recipes.algorithm()
    assert {"search.strategy", "credit.value_options", "correction.cap", "learner.epochs"} <= set(names)
    for kept in configuration.recipes.KEPT:
        assert kept in configuration.fields()
        assert kept not in names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('recipe = "grpo"\n', "recipe = 'grpo' in {file} is no table; a recipe says what it is, as in"),
        ("[recipe]\nnam = 'x'\n", "recipe.nam: unknown key in {file}; known in [recipe]: name, source, task"),
        ("[recipe]\nname = 3\n", "recipe.name must be text, got 3 in {file}"),
        ('[recipe]\nsource = "x"\n', "recipe.name is missing in {file}: a recipe has a name"),
    ],
)
def test_what_a_file_says_of_itself_as_a_recipe_is_checked(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert str(raised.value).startswith(said.format(file=file))


def test_a_contradiction_names_the_recipe_that_holds_a_side_of_it(tmp_path: Path) -> None:
    a, b = layers(tmp_path, "[staleness]\nmax_lag = 3\n", f'{RECIPE}[correction]\naction = "none"\n')
    with pytest.raises(ConfigError, match=rf"trains off-policy uncorrected.*correction.action: {b}"):
        load([a, b])


def test_a_section_within_a_section_is_set_like_any_other_and_written_with_a_header_of_its_own(tmp_path: Path) -> None:
    config = load(write(tmp_path, "[learner.lora]\nrank = 4\n"), {"learner.lora.targets": '["q_proj"]'})
    assert (config.learner.lora.rank, config.learner.lora.targets) == (4, ("q_proj",))
    text = to_toml(config)
    assert "\n[learner.lora]\nrank = 4" in text
    assert load(write(tmp_path, text)) == config
    with pytest.raises(ConfigError, match=r"^learner\.lora\.ranks: unknown key .* did you mean learner\.lora\.rank\?"):
        load(write(tmp_path, "[learner.lora]\nranks = 4\n"))
    with pytest.raises(ConfigError, match=r"^learner\.lora\.rank must be >= 0, got -1$"):
        load(write(tmp_path, ""), {"learner.lora.rank": "-1"})
    with pytest.raises(ConfigError, match=r"^--learner\.lora: is a section .* for instance --learner\.lora\.rank$"):
        split_options(["--learner.lora", "8"])


def test_a_file_says_none_as_an_option_does(tmp_path: Path) -> None:
    config = load(write(tmp_path, '[objective]\ndual_clip = "none"\n[learner]\naccelerate_config = "none"\n'))
    assert config.objective.dual_clip is None
    assert config.learner.accelerate_config is None
    with pytest.raises(ConfigError, match=r"^learner\.lr must be a number, got 'none'$"):
        load(write(tmp_path, '[learner]\nlr = "none"\n'))


def test_none_is_a_word_where_the_field_has_that_word(tmp_path: Path) -> None:
    config = load(write(tmp_path, ""), {"search.strategy": "none", "learner.num_threads": "none"})
    assert config.search.strategy == "none"
    assert config.learner.num_threads is None


def test_both_spellings_of_an_option_are_taken_out_of_the_command_line() -> None:
    rest, options = split_options(
        ["train", "c.toml", "--learner.lr", "1e-5", "--staleness.max_lag=0", "--model.warm_start", "--debug"]
    )
    assert rest == ["train", "c.toml", "--debug"]
    assert options == {"learner.lr": "1e-5", "staleness.max_lag": "0", "model.warm_start": "true"}


@pytest.mark.parametrize("name", ["learner.lr", "staleness.max_lag", "run.name", "actor.gpus", "search.strategy"])
def test_an_option_whose_value_was_forgotten_is_refused(name: str) -> None:
    for words in ([f"--{name}"], [f"--{name}", "--model.warm_start"]):
        with pytest.raises(ConfigError, match=f"^--{name} needs a value$"):
            split_options(words)


def test_an_empty_value_is_one_for_text_only(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), {"model.path": ""}).model.path == ""
    with pytest.raises(ConfigError, match=r"^--learner\.lr needs a value$"):
        load(write(tmp_path, ""), split_options(["--learner.lr="])[1])


def test_a_truth_value_that_was_left_out_does_not_take_the_next_word() -> None:
    assert split_options(["train", "--model.warm_start", "c.toml"]) == (
        ["train", "c.toml"],
        {"model.warm_start": "true"},
    )
    assert split_options(["--model.warm_start", "False", "c.toml"]) == (["c.toml"], {"model.warm_start": "False"})


def test_a_word_that_is_neither_a_truth_value_nor_a_file_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "c.toml", "--learner.lineage", "maybe"]
    with pytest.raises(ConfigError, match=r"^--learner\.lineage maybe: 'maybe' is neither true nor false, nor a file"):
        split_options(words)
    (tmp_path / "maybe").mkdir()
    assert split_options(words) == (["train", "c.toml", "maybe"], {"learner.lineage": "true"})
    assert split_options(["--learner.lineage", "train"]) == (["train"], {"learner.lineage": "true"})


def test_a_truth_value_may_be_the_word_auto_where_the_field_has_that_word() -> None:
    name = "learner.gradient_checkpointing"
    assert split_options([f"--{name}", "auto", "c.toml"]) == (["c.toml"], {name: "auto"})
    assert split_options([f"--{name}", "c.toml"]) == (["c.toml"], {name: "true"})
    values = {"auto": "auto", "true": True, "False": False, "on": True}
    for text, value in values.items():
        assert load((), {name: text, "model.path": "m"}).learner.gradient_checkpointing == value
    with pytest.raises(ConfigError, match=rf"^{name} must be one of true, false or 'auto', got 'some'$"):
        load((), {name: "some", "model.path": "m"})
    with pytest.raises(ConfigError, match=f"^--{name} maybe: 'maybe' is neither true nor false, nor auto, nor a file"):
        split_options(["train", "c.toml", f"--{name}", "maybe"])


def test_a_value_that_is_no_truth_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^learner\.lineage must be true or false, got 'maybe'$"):
        load(write(tmp_path, ""), split_options(["--learner.lineage=maybe"])[1])
    with pytest.raises(ConfigError, match=r"^learner\.lineage must be true or false, got 'lineage\.jsonl'$"):
        load(write(tmp_path, "[learner]\nlineage = 'lineage.jsonl'\n"))


@pytest.mark.parametrize("text", ["7", "2026-11-20", "1e5", "true", "none"])
def test_text_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    config = load(write(tmp_path, ""), {"run.name": text, "run.dir": text, "links.host": text})
    assert (config.run.name, config.run.dir, config.links.host) == (text, Path(text), text)
    keys = load(write(tmp_path, ""), {"links.keys_dir": text}).links.keys_dir
    assert keys == (None if text == "none" else Path(text))


def test_an_option_of_an_environment_that_is_no_simple_value_is_text(tmp_path: Path) -> None:
    config = load(write(tmp_path, ""), {"environment.options.day": "2026-11-20", "environment.options.hops": "2"})
    assert config.environment.options == {"day": "2026-11-20", "hops": 2}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("learner", "lr", True),
        ("staleness", "max_lag", False),
        ("actor", "gpus", [True]),
        ("learner", "betas", [True, 0.9]),
        ("objective", "dual_clip", True),
        ("run", "name", True),
    ],
)
def test_a_truth_value_is_no_number(section: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{section}\.{field}: takes no truth value, got"):
        build({section: {field: value}})


def test_a_truth_value_is_taken_where_one_is_meant() -> None:
    config = build({"model": {"warm_start": True}, "environment": {"options": {"loud": True}}})
    assert config.model.warm_start
    assert config.environment.options == {"loud": True}


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("run.steps", "x", "run.steps must be a whole number, got 'x'"),
        ("run.steps", "1.5", "run.steps must be a whole number, got 1.5"),
        ("learner.lr", "fast", "learner.lr must be a number, got 'fast'"),
        (
            "learner.betas",
            "0.9,0.99",
            "learner.betas must be a list, as in [0.9, 0.999] (on the command line '[0.9, 0.999]'), got '0.9,0.99'",
        ),
        ("learner.gpus", "0", "learner.gpus must be a list, as in [0, 1] (on the command line '[0, 1]'), got 0"),
        (
            "metrics.sinks",
            "mine:Lines",
            """metrics.sinks must be a list, as in ["mine:Lines"] (on the command line '["mine:Lines"]'), got""",
        ),
        ("metrics.sinks", "7", 'metrics.sinks must be a list, as in ["name"] (on the command line '),
        ("run.name", "../x", "run.name is the name of a folder in run.dir: letters, digits, "),
    ],
)
def test_a_value_of_another_kind_is_reported_in_a_users_words(option: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], {option: text})
    assert str(caught.value).startswith(said)


def test_a_value_where_a_section_belongs_is_reported_and_a_long_one_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"^run must be a section, \[run\], got 1$"):
        build({"run": 1})
    with pytest.raises(ConfigError) as caught:
        build({"learner": {"lr": "9" * 1000 + "x"}})
    assert len(str(caught.value)) < 200


def test_a_negative_number_is_a_value_and_not_an_option() -> None:
    assert split_options(["--learner.lr", "-1"]) == ([], {"learner.lr": "-1"})


def test_options_of_an_environment_are_free() -> None:
    assert split_options(["--environment.options.hops", "2"])[1] == {"environment.options.hops": "2"}


@pytest.mark.parametrize(
    ("table", "text", "meant"),
    [
        (
            "environment.options",
            '{"hops": 3, "loud": true}',
            "--environment.options.hops 3 --environment.options.loud true",
        ),
        ("environment.options", "{hops = 3}", "--environment.options.hops 3"),
        ("environment.options", "hops=3", "--environment.options.NAME VALUE"),
        ("environment.options", "none", "--environment.options.NAME VALUE"),
        ("objective.surrogate_options", "{width = 3}", "--objective.surrogate_options.width 3"),
        ("metrics.options", "project", "--metrics.options.SINK.NAME VALUE"),
        ("objective.term_options", "epo", "--objective.term_options.TERM.NAME VALUE"),
    ],
)
def test_options_by_name_given_in_one_piece_are_refused_with_the_form_that_is_meant(
    tmp_path: Path, table: str, text: str, meant: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path, ""), {table: text})
    assert str(refused.value).endswith(f"options are given one by one: {meant}")


OWN = "my_package.mine:thing"

OPTIONS_BESIDE = {
    "environment.name": "environment.options",
    "search.strategy": "search.strategy_options",
    "credit.value_mode": "credit.value_options",
    "credit.advantage_mode": "credit.advantage_options",
    "objective.surrogate": "objective.surrogate_options",
    "objective.terms": "objective.term_options",
    "objective.token_weights": "objective.token_weight_options",
    "correction.action": "correction.action_options",
    "buffer.sampling": "buffer.sampling_options",
    "weights.transport": "weights.transport_options",
    "actor.engine": "actor.engine_options",
    "supervisor.launcher": "supervisor.launcher_options",
    "metrics.sinks": "metrics.options",
}
"""Field of each door -> its table of options."""

OF_SEVERAL = {door.options_by_name for door in DOORS}
"""Tables that have a table of options for each name."""


def test_every_door_has_a_field_and_a_table_of_options() -> None:
    assert {door.field for door in DOORS} == set(OPTIONS_BESIDE)
    assert set(OPTIONS_BESIDE) | set(OPTIONS_BESIDE.values()) <= set(configuration.fields())


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.field)
def test_a_door_takes_a_name_of_ones_own_and_its_options(tmp_path: Path, door: Door[Any]) -> None:
    table, several = OPTIONS_BESIDE[door.field], bool(door.options_by_name)
    inside = f"{table}.{OWN}" if several else table
    words = [f"--{door.field}", f'["{OWN}"]' if several else OWN, f"--{inside}.width", "3", f"--{inside}.deep"]
    config = load(write(tmp_path, ""), split_options(words)[1])
    options = {"width": 3, "deep": True}
    assert configuration.get(config, door.field) == ((OWN,) if several else OWN)
    assert configuration.get(config, table) == ({OWN: options} if several else options)
    assert OWN.partition(".")[0] not in sys.modules
    assert load(write(tmp_path, to_toml(config))) == config


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.field)
def test_a_name_that_no_door_knows_is_refused_with_those_it_knows(door: Door[Any]) -> None:
    section, _, leaf = door.field.partition(".")
    known = door.choices()[0]
    wrong = f"{known[:-1]}ß{known[-1]}"
    with pytest.raises(ConfigError) as refused:
        build({section: {leaf: [wrong] if door.options_by_name else wrong}})
    assert str(refused.value).startswith(f"{door.field} = {wrong!r} is unknown; did you mean {known}?  Known: {known}")
    assert str(refused.value).endswith(f"or 'package.module:name' for {door.what} of your own")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.field)
def test_the_resolved_configuration_shows_the_names_that_a_door_knows(door: Door[Any]) -> None:
    leaf = door.field.rpartition(".")[2]
    (line, *_) = (
        line
        for line in to_toml(Config()).splitlines()
        if ", or package.module:name" in line and line.startswith(f"{leaf} =")
    )
    assert ", ".join(door.choices()) in line


@pytest.mark.parametrize("table", OPTIONS_BESIDE.values())
def test_options_by_name_are_finite(table: str) -> None:
    section, _, leaf = table.partition(".")
    options: dict[str, Any] = {"width": float("nan")}
    with pytest.raises(ConfigError, match="width = nan is no finite number"):
        build({section: {leaf: {"jsonl": options} if table in OF_SEVERAL else options}})


def test_options_of_a_metrics_sink_are_given_by_its_name(tmp_path: Path) -> None:
    words = ["--metrics.sinks", '["jsonl", "tensorboard"]', "--metrics.options.tensorboard.folder", "logs"]
    config = load(write(tmp_path, ""), split_options(words)[1])
    assert config.metrics.options == {"tensorboard": {"folder": "logs"}}
    assert load([], as_options(write(tmp_path, to_toml(config)))) == config
    with pytest.raises(
        ConfigError, match=r"--metrics\.options\.folder names no option of a sink: --metrics\.options\.SINK"
    ):
        load([], {"metrics.options.folder": "logs"})


def test_an_option_of_a_term_may_be_a_schedule_in_every_form(tmp_path: Path) -> None:
    rising = {"kind": "linear", "start": 0.5, "end": 1.0, "steps": 4}
    file = write(tmp_path, '[objective]\nterms = "kl-cov"\n[objective.term_options.kl-cov]\ncoef = 0.5\nshare = 0.1\n')
    over = tmp_path / "over.toml"
    over.write_text(
        '[objective.term_options]\nkl-cov = { coef = { kind = "linear", start = 0.5, end = 1, steps = 4 } }\n'
    )
    expected = build({"objective": {"terms": ["kl-cov"], "term_options": {"kl-cov": {"coef": rising, "share": 0.1}}}})
    words = ["--objective.term_options.kl-cov.coef", '{ kind = "linear", start = 0.5, end = 1, steps = 4 }']
    assert load([file, over]) == load(file, split_options(words)[1]) == expected
    assert load(write(tmp_path, to_toml(expected))) == expected
    assert load([], as_options([tmp_path / "c.toml"])) == expected
    number = tmp_path / "number.toml"
    number.write_text("[objective.term_options.kl-cov]\ncoef = 0.25\n")
    assert load([tmp_path / "c.toml", number]).objective.term_options == {"kl-cov": {"coef": 0.25, "share": 0.1}}
    with pytest.raises(ConfigError, match=r"names no option of a loss term: --objective.term_options.TERM.NAME VALUE"):
        load([], {"objective.term_options.coef": "1"})


@pytest.mark.parametrize(
    ("data", "sinks"),
    [
        ({}, ("jsonl",)),
        ({"metrics": {"sinks": []}}, ("jsonl",)),
        ({"metrics": {"sinks": [OWN]}}, ("jsonl", OWN)),
        ({"learner": {"tensorboard": True}}, ("jsonl", "tensorboard")),
        ({"learner": {"tensorboard": True}, "metrics": {"sinks": ["tensorboard"]}}, ("jsonl", "tensorboard")),
    ],
)
def test_the_metrics_file_is_always_written_and_each_sink_is_used_once(
    data: dict[str, Any], sinks: tuple[str, ...]
) -> None:
    assert build(data).sinks == sinks


def test_an_unknown_option_is_refused_with_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"--learner\.lerning_rate: unknown option"):
        split_options(["--learner.lerning_rate", "1"])
    with pytest.raises(ConfigError, match=r"did you mean .*--staleness\.max_lag"):
        split_options(["--staleness.maxlag", "1"])
    with pytest.raises(ConfigError, match=r"did you mean .*--staleness\.max_lag"):
        split_options(["--buffer.max_lag", "1"])  # the right field in the wrong section


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-5", 1e-5), ("true", True), ("True", True), ("none", None), ("abc", "abc"), ("[1, 2]", [1, 2])],
)
def test_values_are_read_as_toml_or_taken_as_text(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_admission_follows_from_the_knobs() -> None:
    config = build({"staleness": {"max_lag": 3, "trees_per_batch": 16, "max_uses": 2}})
    assert config.staleness.max_trees_pending == 32
    assert ("trees pending", 32) in [(name, value) for name, value, _ in configuration.derived_bounds(config)]


@pytest.mark.parametrize(("max_lag", "max_uses", "publish_every"), [(0, 2, 1), (4, 8, 1), (2, 3, 3), (2, 2, 3)])
def test_knobs_that_would_stall_the_run_are_refused_and_one_more_lag_each_is_enough(
    max_lag: int, max_uses: int, publish_every: int
) -> None:
    knobs = {"max_uses": max_uses, "publish_every": publish_every}
    with pytest.raises(ConfigError, match=rf"staleness\.max_lag = {max_lag} cannot hold with"):
        build({"staleness": {"max_lag": max_lag, **knobs}})
    least = publish_every + max_uses - 2
    assert build({"staleness": {"max_lag": least, **knobs}}).staleness.max_trees_pending >= 16
    with pytest.raises(ConfigError, match=f"raise max_lag to at least {least}"):
        build({"staleness": {"max_lag": least - 1, **knobs}})


def test_admission_never_allows_fewer_trees_than_a_batch() -> None:
    # Such knobs are refused together; the bound alone holds all the same.
    knobs = configuration.StalenessConfig(max_lag=0, max_uses=5, trees_per_batch=16)
    assert knobs.max_trees_pending == 16


def test_every_staleness_knob_is_a_field() -> None:
    for name, _ in configuration.STALENESS_KNOBS:
        configuration.get(Config(), name)


def test_the_resolved_configuration_as_toml_and_as_json_loads_to_the_same(tmp_path: Path) -> None:
    changes = {"run.name": 'x"'[:1], "environment.options.hops": "2", "objective.dual_clip": "none"}
    config = load(ROOT / "configs" / "demo.toml", changes)
    assert config.objective.dual_clip is None
    assert load(write(tmp_path, to_toml(config))) == config
    as_json = tmp_path / "config.json"
    as_json.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    assert load(as_json) == config


@given(st.dictionaries(st.text(max_size=5), st.text(), max_size=2))
def test_any_text_is_read_back_from_the_resolved_configuration(options: dict[str, str]) -> None:
    config = build({"environment": {"options": options}})
    assert tomllib.loads(to_toml(config))["environment"]["options"] == options


@given(st.lists(st.sampled_from(["train", "c.toml", "--debug", "-x", "--join", "a:1"])))
def test_words_without_a_dot_pass_through_untouched(words: list[str]) -> None:
    words = [word for word in words if word != "c.toml"]
    assert split_options(words) == (words, {})


def test_sampling_from_a_cut_distribution_needs_the_bias_accepted() -> None:
    with pytest.raises(ConfigError, match=r"search\.top_p = 0\.9 .*--correction\.accept_bias true"):
        build({"search": {"top_p": 0.9}})
    assert build({"search": {"top_p": 0.9}, "correction": {"accept_bias": True}}).search.top_p == 0.9


def test_an_optimizer_constant_out_of_range_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"learner\.betas\.1 must be < 1, got 2"):
        build({"learner": {"betas": [0.9, 2]}})


def test_tasks_that_the_steps_would_leave_out_are_refused_with_the_steps_they_need() -> None:
    with pytest.raises(
        ConfigError, match=r"may take 13 batches .*run\.steps = 12 would end before: set --run\.steps 13"
    ):
        build({"run": {"max_tasks": 50, "steps": 12}, "staleness": {"trees_per_batch": 8, "max_uses": 2}})
    assert build({"run": {"max_tasks": 50, "steps": 13}, "staleness": {"trees_per_batch": 8, "max_uses": 2}})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_an_option_of_the_environment_that_is_no_finite_number_is_refused_and_as_a_word_it_is_taken(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment\.options.*mode = {text} is no finite number.*quote it"):
        build({"environment": {"options": {"mode": float(text)}}})
    assert build({"environment": {"options": {"mode": text}}}).environment.options == {"mode": text}
