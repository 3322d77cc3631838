"""Who may import whom, what the pure modules may touch, and what no file may say.

Read from the syntax trees, so that a module counts as soon as it exists; two runs of Python check what is loaded.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("actors", "buffer", "learner")
COMPOSED = "inprocess"
"""Puts the roles' parts together in one process: no other package knows it."""
PACKAGES = ("atpo_async", *ROLES, COMPOSED)
HEAVY = {"torch", "vllm", "transformers", "accelerate"}

LAYERS = (
    *("core", "config", "wire", "run", "models", "status", "links", "transports", "environments"),
    *("ops", "relay", "report", "study", "api", "cli"),
)
"""Packages of atpo_async, lowest first: none imports one above it."""

UPWARD: dict[tuple[str, str], str] = {}
"""(importing module, imported package) -> why that import may go up nevertheless."""

# What a role's `__main__` runs; nothing below it may know it.
LOOPS = {"actors.actor", "buffer.service", "learner.role"}

# Packages of built-in functions, a module for each.
PURE_PACKAGES = (
    "atpo_async.core.credit.value_modes",
    "atpo_async.core.credit.advantage_modes",
    "actors.expansion.strategies",
)
PURE = {
    *(f"atpo_async.core.credit.{name}" for name in ("backup", "rewards", "roles", "rule", "tree_arrays", "weights")),
    *(
        f"{package}.{path.stem}"
        for package in PURE_PACKAGES
        for path in (ROOT / package.replace(".", "/")).glob("[a-z]*.py")
    ),
    "atpo_async.core.bounds",
    "atpo_async.core.dtypes",
    "atpo_async.core.errors",
    "atpo_async.core.mixture",
    "atpo_async.core.shuffling",
    "atpo_async.core.priorities",
    "atpo_async.core.vocabulary",
    "atpo_async.environments.data.splits",
    "atpo_async.environments.hopqa.world",
    "atpo_async.wire.messages",
    "atpo_async.wire.weights",
    "atpo_async.core.tree",
    *(f"atpo_async.wire.{name}" for name in ("arrays", "checks", "codec", "forms", "plain_turn", "rules")),
    "actors.expansion.candidates",
    "actors.teams.rules",
    "actors.expansion.expansion",
    "atpo_async.wire.records",
    "atpo_async.core.naming.shards",
    "buffer.counters",
    "buffer.batches.parts",
    *(f"buffer.front.{name}" for name in ("draw", "messages", "metrics", "overview", "passing")),
    *(f"buffer.shard.{name}" for name in ("settings", "states")),
    "buffer.pool.outcomes",
    "buffer.trees.assembly",
    "buffer.batches.served",
    "buffer.batches.delay_line",
    "buffer.leases.admission",
    "buffer.leases.evaluations",
    "buffer.leases.limits",
    "buffer.leases.overview",
    "buffer.leases.presence",
    "buffer.leases.rates",
    "buffer.leases.shares",
    "buffer.leases.table",
    "buffer.leases.tasks",
    "buffer.trees.registry",
    "buffer.trees.spent",
    "buffer.trees.index",
    "buffer.trees.groups",
    "buffer.journal.persistence",
    "buffer.journal.chunks",
    "buffer.journal.entries",
    "buffer.leases.ledger",
    "buffer.batches.shares",
    "buffer.pool.expiry",
    "buffer.pool.pool",
    "buffer.pool.priorities",
    "buffer.pool.sum_tree",
    "buffer.pool.table",
    "buffer.pool.weights",
    "buffer.sampling.prioritized",
    "buffer.sampling.uniform",
    "atpo_async.core.loss_traits",
    "learner.batches.intake",
    "learner.loss.parts.covariance",
    "learner.training.whole_batch.chance",
    "learner.imitation.intake",
    "learner.imitation.rows",
    *(f"buffer.imitation.{name}" for name in ("imitation", "moments", "store")),
    *(f"learner.loss.{name}" for name in ("correction", "diagnostics", "guards", "objective", "tempering", "units")),
    *(
        f"learner.loss.{folder}.{file.stem}"
        for folder in ("surrogates", "corrections", "terms", "token_weights")
        for file in (ROOT / "learner" / "loss" / folder).glob("[a-z]*.py")
    ),
    *(f"learner.packing.{name}" for name in ("credited", "rows", "staleness", "tree", "tree_paths", "tree_segments")),
}
# A clock, the outside world, or chance that nobody passed in.
IMPURE_IMPORTS = {
    *("time", "datetime", "os", "io", "socket", "select", "asyncio", "threading", "multiprocessing", "subprocess"),
    *("signal", "tempfile", "shutil", "secrets", "uuid", "urllib", "http", "zmq", "logging"),
}
IMPURE_CALLS = {"open", "print", "input"}
IMPURE_METHODS = {"read_text", "write_text", "read_bytes", "write_bytes", "open", "mkdir", "unlink", "touch"}

WARM_STARTS = {
    f"atpo_async.environments.{name}.warm_start" for name in ("hopqa", "ledger_qa", "next_text", "passage_qa")
}
"""They make the demos' policies, each as a process of its own."""
POLICY_MAKERS = WARM_STARTS | {"atpo_async.environments.policy_training"}
"""They and what they share."""

# What the command line and every user of the vocabulary load first.
LIGHT = (
    "atpo_async",
    *(
        f"atpo_async.{name}"
        for name in ("cli.main", "config", "core.credit", "core.errors", "core.tree", "wire.messages")
    ),
)

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_ATTRIBUTES = {"send_pyobj", "recv_pyobj", "allow_pickle"}
# What runs or unpickles what it is given.  `yaml.load` may be safe with a loader; `yaml.safe_load` always is.
UNSAFE_CALLS = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__)|torch\.(load|save)|"
    r"(pd|pandas)\.read_pickle|yaml\.(unsafe_|full_)?load(_all)?"
)


@dataclass(frozen=True, kw_only=True)
class Import:
    """One module that `importer` names; `runs` is False below `if TYPE_CHECKING`."""

    importer: str
    target: str
    line: int
    at_module_level: bool
    runs: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree, for every module of the five packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def _is_package(name: str) -> bool:
    return (ROOT.joinpath(*name.split(".")) / "__init__.py").exists()


def _targets(node: ast.AST, importer: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            here = importer.split(".")
            here = here[: len(here) - node.level + (1 if _is_package(importer) else 0)]
            base = ".".join([*here, base]).rstrip(".")
        # `from package import leaf` names the leaf, not only the package.
        inner = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in modules()]
        yield from inner
        if len(inner) < len(node.names):
            yield base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            yield str(node.args[0].value)


@functools.cache
def imports() -> tuple[Import, ...]:
    found: list[Import] = []

    def walk(node: ast.AST, importer: str, top: bool, runs: bool) -> None:
        for target in _targets(node, importer):
            line = getattr(node, "lineno", 0)
            found.append(Import(importer=importer, target=target, line=line, at_module_level=top and runs, runs=runs))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        alternative = node.orelse if isinstance(node, ast.If) else []
        for child in ast.iter_child_nodes(node):
            walk(child, importer, top and not inside, runs and not (typing_only and child not in alternative))

    for name, tree in modules().items():
        walk(tree, name, True, True)
    return tuple(found)


def package_of(module: str) -> str:
    return module.split(".")[0]


def broken(rule: Iterator[Import]) -> str:
    return "\n".join(sorted({str(found) for found in rule}))


def loaded_by(names: list[str], unwanted: set[str]) -> list[str]:
    """Those of `unwanted` that a fresh Python holds once it has imported `names`."""
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({unwanted!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_the_shared_package_imports_no_role() -> None:
    assert not broken(i for i in imports() if package_of(i.importer) == "atpo_async" and package_of(i.target) in ROLES)


def test_only_its_own_modules_know_the_package_that_composes_the_roles() -> None:
    assert not broken(i for i in imports() if package_of(i.importer) != COMPOSED and package_of(i.target) == COMPOSED)


def layer_of(module: str) -> int | None:
    """Height of the package that a module of atpo_async lies in; None of a module of no such package."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "atpo_async" and len(parts) > 1 and parts[1] in LAYERS else None


def test_packages_of_atpo_async_never_import_one_above_them() -> None:
    """Neither at module level nor in a function; what only type checkers read does not count."""
    upward = {
        i
        for i in imports()
        if i.runs
        and (importer := layer_of(i.importer)) is not None
        and (target := layer_of(i.target)) is not None
        and importer < target
    }
    allowed = {i for i in upward if (i.importer, i.target.split(".")[1]) in UPWARD}
    assert not broken(iter(upward - allowed))
    unused = UPWARD.keys() - {(i.importer, i.target.split(".")[1]) for i in allowed}
    assert not unused, f"exceptions that nothing needs: {sorted(unused)}"


def test_every_package_of_atpo_async_has_its_layer() -> None:
    packages = {path.parent.name for path in (ROOT / "atpo_async").glob("*/__init__.py")}
    assert packages == set(LAYERS)


def test_roles_never_import_one_another() -> None:
    between = (i for i in imports() if package_of(i.importer) in ROLES and package_of(i.target) in ROLES)
    assert not broken(i for i in between if package_of(i.importer) != package_of(i.target))


def test_only_links_and_keys_import_zmq() -> None:
    allowed = re.compile(r"atpo_async\.links(\.\w+)+")
    assert not broken(i for i in imports() if package_of(i.target) == "zmq" and not allowed.fullmatch(i.importer))


def test_only_its_launcher_imports_ray() -> None:
    home = re.compile(r"atpo_async\.ops\.launchers\.ray(\..+)?")
    assert not broken(i for i in imports() if package_of(i.target) == "ray" and not home.fullmatch(i.importer))


def test_links_are_used_through_their_ends() -> None:
    """What is behind a client, a server and announcements may change."""
    hidden = re.compile(r"atpo_async\.links\.(pump|link|binding|connecting|authentication|(client|server)\.\w+)")
    assert not broken(
        i for i in imports() if hidden.fullmatch(i.target) and not i.importer.startswith("atpo_async.links.")
    )


def test_torch_lives_in_the_learner_and_in_the_engines() -> None:
    # And, inside its functions, where both learn what a model folder holds, and in the program that makes the
    # demo's policy, a process of its own.
    assert not broken(
        i
        for i in imports()
        if package_of(i.target) == "torch"
        and package_of(i.importer) in ("atpo_async", "buffer")
        and not (i.importer == "atpo_async.models.causal_lm" and not i.at_module_level)
        and i.importer not in POLICY_MAKERS
    )


def engine_modules() -> set[str]:
    """Modules of the actors that belong to an engine; the protocol, `actors.engines.base`, does not."""
    return {name for name in modules() if re.fullmatch(r"actors\.engines\.(\w+\.\w+|common|probe)", name)}


def test_outside_the_learner_heavy_libraries_are_imported_lazily_or_by_an_engines_own_modules() -> None:
    assert not broken(
        i
        for i in imports()
        if i.at_module_level
        and package_of(i.target) in HEAVY
        and package_of(i.importer) not in ("learner", COMPOSED)
        and i.importer not in engine_modules() | POLICY_MAKERS
    )


def test_the_vocabulary_and_the_command_line_load_neither_torch_nor_zmq_nor_vllm() -> None:
    names = [name for name in LIGHT if name in modules()]
    assert loaded_by(names, HEAVY | {"zmq", "ray", "tokenizers", "matplotlib", "jinja2", "psutil", "filelock"}) == []


def test_no_module_outside_the_learner_and_the_engines_loads_torch() -> None:
    loading = engine_modules() | WARM_STARTS
    names = [name for name in modules() if package_of(name) not in ("learner", COMPOSED) and name not in loading]
    names = [name for name in names if not name.endswith("__main__")]
    assert loaded_by(names, HEAVY) == []


def test_pure_modules_read_no_clock_do_no_io_and_own_no_randomness() -> None:
    sins = [str(i) for i in imports() if i.importer in PURE and i.runs and package_of(i.target) in IMPURE_IMPORTS]
    for name in PURE & modules().keys():
        for node in ast.walk(modules()[name]):
            if isinstance(node, ast.ImportFrom) and node.module == "random":
                # A generator made from a seed is a function of the seed; the module's own draws are not.
                sins += [f"{name}:{node.lineno} imports random.{a.name}" for a in node.names if a.name != "Random"]
            elif isinstance(node, ast.Import):
                sins += [f"{name}:{node.lineno} imports random" for a in node.names if a.name == "random"]
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                method = called.rpartition(".")[2]
                seedless = method in ("default_rng", "Random", "SeedSequence", "RandomState") and not node.args
                own_draw = re.search(
                    r"\b(np|numpy)\.random\.(?!default_rng|SeedSequence|Generator)|\btorch\.rand", called
                )
                if called in IMPURE_CALLS or ("." in called and method in IMPURE_METHODS) or seedless or own_draw:
                    sins.append(f"{name}:{node.lineno} calls {called}")
    assert not sins, "\n".join(sins)


def test_every_pure_module_of_the_list_still_has_its_name() -> None:
    missing = {name for name in PURE if package_of(name) != "learner" and name not in modules()}
    assert not missing, f"renamed or gone, and so no longer held to the rules: {sorted(missing)}"


@functools.cache
def all_modules() -> dict[str, ast.Module]:
    """Path -> syntax tree, for every Python file of the project, tests, benchmarks and scripts included."""
    found = {}
    for path in sorted(repository_files()):
        if path.suffix == ".py":
            found[str(path.relative_to(ROOT))] = ast.parse(path.read_text(), str(path))
    return found


def unsafe(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and sin of whatever could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"imports {a.name}") for a in node.names if package_of(a.name) in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            if not node.level and package_of(node.module or "") in PICKLES:
                yield node.lineno, f"imports from {node.module}"
            unsafe_names = {"torch": {"load", "save"}, "yaml": {"load", "full_load", "unsafe_load"}}
            for name in unsafe_names.get(node.module or "", set()) & {a.name for a in node.names}:
                yield node.lineno, f"imports {name} from {node.module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if UNSAFE_CALLS.fullmatch(called):
                yield node.lineno, f"calls {called}"
            if called in ("importlib.import_module", "import_module"):
                yield from ((node.lineno, f"imports {ast.unparse(a)}") for a in node.args[:1] if _names_pickle(a))
            yield from (
                (node.lineno, "allows pickles") for k in node.keywords if k.arg == "allow_pickle" and not _no(k)
            )
        elif isinstance(node, ast.Attribute) and node.attr in UNSAFE_ATTRIBUTES:
            yield node.lineno, f"uses {node.attr}"


def test_mypy_checks_every_folder_with_python_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {Path(path).parts[0] for path in all_modules()} <= set(settings["files"])
    for section in (settings, *settings["overrides"]):
        assert not section.keys() & {"exclude", "ignore_errors"}, section
        # These find what no longer fits together after a change elsewhere.
        kept = {"attr-defined", "call-arg", "arg-type", "union-attr"}
        assert not kept & set(section.get("disable_error_code", ())), section


def _names_pickle(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and package_of(str(node.value)) in PICKLES


def _no(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Constant) and keyword.value.value is False


def test_nothing_unpickles_or_evaluates() -> None:
    sins = [f"{path}:{line} {sin}" for path, tree in all_modules().items() for line, sin in unsafe(tree)]
    assert not sins, "\n".join(sins)
    assert len(all_modules()) > len(modules())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import marshal as m",
        "from shelve import open",
        "from torch import load",
        "import importlib; importlib.import_module('dill')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text, scope)",
        "builtins.eval(text)",
        "compile(text, 'f', 'exec')",
        "socket.recv_pyobj()",
        "pd.read_pickle(path)",
    ],
)
def test_the_scan_for_what_unpickles_or_evaluates_finds_it(line: str) -> None:
    assert list(unsafe(ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["model.eval()", "np.load(path, allow_pickle=False)", "re.compile(x)", "yaml.safe_load(t)"]
)
def test_the_scan_for_what_unpickles_or_evaluates_leaves_the_rest_alone(line: str) -> None:
    assert not list(unsafe(ast.parse(line)))


def test_nobody_imports_a_main_module_and_only_mains_import_their_loop() -> None:
    upward = [i for i in imports() if i.target.endswith(".__main__")]
    upward += [
        i for i in imports() if i.target in LOOPS and i.importer != f"{package_of(i.importer)}.__main__" and i.runs
    ]
    assert not broken(iter(upward))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_a_package_run_one_way(package: str) -> None:
    below: dict[str, set[str]] = {}
    for i in imports():
        if i.runs and package_of(i.importer) == package == package_of(i.target) and i.target != package:
            below.setdefault(i.importer, set()).add(i.target)
    done: set[str] = set()

    def descend(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "imports in a circle: " + " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for target in sorted(below.get(module, ())):
            descend(target, (*path, module))
        done.add(module)

    for module in sorted(below):
        descend(module, ())


def test_nothing_outside_the_tests_imports_them() -> None:
    sins = []
    for path, tree in all_modules().items():
        for node in ast.walk(tree) if not path.startswith("tests/") else ():
            if isinstance(node, ast.Import):
                sins += [f"{path}:{node.lineno} imports {a.name}" for a in node.names if package_of(a.name) == "tests"]
            elif isinstance(node, ast.ImportFrom) and not node.level and package_of(node.module or "") == "tests":
                sins.append(f"{path}:{node.lineno} imports from {node.module}")
            elif isinstance(node, ast.Constant) and re.match(r"'tests\.\w+[:']", repr(node.value)):
                # For `python -m`, or as an `environment.name`.
                sins.append(f"{path}:{node.lineno} names {node.value!r}")
    assert not sins, "\n".join(sins)


def test_the_tests_folder_is_flat() -> None:
    """A folder tests/actors would shadow the package actors."""
    nested = [path for path in (ROOT / "tests").rglob("*.py") if path.parent != ROOT / "tests"]
    assert not nested


def repository_files() -> list[Path]:
    """Tracked files and those about to be; without git, everything but what it would ignore."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, timeout=60)
    except FileNotFoundError:
        listed = subprocess.CompletedProcess(git, 1, b"", b"")
    if listed.returncode == 0 and listed.stdout:
        names = [name.decode() for name in listed.stdout.split(b"\0") if name]
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    ignored = re.compile(r"^(\.|runs$|models$|build$|dist$|__pycache__$|.*\.egg-info$)")
    paths = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in paths if not any(ignored.match(part) for part in path.relative_to(ROOT).parts[:-1])]


def test_no_file_names_a_path_of_one_machine_or_a_registrys_host() -> None:
    # Put together here, so that this file does not name them either.
    paths = "|".join(("work", "root", "opt/wheels"))
    hosts = "|".join(("py" + r"pi\.org", "python" + r"hosted\.org"))
    forbidden = re.compile(rf"(?<![\w.~-])/(?:{paths})/|{hosts}")
    said = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture, say
        for number, line in enumerate(text.splitlines(), 1):
            if forbidden.search(line):
                said.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not said, "\n".join(said)
