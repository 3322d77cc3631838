"""The CURVE keys of a run on a cluster: made for it, or those of ``links.keys_dir``; each host adds its own.

A host makes its pair itself and shows the public half only; the run's own secret goes to the hosts of roles that serve.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.links import keys

MARK = "# of a host on Ray; goes with it\n"
"""Begins the files that hosts are let in with."""


class RunKeys:
    """Keys on the supervisor's node.

    Args:
        folder: with the run's keys.
        made: the folder is the run's own: made where it is missing, and removed at the end.
    """

    def __init__(self, folder: Path, *, made: bool) -> None:
        self.folder = folder
        self._made = made
        self._admits = keys.KeyFolder(folder)
        if made:
            shutil.rmtree(folder, ignore_errors=True)  # an earlier life's: its hosts are gone
            folder.mkdir(parents=True, mode=0o700)
            for name in (keys.SERVER_KEY, keys.CLIENT_KEY):
                keys.make_keys(folder, name)
        for file in self._of_hosts():  # of an earlier life of the run
            file.unlink(missing_ok=True)

    def _of_hosts(self) -> list[Path]:
        """Files that were put there for hosts."""
        found = []
        for file in (*self.folder.glob("*.key"), *(self.folder / keys.LEARNERS).glob("*.key")):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if file.read_text(encoding="utf-8").startswith(MARK):
                    found.append(file)
        return found

    @property
    def public(self) -> str:
        """Text of the file with the run's public key."""
        return (self.folder / f"{keys.SERVER_KEY}.key").read_text(encoding="utf-8")

    @property
    def secret(self) -> str:
        """Text of the file with the run's secret key; for Ray's calls only, never for a log."""
        keys.load_pair(self.folder, keys.SERVER_KEY)  # refuses one that others can read
        return (self.folder / f"{keys.SERVER_KEY}.key_secret").read_text(encoding="utf-8")

    def let_in(self, name: str, text: str, *, learner: bool = False) -> None:
        """Let a host in, by the text of the file with its public key.

        Args:
            name: of the key.
            learner: it may be the learner.

        Raises SetupError where the folder has another key of that name.
        """
        folder = self.folder / keys.LEARNERS if learner else self.folder
        folder.mkdir(exist_ok=True, mode=0o700)
        file = folder / f"{name}.key"
        if file.exists() and file not in self._of_hosts():
            raise SetupError(
                f"{file} is another host's key, and on Ray a key of the run's own has that name: rename it"
            )
        aside = file.with_suffix(".part")
        aside.write_text(MARK + text, encoding="utf-8")
        aside.replace(file)

    def shut_out(self, name: str) -> None:
        """Let a host in no more."""
        for file in self._of_hosts():
            if file.stem == name:
                file.unlink(missing_ok=True)

    def admitted(self) -> dict[str, str]:
        """Name -> public key of all that are let in now."""
        self._admits.look()
        return {name: key for key, name in self._admits.names.items()}

    def remove(self) -> None:
        """Remove what was made for the run."""
        if self._made:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in self._of_hosts():
            with contextlib.suppress(OSError):
                file.unlink()


def write_public(file: Path, key: str) -> None:
    """Write a public key as a file that ``links.keys`` reads, unless it is there already."""
    text = f'metadata\ncurve\n    public-key = "{key}"\n'
    with contextlib.suppress(OSError):
        if file.read_text(encoding="utf-8") == text:
            return
    aside = file.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
