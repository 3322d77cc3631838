"""Runs a module of ours so that no module of the user's that has its name, or a library's, can take its place.

``python -P launch.py buffer RUN_DIR``: what ``python -m`` does, but the working folder comes last on the path, so that
a user's ``buffer.py`` or ``random.py`` beside the task shadows nothing, and our packages are the ones that lie beside
this file, whatever ``PYTHONPATH`` says.  ``multiprocessing`` runs this file again in what a role spawns: there too.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from os import getcwd
from os.path import abspath, dirname

PACKAGES = ("atpo_async", "actors", "buffer", "learner", "inprocess")

HERE = abspath(__file__)
ROOT = dirname(dirname(dirname(HERE)))
"""Holds our packages."""


class OurPackages:
    """A finder for ``sys.meta_path``."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


def command(module: str, *words: str, python: str = sys.executable) -> tuple[str, ...]:
    """Runs ``module`` with ``words`` as its arguments."""
    return (python, "-P", HERE, module, *words)


def search_path(path: list[str], folder: str) -> list[str]:
    """``path`` with the working folder at its end, and without this file's own, which Python puts first."""
    others = [entry for entry in path if entry not in (dirname(HERE), "", folder)]
    return [*others, folder]


def _working_folder() -> list[str]:
    try:
        return [getcwd()]
    except OSError:  # it was deleted
        return []


if __name__ in ("__main__", "__mp_main__"):
    sys.meta_path.insert(0, OurPackages())

if __name__ == "__main__":
    for found in _working_folder():
        sys.path[:] = search_path(sys.path, found)
    import runpy

    wanted = sys.argv.pop(1)
    runpy.run_module(wanted, run_name="__main__")
