"""A damaged model file is named in one line, with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.engines.base import EngineSettings
from actors.engines.transformers.engine import TransformersEngine
from actors.engines.vllm.engine import VllmEngine
from atpo_async.core.errors import SetupError
from atpo_async.models.tensor_files import read_header
from learner.policy.model import load_policy
from tests.learner_support import make_config, make_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def wrong_type(whole: bytes) -> bytes:
    """A sound header of sound length that safetensors itself refuses."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["lm_head.extra"] = {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}
    return with_header(json.dumps(header).encode()) + whole[8 + length :]


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: POINTER, r"model\.safetensors is a git-LFS pointer.*git lfs pull"),
    "empty": (lambda _: b"", r"model\.safetensors is damaged.*fetch it again"),
    "a byte": (lambda _: b"{", r"model\.safetensors is damaged.*fetch it again"),
    "zeros": (lambda whole: bytes(len(whole)), r"model\.safetensors is damaged.*fetch it again"),
    "no object": (lambda _: with_header(b"[1]"), r"model\.safetensors is damaged.*fetch it again"),
    "no shape": (lambda _: with_header(b'{"a": {}}'), r"model\.safetensors is damaged.*fetch it again"),
    "no numbers": (
        lambda _: with_header(b'{"a": {"shape": ["x"], "data_offsets": [0, "y"]}}'),
        r"model\.safetensors is damaged.*fetch it again",
    ),
    "cut short": (lambda whole: whole[:-10], r"model\.safetensors is damaged.*it has \d+ of \d+ bytes.*fetch it again"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_without_a_safetensors_header_is_a_setup_error(tmp_path: Path, fault: str) -> None:
    file = make_model(tmp_path) / "model.safetensors"
    damage, named = FAULTS[fault]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SetupError, match=named):
        read_header(file)


@pytest.mark.parametrize("fault", ["pointer", "empty", "cut short"])
async def test_every_reader_of_a_model_names_a_damaged_file(tmp_path: Path, fault: str) -> None:
    folder = make_model(tmp_path)
    file = folder / "model.safetensors"
    damage, named = FAULTS[fault]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SetupError, match=named):
        load_policy(make_config(folder))
    with pytest.raises(SetupError, match=named):
        await TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=64)).start()
    with pytest.raises(SetupError, match=named):
        await VllmEngine(EngineSettings(model=folder, device="cpu", max_model_len=64, max_num_seqs=2)).start()


async def test_damage_that_only_safetensors_notices_is_a_setup_error_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(wrong_type(file.read_bytes()))
    with pytest.raises(SetupError, match=f"model.path = '{folder}' holds no causal language model"):
        load_policy(make_config(folder))
    engine = TransformersEngine(EngineSettings(model=folder, device="cpu", max_model_len=64))
    with pytest.raises(SetupError, match=f"model.path = '{folder}' holds no causal language model"):
        await engine.start()
    await engine.close()
