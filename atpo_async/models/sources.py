"""Finding a model's folder: a local Hugging Face folder, or one that the Hub's client fetches."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.models.tensor_files import weight_files

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def looks_like_hub_name(path: str) -> bool:
    """Whether ``path`` may be ``owner/name`` on the Hub; not where its first part is a folder here: then a slip."""
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).exists() and not Path(path).parent.exists()


def model_folder(path: str) -> Path:
    """The local folder of a model; one on the Hub is fetched unless the local cache holds it.

    Raises SetupError in one line, naming the path and the way out.
    """
    if path and (Path(path) / "config.json").is_file():
        return Path(path)
    if looks_like_hub_name(path):
        return _from_hub(path)
    if path and (Path(path) / "adapter_config.json").is_file():
        raise SetupError(
            f"model.path = {path!r} is an adapter folder: give the model that it was trained on as --model.path, and "
            f"--learner.lora.init {path} with its rank, alpha and targets"
        )
    what = f"model.path = {path!r}" if path else "model.path is empty"
    raise SetupError(
        f"{what}: no model folder (no config.json) there; name one with --model.path, or for the hopqa environment "
        "make one with --model.warm_start true"
    )


def check_positions(folder: Path, max_context_tokens: int) -> None:
    """Raises ConfigError where the model has fewer positions than ``model.max_context_tokens``.

    A model whose positions are scaled (YaRN and its like) is left to the engine, which knows how far they reach; so is
    one whose config.json does not say.
    """
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = said.get("text_config") or said
        positions = text.get("max_position_embeddings")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    except (OSError, ValueError, AttributeError):
        return
    if isinstance(positions, int) and not scaled and 0 < positions < max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens = {max_context_tokens} is above the {positions} positions of model.path = "
            f"{str(folder)!r} (max_position_embeddings in its config.json): set it to at most {positions}"
        )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise SetupError(
            f"model.path = {name!r} is no folder here, and huggingface_hub, which could fetch it, is not installed"
        ) from None
    # The cache first: a model that is there needs no network, and no wait for one.
    with contextlib.suppress(LocalEntryNotFoundError, OSError, ValueError):
        folder = Path(snapshot_download(name, local_files_only=True))
        if _is_whole(folder):
            return folder
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as exc:
        reason = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise SetupError(
            f"model.path = {name!r} is neither a folder here nor in the local Hub cache, and could not be fetched: "
            f"{reason.rstrip('.')}.  Name a model folder with --model.path, or for the hopqa environment make one with "
            "--model.warm_start true"
        ) from exc


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot has its configuration and all its weights; a broken fetch leaves some."""
    if not (folder / "config.json").is_file():
        return False
    try:
        weight_files(folder)
    except SetupError:
        return False
    return True
