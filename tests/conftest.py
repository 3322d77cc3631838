"""What every test relies on: quiet libraries, one thread, no GPU test without a GPU, no process left behind."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch, vLLM and transformers are imported, here and in every process a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Two workers with two threads each on two cores wait for each other ten times as long as they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the suite in the background has it, and whatever the tests start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine a call may take any time.  The suite says the same each time: what Hypothesis draws follows from the
# test alone.  To look further than it has: ARGS="--hypothesis-profile=explore -k …".
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("suite")

SESSION_TAG = "ATPO_TEST_SESSION"
# Inherited by whatever the tests start, and readable from outside after its parents are gone.
os.environ.setdefault(SESSION_TAG, uuid.uuid4().hex)
if WORKER := os.environ.get("PYTEST_XDIST_WORKER", ""):
    # Each worker of pytest-xdist looks for what its own tests have left, and lets the other workers' processes be.
    os.environ[SESSION_TAG] += f"-{WORKER}"
GRACE_S = 10.0
left_behind = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def spawner() -> Iterator[Any]:
    """Forks roles that a test can kill (``tests.fault_support``)."""
    from tests.fault_support import Spawner

    with Spawner() as made:
        yield made


@pytest.fixture(scope="session")
def hopqa_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of width 64 that answer a third of their one-hop questions.  Whole runs begin with it."""
    from tests.learner_support import small_policy

    return small_policy(tmp_path_factory.mktemp("policy") / "policy", steps=60)


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """Collections leave out what was loaded before: a pass that runs out of memory calls ``gc.collect``, which takes
    seconds in a process that holds the whole suite."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """A command that a test runs in this process sets up logging for a process of its own: on a stream of that test."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in handlers:
            root.removeHandler(handler)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What blocks for ever in a test waits for this, so that no thread outlives it."""
    event = threading.Event()
    yield event
    event.set()


def pytest_configure(config: pytest.Config) -> None:
    """A GPU machine may lack pytest-timeout: its marker then says nothing, and is no error."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ends a test that hangs, by pytest-timeout")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Long files first, so that no process of the suite ends with one that began when the others were nearly done.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    missing = [name for name in ("liger_kernel", "torchao", "triton") if importlib.util.find_spec(name) is None]
    if missing or os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if item.get_closest_marker("kernels"):
                reason = f"needs {', '.join([*missing, 'the interpreter of Triton'])}; make test-kernels brings them"
                item.add_marker(pytest.mark.skip(reason=reason))
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    for item in needing_gpu:
        if not item.get_closest_marker("timeout"):
            # Engines and kernels are compiled there: twice a minute or more in one test.
            item.add_marker(pytest.mark.timeout(600))
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


def _ancestors(pid: int) -> Iterator[int]:
    while pid:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])
        yield pid


def _survivors() -> Iterator[tuple[int, str]]:
    """(pid, command line) of the processes that carry this session's tag or descend from this one."""
    tag = f"{SESSION_TAG}={os.environ[SESSION_TAG]}".encode()
    above = {os.getpid(), *_ancestors(os.getpid())}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) in above:
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            tagged = tag in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile, or another user's
        # A zombie has no command line.  The resource tracker ends with the process it serves.
        ours = tagged or os.getpid() in _ancestors(int(folder.name))
        if ours and command and "multiprocessing.resource_tracker" not in command:
            yield int(folder.name), command


def _end_compile_workers() -> None:
    """torch keeps a pool of compilers from its first compilation to this process's exit: no leftover of a test."""
    compiler = sys.modules.get("torch._inductor.async_compile")
    if compiler is not None:
        compiler.shutdown_compile_workers()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves processes behind, and end them: an engine's leftovers hold gigabytes."""
    found = session.config.stash.setdefault(left_behind, [])
    if not session.config.pluginmanager.hasplugin("dsession"):  # else the workers have looked (pytest_testnodedown)
        _end_compile_workers()
        found += _end_survivors()
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left_behind"] = found
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _end_survivors() -> list[str]:
    """Ends what is still there once it has had time to end by itself; says what that was."""
    deadline_s = time.monotonic() + GRACE_S
    while (survivors := list(_survivors())) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    for pid, _ in survivors:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid}: {command[:200]}" for pid, command in survivors]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: what it found counts for the whole run."""
    found = getattr(node, "workeroutput", {}).get("left_behind", [])
    node.config.stash.setdefault(left_behind, []).extend(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(left_behind, []):
        terminalreporter.write_line(f"FAILED: a process outlived the tests and was killed: {line}", red=True)
