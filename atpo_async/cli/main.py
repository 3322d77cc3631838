"""``atpo …``: the table of commands, and how errors become exit codes.

Exit codes: 0 done; 1 a role crashed too often, or the doctor found something missing; 2 something the user can mend,
reported in one line; 130 interrupted.  Only the module of the command that was given is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from atpo_async.cli.common import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, OPTIONS_NOTE, Asked, note
from atpo_async.core.errors import AtpoError, ConfigError, RoleCrashed
from atpo_async.run.temporary import make_temporary_folder_fit

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "start buffer, learner and actors, and train; the same command goes on with a stopped run"),
    "demo": ("train", "train a small policy on this machine, in a new run, and report; `demo agent`: one that chats"),
    "buffer": ("roles", "run the buffer by hand, in the foreground"),
    "learner": ("roles", "run the learner by hand, in the foreground"),
    "actor": ("roles", "run an actor by hand, in the foreground; it may join a running job from anywhere"),
    "follower": ("follower", "keep a copy of a run's journal on another machine; promote it when the buffer's is lost"),
    "relay": ("relay", "fetch weights once, and pass turns on, for actors of a far site that join here"),
    "launch": ("launch", "print an sbatch script, or Kubernetes manifests, that run all of it on a cluster"),
    "eval": ("evaluate", "greedy success on held-out tasks, of a run's last checkpoint or a model folder"),
    "task": ("task", "show one task as messages and play it in the terminal, with what each reward says"),
    "config": ("setup.config", "print the resolved configuration and every setting that affects staleness"),
    "doctor": ("setup.doctor", "what is installed, which engine and device would be used, what is missing"),
    "report": ("runs.report", "write report.html into a run folder"),
    "trees": ("runs.trees", "trees that a run was trained on, as conversations"),
    "status": ("runs.status", "who waits for whom in a run, since when, and the queue and window of every link"),
    "study": ("study", "train over a grid of any settings and seeds, and report what differs, with its errors"),
    "retriever": ("retriever", "serve passages of a corpus to search tasks, by BM25 over the published protocol"),
    "keys": ("setup.keys", "keys for a run that listens beyond loopback: make them, list them (docs/keys.md)"),
    "version": ("setup.version", "print the version, and those of what it runs on"),
}
"""Command -> its module in ``atpo_async.cli``, which has ``add_arguments(parser, command)`` and ``run(asked)``, which
returns the exit code; and what it does."""

WITHOUT_CONFIGURATION = frozenset({"report", "trees", "status", "retriever", "keys", "version"})
"""Commands that take no options of the configuration."""

ONLY_PRINTS = (WITHOUT_CONFIGURATION - {"retriever"}) | {"config"}
"""Commands that start no process and need no temporary files."""


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
        # The reader has closed the pipe (`atpo config … | head`): there is nowhere to print.
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
    _check_command(words)
    rest, options = _split(words)
    name = next((word for word in rest if not word.startswith("-")), None)
    before = rest[: rest.index(name)] if name is not None else rest
    if "--version" in before:
        name, before, rest, options = "version", [], ["version"], {}
    if name is None:
        return _without_command(rest)
    module_name, about = COMMANDS[name]
    module = importlib.import_module(f"atpo_async.cli.{module_name}")
    parser = _Parser(prog=f"atpo {name}", description=about, epilog=OPTIONS_NOTE, allow_abbrev=False)
    module.add_arguments(parser, name)
    args, more = parser.parse_known_args([*before, *rest[len(before) + 1 :]])
    files = getattr(args, "config", None)
    if files is not None and not any(word.startswith("-") for word in more):
        files += more  # `atpo actor A.toml --join WHERE B.toml`: argparse takes the first run of words only
    elif more:
        raise ConfigError(_not_taken(name, more, _long_options(parser)))
    if options and name in WITHOUT_CONFIGURATION:
        raise ConfigError(f"--{next(iter(options))}: `atpo {name}` takes no options of the configuration")
    if name not in ONLY_PRINTS:
        make_temporary_folder_fit(note)
    result = module.run(Asked(command=name, args=args, options=options, words=words, debug=debug))
    assert isinstance(result, int)
    return result


def _without_command(words: Sequence[str]) -> int:
    """``atpo --help``, or words that no command takes."""
    parser = _Parser(
        prog="atpo",
        description="Asynchronous off-policy training of multi-turn, tool-using language-model agents on turn trees.",
        epilog=f"{OPTIONS_NOTE}  --debug shows tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help=COMMANDS["version"][1])
    table = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, about) in COMMANDS.items():
        table.add_parser(name, help=about)
    _, more = parser.parse_known_args(words)
    if more:
        raise ConfigError(_not_taken(None, more))
    parser.print_help()
    return EXIT_USER


def _check_command(words: Sequence[str]) -> None:
    """Raises ConfigError for a first word that is no command, with the one that may have been meant."""
    if not words or words[0].startswith("-") or words[0] in COMMANDS:
        return
    import difflib

    word = words[0]
    if Path(word).suffix == ".toml" or Path(word).is_file():
        raise ConfigError(f"{word} is no command; did you mean `atpo train {word}`?")
    if Path(word).is_dir():
        raise ConfigError(f"{word} is no command; did you mean `atpo status {word}`, or `atpo report {word}`?")
    near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    meant = f"did you mean `atpo {near[0]}`?  " if near else ""
    raise ConfigError(f"{word} is no command; {meant}There are {', '.join(COMMANDS)}")


def _long_options(parser: argparse.ArgumentParser) -> list[str]:
    """Of a command, and of what it does."""
    found: list[str] = []
    for action in parser._actions:
        found += [text for text in action.option_strings if text.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            found += [text for each in action.choices.values() for text in _long_options(each)]
    return found


def _not_taken(command: str | None, more: Sequence[str], known: Sequence[str] = ()) -> str:
    """One line about words that a command does not take.

    Args:
        known: its own long options, of which one may have been meant.
    """
    first = next((word for word in more if word.startswith("-")), more[0])
    if not first.startswith("--"):
        return f"{first}: `atpo{f' {command}' if command else ''}` takes no such word"
    import difflib

    option = first.partition("=")[0].removeprefix("--")
    names = [text.removeprefix("--") for text in known]
    if "." not in option and (near := difflib.get_close_matches(option, names, n=1, cutoff=0.8)):
        return f"--{option}: `atpo {command}` takes no such option; did you mean --{near[0]}?"
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
        note(f"{option} is given {named.count(option)} times; the last one holds: {value}")
    return rest, texts


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, as all commands do."""

    def error(self, message: str) -> NoReturn:
        hint = f"name a TOML file: `{self.prog} configs/demo.toml`; " if message.endswith("required: CONFIG") else ""
        raise ConfigError(f"{message}  ({hint}`{self.prog} --help` shows what it takes)")


if __name__ == "__main__":
    sys.exit(main())
