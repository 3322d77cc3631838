"""Attention over packed trees by FlashAttention's rows of many lengths: which rows are made, and that nothing changes.

The kernel itself is CUDA's (``test_gpu_compute``): here plain arithmetic of the same definition stands for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.packing import attention, lengths
from learner.packing.attention import to_device, tree_attention_forward
from learner.packing.attention_varlen import Runs, fits, kernel, kernel_backward, tree_attention
from learner.packing.rows import MicroBatch
from learner.packing.tree import tree_micro_batches
from tests.attention_support import CPU, flash_on_a_cpu, largest_difference
from tests.tree_support import FORESTS, VERSION, Sketch, forest, grow, rows_of


def packed(
    sketches: list[tuple[int, list[Sketch]]], *, max_tokens: int = 300, width: lengths.Width = lengths.exact
) -> list[MicroBatch]:
    return tree_micro_batches(
        rows_of(forest(sketches)), max_tokens=max_tokens, pack_tokens=None, version=VERSION, width=width
    )


def results(one: MicroBatch, way: attention.Way, groups: int) -> list[torch.Tensor]:
    """Output over made-up tensors where there is no padding, and their gradients."""
    assert one.layout is not None
    torch.manual_seed(0)
    rows, length = one.tokens.shape
    tensors = [torch.randn(rows, n, length, 8, dtype=torch.float64, requires_grad=True) for n in (2 * groups, 2, 2)]
    layout = to_device(one.layout, CPU, way=way)
    query, key, value = tensors
    out, _ = tree_attention_forward(torch.nn.Module(), query, key, value, None, scaling=0.3, tree_layout=layout)
    filled = one.layout.filled
    assert filled is not None
    real = torch.arange(length) < torch.from_numpy(filled)[:, None]
    # As in a model: no loss reads what comes out of padding.
    out = out[real]
    out.backward(torch.randn_like(out))
    return [out.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


@settings(max_examples=25)
@given(FORESTS, st.sampled_from([20, 300]), st.sampled_from([1, 2]), st.booleans())
def test_runs_are_the_dense_mask_with_its_gradients(
    sketches: list[tuple[int, list[Sketch]]], max_tokens: int, groups: int, padded: bool
) -> None:
    width = (lambda tokens: -(-tokens // 16) * 16) if padded else lengths.exact
    with pytest.MonkeyPatch.context() as patch:
        flash_on_a_cpu(patch.setattr)
        for one in packed(sketches, max_tokens=max_tokens, width=width):
            by_runs, by_mask = results(one, "varlen", groups), results(one, "dense", groups)
            assert len(by_runs) == len(by_mask) == 4
            assert largest_difference(by_runs, by_mask) < 1e-13


def test_there_is_a_run_for_each_leaf_and_its_keys_are_the_leafs_path() -> None:
    tree = grow("t", 9, [Sketch(0, 0, 4), *(Sketch(1, 3, 8) for _ in range(3)), Sketch(0, 0, 6)])
    rows = rows_of([tree])
    (one,) = tree_micro_batches(rows, max_tokens=1000, pack_tokens=None, version=VERSION)
    assert one.layout is not None
    runs = Runs.of(one.layout.exit, CPU, one.layout.filled)
    paths = np.split(runs.keys.numpy(), runs.first_key.numpy()[1:-1])
    tokens = one.tokens[0]
    found = sorted(tokens[path].tolist() for path in paths)
    assert found == sorted(row.tokens[:-1].tolist() for row in rows)
    assert int(runs.first_query[-1]) == one.tokens.size
    assert runs.longest_path >= max(len(path) for path in paths)


def test_padding_is_one_run_where_it_is_known_and_else_one_of_each_place() -> None:
    exits = np.array([[2, 2, 3, 4, 5], [5, 5, 5, 5, 5]])
    known = Runs.of(exits, CPU, np.array([2, 5]))
    assert known.first_query.tolist() == [0, 2, 5, 10]
    assert known.keys.tolist() == list(range(10))
    assert Runs.of(exits, CPU).first_query.tolist() == [0, 2, 3, 4, 5, 10]


def test_what_the_kernel_does_not_take_is_known() -> None:
    def tensor(channels: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 1, 1, channels, dtype=dtype)

    half = tensor(64, torch.bfloat16)
    assert fits(half, half)
    assert fits(tensor(64, torch.float16), tensor(64, torch.float16))
    for other in (tensor(64, torch.float32), tensor(12, torch.bfloat16), tensor(264, torch.bfloat16)):
        assert not fits(other, other)
    assert not fits(half, tensor(32, torch.bfloat16))


def test_half_precision_on_a_new_gpu_is_for_the_kernel_and_all_else_for_flex_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for capability, expected in (((9, 0), ["varlen", "flex"]), ((7, 5), ["flex"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert attention.ways(device, torch.bfloat16) == expected
        assert attention.ways(device, torch.float16) == expected
        assert attention.ways(device, torch.float32) == ["flex"]


def test_the_operator_is_what_a_compiler_takes_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_on_a_cpu(monkeypatch.setattr)
    (one,) = packed([(5, [Sketch(0, 0, 4), Sketch(1, 2, 3), Sketch(1, 2, 3)])])
    assert one.layout is not None
    runs = Runs.of(one.layout.exit, CPU)
    query, key, value = (torch.randn(one.tokens.size, n, 8, requires_grad=True) for n in (4, 2, 2))
    torch.library.opcheck(
        torch.ops.atpo.tree_attention,
        (query, key, value, runs.first_query, runs.first_key, runs.keys, runs.longest_run, runs.longest_path, 0.3),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_pytorchs_own_operators_take_what_the_kernels_are_given() -> None:
    (one,) = packed([(5, [Sketch(0, 0, 4), Sketch(1, 2, 3), Sketch(1, 2, 3)])])
    assert one.layout is not None
    meta = torch.device("meta")  # forms of results without their numbers
    runs = Runs.of(one.layout.exit, meta)
    query, key, value = (torch.empty(one.tokens.size, n, 64, dtype=torch.bfloat16, device=meta) for n in (4, 2, 2))
    rest: tuple[Any, ...] = (runs.first_query, runs.first_key, runs.longest_run, runs.longest_path, 0.3)
    found = kernel(query, key[runs.keys], value[runs.keys], *rest)
    grads = kernel_backward(found[0], query, key[runs.keys], value[runs.keys], *found, *rest)
    assert [x.shape for x in grads] == [query.shape, key[runs.keys].shape, value[runs.keys].shape]
    announced = tree_attention(query, key, value, *rest[:2], runs.keys, *rest[2:])
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in announced]


def test_results_lie_as_they_are_announced_whatever_the_strides_of_the_queries() -> None:
    query = torch.empty(4, 9, 64, device="meta").transpose(0, 1)
    lengths_of = torch.empty(2, dtype=torch.int32, device="meta")
    keys = torch.empty(9, dtype=torch.int64, device="meta")
    assert tree_attention(query, query, query, lengths_of, lengths_of, keys, 256, 256, 0.3)[0].is_contiguous()


# --- widths


@pytest.mark.parametrize("limit", [16384, 4096, 1000])
def test_few_widths_waste_little_and_never_cross_the_limit(limit: int) -> None:
    width = lengths.few(limit)
    for tokens in range(1, limit + 1, 7):
        found = width(tokens)
        assert tokens <= found <= limit
        assert found == limit or found % lengths.BLOCK == 0
        assert found - tokens < max(lengths.BLOCK, tokens / lengths.STEPS)
    wide = {width(tokens) for tokens in range(limit // 2 + 1, limit + 1)}
    assert len(wide) <= lengths.STEPS
    # One path may be longer than a pass: it is padded too.
    assert width(limit + 1) % lengths.BLOCK == 0
    assert limit < width(limit + 1) <= 1.3 * limit


def test_aligned_widths_are_the_next_multiple_within_the_limit() -> None:
    width = lengths.aligned(1000)
    assert [width(tokens) for tokens in (1, 64, 65, 960, 961, 1000, 1001)] == [64, 64, 128, 960, 1000, 1000, 1024]


@settings(max_examples=30)
@given(FORESTS, st.sampled_from([20, 90]))
def test_padded_passes_hold_what_they_hold_without(sketches: list[tuple[int, list[Sketch]]], max_tokens: int) -> None:
    def width(tokens: int) -> int:
        return max(tokens, min(-(-tokens // 16) * 16, max_tokens))

    for one in packed(sketches, max_tokens=max_tokens, width=width):
        assert one.layout is not None
        rows, length = one.tokens.shape
        assert length == width(length)
        assert rows == 1 or rows * length <= max_tokens
        assert one.layout.filled is not None
        real = np.arange(length) < one.layout.filled[:, None]
        assert real.reshape(-1)[one.predictor].all()
        assert (one.layout.exit[~real] == np.broadcast_to(np.arange(1, length + 1), real.shape)[~real]).all()
