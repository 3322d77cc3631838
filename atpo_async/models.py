"""Where a policy lies: a local Hugging Face folder, or one that the Hub's client can bring."""

from __future__ import annotations

from pathlib import Path

from atpo_async.errors import SetupError


def model_folder(path: str) -> Path:
    """The local folder of a model.  Raises SetupError naming it and the way out."""
    folder = Path(path)
    if path and (folder / "config.json").is_file():
        return folder
    if path and not folder.exists() and "/" in path and not path.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            return Path(snapshot_download(path))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as exc:
            raise SetupError(f"model.path = {path!r} is no folder here and could not be fetched: {exc}") from exc
    raise SetupError(
        f"model.path = {path!r}: no config.json there; name a Hugging Face model folder, or set model.warm_start = "
        "true with the hopqa environment to make one"
    )
