"""A tokenizer with the special tokens of several model families, and actions as each family's models write them.

No tokenizer of a published model can be had without a network: this one has their tokens and merges of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from atpo_async.environments.messages import probes
from atpo_async.environments.messages.chat_format import ChatFormat
from atpo_async.environments.messages.types import Message
from tests.chat_policy import TEMPLATE, TEXTS

_QWEN = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>"),
    *(
        "</tool_response>",
        "<think>",
        "</think>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
)
_GLM = (
    *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>"),
)
_DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>"),
    *(
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁outputs▁begin｜>",
    ),
    *("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
_KIMI = (
    *("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|tool_calls_section_begin|>", "[EOS]"),
    *("<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
_LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    "<|python_tag|>",
)
_MINIMAX = ("]~!b[", "]~b]", "[e~[", "<minimax:tool_call>", "</minimax:tool_call>")
SPECIAL = (*_QWEN, *_GLM, *_DEEPSEEK, *_KIMI, *_LLAMA, *_MINIMAX)

FAMILIES = (
    *(
        "qwen3",
        "qwen3.5",
        "glm-4.5",
        "glm-5",
        "deepseek-v3",
        "kimi-k2",
        "minimax-m2",
        "nemotron-3",
        "llama-3",
        "default",
    ),
)
ONE_CALL = frozenset({"llama-3"})
"""Families whose models make one call at a time."""

OPENING = [probes.system("Be brief."), probes.user("What is the weather in Örebro?")]

TOOLS = probes.TOOLS


def families_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|begin_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def families_folder(folder: Path) -> Path:
    families_tokenizer().save_pretrained(folder)
    return folder


def written(chat: ChatFormat, before: Sequence[Message], answer: Message, after: Sequence[Message]) -> np.ndarray:
    """int32[T]: an answer as the family's models write it, up to the token that ends it.

    ``after`` is what follows it, if anything: in some families the first token of that ends the action.
    """
    opened = chat.render(before)
    whole = chat._renderer.render_ids([*before, answer, *after], tools=chat._shown, add_generation_prompt=False)
    assert whole[: len(opened)] == opened.tolist()
    ids = [*whole[len(opened) :], chat.stop_token_ids[0]]
    end = next(at for at, token in enumerate(ids) if token in chat.stop_token_ids)
    return np.array(ids[: end + 1], dtype=np.int32)


def split_finer(chat: ChatFormat, ids: np.ndarray) -> np.ndarray:
    """int32[T']: the same text in single characters, as a policy may sample it and no tokenizer would write it."""
    finer: list[int] = []
    for token in ids.tolist():
        text = chat.decode([token])
        alone = [int(i) for letter in text for i in chat.encode(letter)]
        # A token that is a part of a letter has no text of its own.
        finer += [token] if text in SPECIAL or "\ufffd" in text else alone
    return np.array(finer, dtype=np.int32)
