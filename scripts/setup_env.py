"""Make `.venv` and put the pinned CPU set and the project into it, once: `make setup`.

Nothing is done when the pinned list, the project's own metadata and the folder are those of the last set-up.
Standard library only, and old syntax on purpose: an old Python must get as far as saying that it is too old.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, NEWEST = (3, 11), (3, 14)
"""Python versions for which every wheel of the list exists."""
OLDEST_GLIBC = (2, 31)
FREE_GB = 4.0
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_S = 5.0
STAMP = "atpo-setup.json"
PIP = ["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-user", "--progress-bar", "off"]


class SetupProblem(Exception):
    """The set-up cannot go on; the text says what is missing and what to do."""


def unsuitable(version: "tuple[int, ...]", system: str, machine: str, libc: "tuple[str, str]") -> str:
    """Why the pinned set cannot be installed on such a machine; empty when it can."""
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        return (
            f"the pinned CPU set has wheels for Linux on x86_64 and aarch64; this is {system} on {machine}. "
            "Use a Linux machine, a virtual machine or a container."
        )
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        return (
            f"Python {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]} is needed; this is "
            f"{version[0]}.{version[1]}. Name another one: make setup PYTHON=/path/to/python3.12"
        )
    name, number = libc
    digits = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if name != "glibc" or digits < OLDEST_GLIBC:
        return (
            f"the wheels need glibc {OLDEST_GLIBC[0]}.{OLDEST_GLIBC[1]} or newer; this system has "
            f"{name or 'another C library'} {number}".rstrip()
            + ". Use a newer distribution or a container."
        )
    return ""


def another_python() -> "str | None":
    """A suitable Python on the PATH, by its usual name."""
    test = "import sys, venv, ensurepip; print(sys.version_info[1])"
    for minor in (13, 12, 11, 14):
        found = shutil.which(f"python3.{minor}")
        if found is None:
            continue
        # A version manager's placeholder may be on the PATH and still not run.
        answer = subprocess.run([found, "-c", test], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if answer.returncode == 0 and answer.stdout.strip() == str(minor).encode():
            return found
    return None


def wanted_state(root: str) -> "dict[str, str]":
    """What the set-up depends on, by content: file times mean nothing after a clone."""
    import tomllib  # only from 3.11 on

    with open(os.path.join(root, "requirements", "cpu.txt"), "rb") as file:
        pins = [line.strip() for line in file.read().splitlines() if line.strip() and not line.startswith(b"#")]
    with open(os.path.join(root, "pyproject.toml"), "rb") as file:
        pyproject = tomllib.load(file)
    # Linter and test settings are read where they lie; only these parts end up in the environment.
    project = {
        "build": pyproject.get("build-system"),
        "project": pyproject.get("project"),
        "setuptools": pyproject.get("tool", {}).get("setuptools"),
    }
    return {
        "root": root,
        "pins": hashlib.sha256(b"\n".join(pins)).hexdigest(),
        "project": hashlib.sha256(json.dumps(project, sort_keys=True).encode()).hexdigest(),
    }


def pinned(root: str, package: str) -> str:
    """The list's line for `package`, e.g. `torch==2.13.0+cpu`."""
    with open(os.path.join(root, "requirements", "cpu.txt")) as file:
        for line in file:
            if line.startswith(package + "=="):
                return line.split(";")[0].strip()
    raise SetupProblem(f"requirements/cpu.txt names no {package}; restore the file (git checkout requirements/cpu.txt)")


def index_trouble(url: str, timeout_s: float = PROBE_S) -> str:
    """Why the package index does not answer within `timeout_s`; empty when it does, whatever it answers: some refuse
    the listing to all but pip."""
    answers = []  # type: list[str]

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout_s):
                answers.append("")
        except urllib.error.HTTPError:
            answers.append("")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            # Something answers, with a certificate that only pip's configuration may know: let pip judge.
            answers.append("" if type(reason).__name__.startswith("SSL") else str(reason))

    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else f"no answer within {timeout_s:g} s"


class Installer:
    """Runs pip of the environment, shows that it is alive, keeps its output in a log."""

    def __init__(self, python: str, log: str) -> None:
        self.python = python
        self.log = log

    def install(self, what: str, arguments: "list[str]", num_packages: int = 1) -> str:
        """Run `pip install`; returns "" or, when it failed, its output."""
        began_s = time.monotonic()
        alive = sys.stdout.isatty()
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PIP_NO_COLOR="1")
        with open(self.log, "ab") as log:
            start = log.tell()
            process = subprocess.Popen(
                [self.python, *PIP, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                while True:
                    try:
                        process.wait(timeout=0.5)
                        break
                    except subprocess.TimeoutExpired:
                        if alive:
                            self._show(what, start, num_packages, time.monotonic() - began_s)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                if alive:
                    print("\r\033[K", end="", flush=True)
        return "" if process.returncode == 0 else self._since(start) or f"pip ended with {process.returncode}"

    def _since(self, start: int) -> str:
        with open(self.log, "rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def _show(self, what: str, start: int, num_packages: int, passed_s: float) -> None:
        text = self._since(start)
        if "Installing collected packages" in text:
            state = "installing"
        else:
            num_found = len(re.findall(r"^(?:Collecting|Processing|Requirement already satisfied)", text, re.MULTILINE))
            state = f"{num_found} of {num_packages} found"
        print(f"\r\033[K  {what}: {state}, {passed_s:.0f} s", end="", flush=True)


def errors_in(output: str) -> str:
    """The lines of pip's output that say what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line[:300] for line in lines if line.startswith("ERROR") and "Ignored the following" not in line]
    return "\n  ".join((errors or lines)[-4:])


def install_torch(installer: Installer, torch: str, index: str = TORCH_INDEX) -> None:
    """torch's CPU build: from pip's own sources, else from PyTorch's index, else say what is missing.

    Raises: SetupProblem.
    """
    # The user's own sources first: a machine with a mirror or a folder of wheels never asks further.
    output = installer.install(torch, ["--no-deps", "--retries", "1", torch])
    if not output:
        return
    if "No matching distribution found" not in output:
        raise SetupProblem(f"pip could not install {torch}:\n  {errors_in(output)}")
    trouble = index_trouble(f"{index}/torch/")
    # Tried without an answer too: pip may know a proxy or a certificate that we do not.  Then without retries.
    no_retries = ["--retries", "0", "--timeout", f"{PROBE_S:g}"] if trouble else []
    output = installer.install(torch, ["--no-deps", *no_retries, "--extra-index-url", index, torch])
    if not output:
        return
    if "No matching distribution found" not in output:
        raise SetupProblem(f"pip could not install {torch}:\n  {errors_in(output)}")
    if not trouble:
        trouble = "it has no wheel for " + f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.machine()}"
    raise SetupProblem(
        f"{torch} was found nowhere: pip's own sources do not have it for Python {sys.version_info[0]}."
        f"{sys.version_info[1]}, and of PyTorch's CPU index {index}: {trouble}.\n"
        "  Either let this machine reach that index (HTTPS_PROXY is honoured), or put the wheel into a folder and say\n"
        "  PIP_FIND_LINKS=/that/folder make setup, or take a Python for which your sources have it:\n"
        "  make setup PYTHON=/path/to/python3.12"
    )


def make_environment(venv: str, state: "dict[str, str]", done: "dict[str, str]") -> str:
    """The environment's Python; the environment is made when it is missing, or useless.

    Raises: SetupProblem.
    """
    python = os.path.join(venv, "bin", "python")
    # Scripts inside name the folder they were made in; and a set-up that never finished is taken up with this Python.
    clear = bool(done) and done.get("root") != state["root"]
    clear = clear or ("pins" not in done and done.get("python", platform.python_version()) != platform.python_version())
    if os.path.lexists(python) and not clear:
        test = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            answer = subprocess.run([python, "-c", test], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            version = answer.stdout.decode().strip() if answer.returncode == 0 else ""
        except OSError:
            version = ""
        if version:
            why = unsuitable(
                tuple(int(part) for part in version.split(".")),
                platform.system(),
                platform.machine(),
                platform.libc_ver(),
            )
            if why:
                raise SetupProblem(f"{venv} holds Python {version}, and {why} Remove the folder first: rm -rf {venv}")
            return python
        clear = True  # its interpreter is gone, for instance after a system upgrade
    free_gb = shutil.disk_usage(state["root"]).free / 1e9
    if free_gb < FREE_GB:
        raise SetupProblem(f"the set-up needs {FREE_GB:g} GB on the disk of {state['root']}; {free_gb:.1f} GB are free")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupProblem(
            f"{sys.executable} has no venv or ensurepip module. On Debian and Ubuntu: apt install "
            f"python3.{sys.version_info[1]}-venv; or name another Python: make setup PYTHON=/path/to/python3.12"
        )
    answer = subprocess.run(
        [sys.executable, "-m", "venv"] + (["--clear"] if clear else []) + [venv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if answer.returncode != 0:
        raise SetupProblem(f"{venv} could not be made:\n  {errors_in(answer.stdout.decode(errors='replace'))}")
    write_stamp(os.path.join(venv, STAMP), {"root": state["root"], "python": platform.python_version()})
    return python


def other_python(venv: str, named: str) -> str:
    """What to tell a user who names a Python, by PYTHON=…, while `venv` was made with another; empty where it fits."""
    if not named:
        return ""
    test = "import sys; print('%d.%d' % sys.version_info[:2])"
    versions = []
    for python in (os.path.join(venv, "bin", "python"), named):
        try:
            answer = subprocess.run([python, "-c", test], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError:
            return ""
        versions.append(answer.stdout.decode().strip() if answer.returncode == 0 else "")
    has, wanted = versions
    if not has or not wanted or has == wanted:
        return ""
    return f"{venv} stays with Python {has}; for {wanted} ({named}) remove it first: rm -rf {venv}"


def read_stamp(path: str) -> "dict[str, str]":
    """What the last set-up left; empty when there was none."""
    try:
        with open(path) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(path: str, stamp: "dict[str, str]") -> None:
    """Whole or not at all: a half-written stamp would vouch for a half-made environment."""
    with open(path + ".new", "w") as file:
        json.dump(stamp, file)
    os.replace(path + ".new", path)


def set_up(root: str) -> None:
    """Bring `.venv` up to date.

    Raises: SetupProblem.
    """
    venv = os.path.join(root, ".venv")
    stamp_path = os.path.join(venv, STAMP)
    state = wanted_state(root)
    if read_stamp(stamp_path) == state and os.path.exists(os.path.join(venv, "bin", "python")):
        return
    import fcntl  # there is none on Windows, which has been refused by now

    # `make demo` and `make test` from two terminals must not write into one environment together.
    folder = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        done = read_stamp(stamp_path)
        if done == state and os.path.exists(os.path.join(venv, "bin", "python")):
            return
        began_s = time.monotonic()
        python = make_environment(venv, state, done)
        done = read_stamp(stamp_path)  # gone when the environment was made anew
        installer = Installer(python, os.path.join(venv, "setup.log"))
        logged = f"Everything pip said: {installer.log}"
        if done.get("pins") != state["pins"]:
            listed = os.path.join(root, "requirements", "cpu.txt")
            with open(listed) as file:
                num_packages = sum(1 for line in file if "==" in line)
            print(f"Setting up .venv with {num_packages} pinned packages; the first time takes two to three minutes.")
            sys.stdout.flush()
            install_torch(installer, pinned(root, "torch"))
            output = installer.install("pinned set", ["--no-deps", "-r", listed], num_packages)
            if output:
                raise SetupProblem(f"pip could not install the pinned set:\n  {errors_in(output)}\n  {logged}")
        if done.get("project") != state["project"]:
            output = installer.install("atpo-async", ["--no-deps", "--no-build-isolation", "--editable", root])
            if output:
                raise SetupProblem(f"pip could not install the project:\n  {errors_in(output)}\n  {logged}")
        write_stamp(stamp_path, state)
        print(f"Set-up done in {time.monotonic() - began_s:.0f} s.")
    finally:
        os.close(folder)


def refuse_anothers(venv: str, root: str) -> None:
    """The set-up may empty the folder.  A link may lead to another disk, but not to another checkout's environment."""
    if not os.path.islink(venv) or not os.path.isdir(venv) or not os.listdir(venv):
        return
    owner = read_stamp(os.path.join(venv, STAMP)).get("root")
    if owner != root:
        raise SetupProblem(
            f"{venv} is a link to {os.path.realpath(venv)}, an environment of {owner or 'somebody else'}, which the "
            f"set-up would change; remove the link first: rm {venv}"
        )


def main() -> int:
    why = unsuitable(tuple(sys.version_info[:2]), platform.system(), platform.machine(), platform.libc_ver())
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        better = another_python()
        if better is not None:
            os.execv(better, [better, os.path.abspath(__file__)])
    try:
        if sys.argv[1:]:
            raise SetupProblem(f"takes no arguments, got {' '.join(sys.argv[1:])}; `make setup` runs it")
        if why:
            raise SetupProblem(why)
        refuse_anothers(os.path.join(ROOT, ".venv"), ROOT)
        set_up(ROOT)
        # SETUP_PYTHON: by the Makefile, and only where the user has named one.
        note = other_python(os.path.join(ROOT, ".venv"), os.environ.get("SETUP_PYTHON", ""))
        if note:
            print(f"set-up: {note}", file=sys.stderr)
    except SetupProblem as problem:
        print(f"set-up: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("set-up: interrupted; the next `make setup` goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
