"""A small random Qwen3 policy that chats: byte-level BPE tokenizer, ChatML template, tool calls as JSON.

Its special tokens are those of Qwen3, so that both the library's Qwen3 renderer and its default one, which follows the
folder's own template, can be used.  With demonstrations and steps it is trained on them, in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
IGNORED = -100
"""A label without a loss."""
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"

TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
{{- '# Tools\\n\\nYou may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nA call: <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first and tools %}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' if message.reasoning_content else '' }}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

TEXTS = (
    "system user assistant tool tools name arguments function description parameters properties required type",
    '{"type": "function", "function": {"name": "", "description": "", "parameters": {"type": "object", "properties": {',
    '{"name": "lookup", "arguments": {"relation": "capital", "name": "France"}}',
    "You may call one or more functions to assist with the user query. Call a tool, then answer in one word.",
    "What is the capital of the country where she was born? I do not know. The answer is Paris. yes no true false",
)
"""What the tokenizer's merges are learnt from."""


def chat_tokenizer(*, vocab_size: int = 512, texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Encodes every text; merges are learnt from ``TEXTS`` and ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, *texts], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    made.chat_template = TEMPLATE
    return made


def chat_policy(
    folder: Path,
    *,
    demonstrations: Sequence[Sequence[Mapping[str, Any]]] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    steps: int = 0,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    positions: int = 1024,
    vocab_size: int = 512,
) -> Path:
    """Writes an ordinary Hugging Face folder.

    Args:
        folder: where to.
        demonstrations: conversations in messages; the assistant's are learnt for ``steps``.
        tools: schemas that the conversations are rendered with.
        steps: 0 leaves the weights random.
        seed: of the weights and the order of the conversations.
        layers, width, positions, vocab_size: of the model.
    """
    texts = [str(message.get("content", "")) for messages in demonstrations for message in messages]
    tokenizer = chat_tokenizer(vocab_size=vocab_size, texts=texts)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    rows = [_example(tokenizer, messages, tools) for messages in demonstrations]
    _train(model, rows, steps=steps, pad=tokenizer.convert_tokens_to_ids(PAD))
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return folder


def _example(tokenizer: PreTrainedTokenizerFast, messages: Any, tools: Any) -> tuple[list[int], list[int]]:
    """(ids of a conversation, the labels: what is not the policy's own is not learnt)."""
    ids: list[int] = []
    labels: list[int] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for part, speaks in ((messages[:at], False), (messages[: at + 1], True)):
            text = tokenizer.apply_chat_template(
                list(part), tools=list(tools) or None, tokenize=False, add_generation_prompt=not speaks
            )
            text = text.removesuffix("\n") if speaks else text
            new = tokenizer.encode(text, add_special_tokens=False)[len(ids) :]
            ids += new
            labels += new if speaks else [IGNORED] * len(new)
    return ids, labels


def _train(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[int]]], *, steps: int, pad: int) -> None:
    optimizer, threads = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0), torch.get_num_threads()
    # Threads that wait for a core that others use make such small steps a hundred times slower.
    torch.set_num_threads(1)
    for _ in range(steps if rows else 0):
        chosen = [rows[int(i)] for i in torch.randint(len(rows), (8,))]
        longest = max(len(ids) for ids, _ in chosen)
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([known + [IGNORED] * (longest - len(known)) for _, known in chosen])
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
