"""Verifies what a transport has brought: every tensor's digest, before an engine sees a byte of it."""

from __future__ import annotations

import os
from pathlib import Path

from atpo_async.core.errors import WeightsRejected
from atpo_async.wire.digests import file_digests
from atpo_async.wire.messages import WeightsManifest


def verify(manifest: WeightsManifest, path: Path) -> None:
    """Raises WeightsRejected naming a tensor, and removes the file, if its bytes are not those of the manifest."""
    try:
        _verify(manifest, path)
    except WeightsRejected:
        path.unlink(missing_ok=True)
        raise


def _verify(manifest: WeightsManifest, path: Path) -> None:
    label = f"version {manifest.version}"
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        if size != manifest.total_bytes:
            raise WeightsRejected(
                f"{label}: the payload has {size} bytes, the manifest says {manifest.total_bytes}; it was not applied"
            )
        # Tied tensors lie at one place, which is hashed once.
        places = list(dict.fromkeys((spec.offset, spec.nbytes) for spec in manifest.tensors))
        found = dict(zip(places, file_digests(file, places), strict=True))
    finally:
        os.close(file)
    wrong = [spec for spec in manifest.tensors if found[spec.offset, spec.nbytes] != spec.digest]
    if wrong:
        first = wrong[0]
        raise WeightsRejected(
            f"{label}: tensor {first.name} is not what the learner published: its digest is "
            f"{found[first.offset, first.nbytes]}, the manifest says {first.digest} ({len(wrong)} of "
            f"{len(manifest.tensors)} tensors differ); it was not applied"
        )
