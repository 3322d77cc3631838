"""What a learner has compiled: few graphs however many layouts come, counted, with a word where there is no end."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from learner.kernels import vocabulary
from learner.kernels.variants import VARIANTS, raise_limit
from learner.kernels.vocabulary import Scoring, Wanted
from learner.packing import attention_flex, lengths
from learner.packing.attention import to_device
from learner.packing.rows import TreeLayout
from learner.policy import compilation
from learner.policy.compilation import Compilations, num_graphs
from tests.attention_support import CPU


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Tensor]]:
    """FlexAttention over a random layout of so many places, traced as for CUDA, without code generated for it."""

    @functools.cache
    def traced(any_length: bool) -> Any:
        return torch.compile(flex_attention, dynamic=any_length, backend="eager")

    monkeypatch.setattr(attention_flex, "_compiled", traced)
    monkeypatch.setattr(attention_flex, "SMALL_MODEL", 0)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    attention_flex._shapes.cache_clear()
    torch._dynamo.reset()
    raise_limit()

    def attend(length: int, seed: int) -> Tensor:
        fork = 1 + int(np.random.default_rng(seed).integers(0, length - 1))
        exits = np.full((1, length), length)
        exits[:, fork:] = np.arange(fork + 1, length + 1)
        layout = to_device(TreeLayout(position_ids=np.zeros_like(exits), exit=exits), CPU, way="flex")
        torch.manual_seed(seed)
        query, key, value = (torch.randn(1, n, length, 16) for n in (4, 2, 2))
        with torch.no_grad():
            found = attention_flex.attend(query, key, value, layout.block_mask(), 0.2)
            mask = layout.mask()
            dense = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=0.2, enable_gqa=True
            )
        assert float((found - dense).abs().max()) < 1e-5
        return found

    yield attend
    attention_flex._shapes.cache_clear()
    torch._dynamo.reset()


def test_another_layout_of_the_same_shape_compiles_nothing(flex: Callable[[int, int], Tensor]) -> None:
    before = num_graphs()
    for seed in range(4):
        flex(256, seed)
    assert num_graphs() == before + 1


def test_thirty_batches_of_any_lengths_compile_a_handful_of_times(flex: Callable[[int, int], Tensor]) -> None:
    rng = np.random.default_rng(0)
    width = lengths.few(512)
    before = num_graphs()
    for seed in range(30):
        flex(width(int(rng.integers(100, 512))), seed)
    assert num_graphs() - before <= 4


def test_more_shapes_than_have_a_kernel_of_their_own_share_one(
    flex: Callable[[int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_flex, "MOST_SHAPES", 2)
    before = num_graphs()
    for seed, length in enumerate((384, 512)):
        flex(length, seed)
    assert num_graphs() == before + 2
    for seed, length in enumerate((640, 768)):
        flex(length, seed)
    assert num_graphs() == before + 3
    flex(384, 9)
    assert num_graphs() == before + 3


def test_a_small_model_has_one_kernel_for_any_length(
    flex: Callable[[int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_flex, "SMALL_MODEL", 512)
    before = num_graphs()
    for seed, length in enumerate((384, 512, 640)):
        flex(length, seed)
    assert num_graphs() == before + 1


@pytest.mark.parametrize("what", ["attention", "head"])
def test_as_many_variants_are_kept_in_the_thread_of_a_backward_pass(
    what: str, flex: Callable[[int, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def compiled(*_: Any, **__: Any) -> Any:
        limits.append(torch._dynamo.config.recompile_limit)
        return lambda *arguments, **__: arguments[0]

    monkeypatch.setattr(attention_flex, "_compiled", compiled)
    monkeypatch.setattr(vocabulary, "_compiled", compiled)
    scoring = Scoring(scale=1.0, wanted=Wanted(), compiled=True)
    query = torch.zeros(1, 2, 8, 16)
    layout = TreeLayout(position_ids=np.zeros((1, 8), dtype=np.int64), exit=np.full((1, 8), 8))
    mask = to_device(layout, CPU, way="flex").block_mask()
    calls: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention_flex.attend(query, query, query, mask, None),
        "head": lambda: scoring.run(lambda logits: logits, torch.zeros(3, 5)),
    }
    # On CUDA such passes run in threads that autograd has made, and torch's settings can be each thread's own.
    thread = threading.Thread(target=calls[what])
    thread.start()
    thread.join()
    assert limits == [VARIANTS]


def test_graphs_that_still_come_after_the_first_batches_are_told_with_their_shapes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = 100
    monkeypatch.setattr(compilation, "num_graphs", lambda: graphs)
    counted = Compilations(begun_with=100)
    with caplog.at_level(logging.WARNING):
        for batch in range(compilation.FIRST_BATCHES):
            graphs += 1
            counted.after_batch([(1, 64 * (batch + 1))])
        counted.after_batch([(1, 64), (1, 640)])
    assert not caplog.records
    graphs += 2
    counted.after_batch([(1, 64), (3, 704)])
    assert counted.total == compilation.FIRST_BATCHES + 2
    (record,) = caplog.records
    assert "had 2 more graphs compiled (7 in all)" in record.getMessage()
    assert record.getMessage().endswith("came for the first time: 3 x 704")
