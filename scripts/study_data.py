"""Packs what a study has measured into docs/data, so that it can be read again and gone on with elsewhere.

    .venv/bin/python scripts/study_data.py runs/study-methods       # docs/data/study-methods.tar.xz

The archive has the study's record, how each cell ended (settings, figures, curve) and with which versions it was run;
run folders and logs stay behind.  Equal studies make equal archives.  `tar -xJf ARCHIVE -C runs` makes the folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run.files import write_atomic
from atpo_async.study.folder import StudyFolder

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data"


def packed(folder: Path) -> bytes:
    """A tar archive of the study, compressed.  Raises SetupError where there is none, or one without a cell."""
    StudyFolder(folder).plan()  # raises where it is none
    files = dict(_files(folder))
    if not any(name.startswith("cells/") for name in files):
        raise SetupError(f"no cell of study {folder} has ended; there is nothing to pack")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz", preset=9) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder.resolve().name}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the study's folder, content)."""
    yield "study.json", (folder / "study.json").read_bytes()
    for cell in (folder / "cells").glob("*.json"):
        yield f"cells/{cell.name}", cell.read_bytes()
        versions = folder / "runs" / cell.stem / "versions.json"
        if versions.is_file():
            found = json.loads(versions.read_text(encoding="utf-8"))
            found.pop("platform", None)  # of the kernel, which differs from one machine to the next
            yield f"runs/{cell.stem}/versions.json", json.dumps(found).encode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the study")
    parser.add_argument("--out", metavar="FILE", type=Path, help="docs/data/NAME.tar.xz where left out")
    args = parser.parse_args(argv)
    out = args.out or DATA / f"{args.folder.resolve().name}.tar.xz"
    try:
        content = packed(args.folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, content)
    except AtpoError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(f"{out if args.out else os.path.relpath(out)}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
