"""The policy's tokenizer: byte-level BPE made of the task's own conversations, with Qwen3's tokens and chat template.

Names are single tokens, the same wherever they stand: a space before a capital belongs to the word before it.  Lines of
the system message never change and are one token each, so that a conversation stays short.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 1024
"""Tokens at most, those of whole lines left aside."""

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Tokens of Qwen3's tokenizer that are not special there either."""

PIECES = r"\p{Lu}\p{L}*| ?\p{Ll}+(?: (?=\p{Lu}))?|[^\p{L}]+(?= \p{Ll})|[^\p{L}]+"
"""What merges stay inside of: a capitalised word; another word with its spaces; all between two words."""

LONG_LINE = 20
"""Characters from which on a line of the system message is a token of its own."""

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
{{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def save_tokenizer(folder: Path, texts: Iterable[str], lines: Sequence[str] = ()) -> None:
    """Train a tokenizer and write it as an ordinary Hugging Face folder.  The same texts give the same tokenizer.

    Args:
        folder: takes the files.
        texts: to train on.
        lines: that are one token each.
    """
    from tokenizers import AddedToken

    fast = _trained(part for text in texts for part in _between_marks(text))

    fast.add_tokens([AddedToken(text, normalized=False, special=False) for text in (*MARKS, *lines)])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _trained(texts: Iterable[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=END_OF_TEXT, eos_token=END, clean_up_tokenization_spaces=False
    )


def long_lines(system_message: str) -> list[str]:
    """The lines of a system message that become tokens, in their order; a call's marks are tokens already."""
    found = (line for part in _between_marks(system_message) for line in re.findall(r"[^\n]+\n*", part))
    return list(dict.fromkeys(line for line in found if len(line) >= LONG_LINE))


def _between_marks(text: str) -> list[str]:
    """What merges never reach beyond."""
    return [part for part in re.split("|".join(map(re.escape, (START, END, *MARKS))), text) if part]
