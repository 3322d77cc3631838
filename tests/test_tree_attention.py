"""Attention over packed trees: each way to compute it gives the numbers of the dense mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from learner.packing import attention, attention_parts
from learner.packing.attention import DeviceLayout, Way, to_device, tree_attention_forward
from learner.packing.attention_flex import block_mask
from learner.packing.attention_parts import Parts
from learner.packing.rows import TreeLayout
from learner.packing.tree import tree_micro_batches
from tests.attention_support import CPU, WAYS, cheap_calls, largest_difference
from tests.tree_support import FORESTS, VERSION, Sketch, forest, grow, rows_of


class Layer(nn.Module):
    """As much of an attention layer as the attention function looks at."""

    is_causal = True
    num_key_value_groups = 1


def attend(tensors: Sequence[Tensor], layout: DeviceLayout | None, **kwargs: Any) -> Tensor:
    query, key, value = tensors
    return tree_attention_forward(Layer(), query, key, value, None, tree_layout=layout, **kwargs)[0]


def layout_of(exits: Sequence[Sequence[int]], depths: Sequence[Sequence[int]] | None = None) -> TreeLayout:
    exit_ = np.array(exits, dtype=np.int64)
    return TreeLayout(position_ids=np.zeros_like(exit_) if depths is None else np.array(depths), exit=exit_)


def results(layout: DeviceLayout | None, size: tuple[int, int], *, heads: int = 3, groups: int = 1) -> list[Tensor]:
    """Output of attention over made-up tensors, and the gradients of these."""
    torch.manual_seed(0)
    rows, length = size
    tensors = [
        torch.randn(rows, n, length, 8, dtype=torch.float64, requires_grad=True) for n in (heads * groups, heads, heads)
    ]
    out = attend(tensors, layout, scaling=0.3)
    out.backward(torch.randn_like(out))
    grads = [t.grad for t in tensors]
    assert all(g is not None for g in grads)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if calls cost nothing, so that even small trees are cut into many parts."""
    cheap_calls(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def forget_costs() -> Any:
    yield
    attention_parts._chain_cost.cache_clear()


@settings(max_examples=60)
@given(FORESTS, st.sampled_from([20, 300]), st.sampled_from([None, 30]), st.booleans(), st.sampled_from([1, 2]))
def test_parts_are_the_dense_mask_with_its_gradients(
    sketches: list[tuple[int, list[Sketch]]], max_tokens: int, pack_tokens: int | None, cut: bool, groups: int
) -> None:
    packed = tree_micro_batches(
        rows_of(forest(sketches)), max_tokens=max_tokens, pack_tokens=pack_tokens, version=VERSION
    )
    with pytest.MonkeyPatch.context() as patch:
        if cut:
            cheap_calls(patch.setattr)
        for one in packed:
            assert one.layout is not None
            size = (one.tokens.shape[0], one.tokens.shape[1])
            by_parts, by_mask = (results(to_device(one.layout, CPU, way=way), size, groups=groups) for way in WAYS)
            assert largest_difference(by_parts, by_mask) < 1e-13
    attention_parts._chain_cost.cache_clear()


def test_parts_leave_out_what_the_mask_hides(small_parts: None) -> None:
    tree = grow("t", 9, [Sketch(0, 0, 4), *(Sketch(1, 3, 8) for _ in range(3)), Sketch(0, 0, 6)])
    (packed,) = tree_micro_batches(rows_of([tree]), max_tokens=1000, pack_tokens=None, version=VERSION)
    assert packed.layout is not None
    parts = Parts.of(packed.layout.exit, CPU)
    seen = np.zeros((packed.tokens.size, packed.tokens.size), dtype=int)
    for first, stop, key_first, key_stop in parts.rectangles:
        seen[first:stop, key_first:key_stop] += 1
    for bucket in parts.buckets:
        (n, t), take, put = bucket.size, bucket.take.reshape(bucket.size), bucket.put.reshape(bucket.size)
        for i in range(n):
            real = put[i] < packed.tokens.size
            block = (~bucket.hidden[i, 0])[real][:, real].numpy()
            places = take[i][real].numpy()
            assert len(places) <= t
            seen[np.ix_(places, places)] += block
    assert (seen == to_device(packed.layout, CPU, way="dense").mask()[0, 0].numpy()).all()
    assert len(parts.rectangles) > 4


@pytest.mark.parametrize("length", [1, 31, 33, 700])
def test_a_chain_is_causal_attention(length: int) -> None:
    layout = to_device(layout_of([[length] * length]), CPU, way="parts")
    assert layout.parts is not None
    assert bool(layout.parts.rectangles) == (length > 512)
    assert largest_difference(results(layout, (1, length)), results(None, (1, length))) < 1e-13


def test_a_long_prompt_with_many_leaves_holds_no_mask_of_its_square() -> None:
    prompt, leaves, size = 1500, 6, 200
    exits = [prompt + leaves * size] * prompt
    for i in range(leaves):
        exits += [prompt + (i + 1) * size] * size
    layout = to_device(layout_of([exits]), CPU)
    assert layout.parts is not None
    held = sum(bucket.hidden.numel() for bucket in layout.parts.buckets)
    assert held <= len(exits) * attention_parts.LONGEST_BLOCK
    assert held < len(exits) ** 2 / 10
    # Pairs that are computed: half a square for each block along the diagonal, no more.
    pairs = held + sum((b - a) * (d - c) for a, b, c, d in layout.parts.rectangles)
    needed = prompt**2 / 2 + leaves * (size * prompt + size**2 / 2)
    assert pairs < 1.1 * needed


def test_padding_sees_itself_and_nobody_sees_it() -> None:
    exits = [[5, 5, 4, 4, 5], [3, 3, 3, 4, 5]]
    mask = to_device(layout_of(exits), CPU, way="dense").mask()
    assert mask.shape == (2, 1, 5, 5)
    assert mask.any(-1).all()
    assert mask[1, 0].tolist() == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [False, False, False, True, False],
        [False, False, False, False, True],
    ]
    for way in WAYS:
        out = results(to_device(layout_of(exits), CPU, way=way), (2, 5))
        assert all(torch.isfinite(x).all() for x in out)


@pytest.mark.parametrize("length", [40, 64, 65])
def test_the_block_mask_of_flex_attention_is_the_dense_mask(length: int) -> None:
    rng = np.random.default_rng(length)
    exits = np.stack([random_exits(rng, length) for _ in range(3)])
    layout = to_device(layout_of(exits.tolist()), CPU, way="dense")
    size = 8
    squares = block_mask(layout.exit, size=size)
    assert (squares.shape[-2], squares.shape[-1]) == (length, length)
    place = torch.arange(length)
    count = -(-length // size)
    dense = torch.zeros((3, count * size, count * size), dtype=torch.bool)
    for b in range(3):
        for i in range(count):
            q = place[i * size : (i + 1) * size]
            for how_many, which, full in (
                (squares.kv_num_blocks, squares.kv_indices, False),
                (squares.full_kv_num_blocks, squares.full_kv_indices, True),
            ):
                assert how_many is not None
                assert which is not None
                for j in which[b, 0, i, : int(how_many[b, 0, i])].tolist():
                    k = place[j * size : (j + 1) * size]
                    assert not dense[b, i * size, j * size]
                    inside = squares.mask_mod(torch.tensor(b), torch.tensor(0), q[:, None], k[None, :])
                    assert isinstance(inside, Tensor)
                    assert inside.all() or not full
                    dense[b, i * size : i * size + len(q), j * size : j * size + len(k)] = inside
    assert torch.equal(dense[:, :length, :length], layout.mask()[:, 0])
    assert squares.full_kv_num_blocks is not None
    assert (squares.full_kv_num_blocks > 0).any()


def random_exits(rng: np.random.Generator, length: int) -> np.ndarray:
    """Exits of nested subtrees over a row, some trees one after the other."""
    exits = np.zeros(length, dtype=np.int64)

    def fill(begin: int, end: int) -> None:
        while begin < end:
            stop = int(rng.integers(begin + 1, end + 1))
            chain = int(rng.integers(begin + 1, stop + 1))
            exits[begin:chain] = stop
            fill(chain, stop)
            begin = stop

    fill(0, length // 2)
    exits[length // 2 :] = length
    return exits


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_what_the_dense_mask_gives() -> None:
    # On a CPU it has no backward pass; the GPU's own test has that.
    torch.manual_seed(0)
    exits = np.stack([random_exits(np.random.default_rng(i), 150) for i in range(2)])
    layout = to_device(layout_of(exits.tolist()), CPU, way="dense")
    query, key, value = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 16)
    with torch.no_grad():
        flex = flex_attention(query, key, value, block_mask=layout.block_mask(), scale=0.2, enable_gqa=True)
        dense = attend((query, key, value), layout, scaling=0.2)
    assert isinstance(flex, Tensor)
    assert float((flex.transpose(1, 2) - dense).abs().max()) < 1e-5


def test_what_flex_attention_has_no_kernel_for_takes_the_dense_mask() -> None:
    exits = [random_exits(np.random.default_rng(0), 30).tolist()]
    found = [results(to_device(layout_of(exits), CPU, way=way), (1, 30)) for way in ("flex", "dense")]
    assert largest_difference(*found) == 0


def test_each_device_has_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.ways(CPU)[0] == "parts"
    for triton, way in ((True, "flex"), (False, "dense")):
        monkeypatch.setattr(attention, "has_triton", lambda triton=triton: triton)
        assert attention.ways(torch.device("cuda"))[0] == way


def test_without_a_layout_it_is_causal_attention_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(kwargs)
        return scaled_dot_product_attention(*args, **kwargs)

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 8) for _ in range(3))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    out = attend((query, key, value), None, scaling=0.3)
    assert [(call["attn_mask"], call["is_causal"]) for call in asked] == [(None, True)]
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)
    assert torch.equal(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"sliding_window": 3}, "a sliding window of 3 tokens in a tree 5 deep"),
        ({"dropout": 0.1}, "dropout over packed trees"),
        ({"s_aux": torch.zeros(3)}, "s_aux over packed trees"),
        ({"position_bias": torch.zeros(3)}, "position_bias over packed trees"),
    ],
)
def test_what_a_packed_tree_cannot_have_is_refused(kwargs: dict[str, Any], named: str) -> None:
    layout = to_device(layout_of([[5] * 5], [[0, 1, 2, 3, 4]]), CPU)
    tensors = [torch.randn(1, 3, 5, 8) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=named):
        attend(tensors, layout, **kwargs)


def test_a_sliding_window_longer_than_the_tree_changes_nothing() -> None:
    layout = to_device(layout_of([[5] * 5], [[0, 1, 2, 3, 4]]), CPU)
    tensors = [torch.randn(1, 3, 5, 8) for _ in range(3)]
    assert torch.equal(attend(tensors, layout, sliding_window=5), attend(tensors, layout))


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_as_near_as_it_can_be(way: Way, small_parts: None) -> None:
    (packed,) = tree_micro_batches(
        rows_of([grow("t", 9, [Sketch(0, 0, 9), *(Sketch(1, 3, 8) for _ in range(3))])]),
        max_tokens=1000, pack_tokens=None, version=VERSION,
    )  # fmt: skip
    assert packed.layout is not None
    layout = to_device(packed.layout, CPU, way=way)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, packed.tokens.size, 8) for _ in range(3)]
    exact = attend(tensors, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = attend(tensors, layout)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().max()) < 0.03
