"""To which kind of work a kernel belongs, by its name.

Known are names of CUDA's libraries, of torch's own kernels, of Inductor's, of Liger-Kernel's, and a CPU's operators.

Names of Inductor say what was fused (``triton_red_fused__to_copy_mean_mul_pow_rsqrt_3``): the rarest part decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

KINDS: tuple[tuple[str, str], ...] = (
    ("optimizer and clipping", r"^optimizer\.|adam"),
    ("communication", r"nccl|c10d::|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention, backward", r"flex_attention_backward|flash_bwd|attention\w*backward|treeattentionbackward|fmha\w*"
                            r"(bwd|backward|dgrad)|sdpa\w*b(prop|wd)|triton_tem_fused_zeros"),
    ("attention, forward", r"flex_attention|flash_fwd|flash_attention|fmha|scaled_dot_product|sdpa|treeattention"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|triton_tem_fused\w*mm|matmul"
                        r"|aten::(mm|addmm|bmm|baddbmm|linear|_?mkldnn\w*|mkl\w*)$|mkldnn_|onednn"),
    ("log-softmax and head", r"log_?softmax|softmax|cross_?entropy|nll_loss|logsumexp|element_mul_kernel"
                             r"|fused_(\w*_)?(exp|amax)(_|$)"),
    ("norms", r"(rms|layer|group)_?norm|fused_\w*(mean\w*rsqrt|pow\w*rsqrt|rsqrt\w*mean|rsqrt\w*pow)"),
    ("rotary embedding", r"rope|rotary|(cos|sin)_kernel|fused_\w*_(cos|sin)(_|$)|fused_\w*(cat\w*_neg|neg\w*_cat)(_|$)"
                         r"|aten::(cos|sin)$"),
    ("activation", r"silu|swiglu|geglu|gelu|sigmoid|relu"),
    ("copies and casts", r"copy|memcpy|catarray|clone|contiguous|embedding|index|gather|scatter|transpose|aten::cat$"
                         r"|aten::(slice|select|view|reshape|expand|permute|as_strided|unsqueeze|narrow|resolve|split)"),
    ("optimizer and clipping", r"multi_tensor_apply|aten::_foreach_|aten::_fused_|lpnorm|clip_grad"),
    ("memory set", r"memset|fill_?functor|aten::(fill_|zero_|zeros|zeros_like|ones|full|empty\w*|new_\w+)$"),
    ("reductions", r"reduce|triton_(red|per)_|aten::(sum|mean|norm|amax|max|min|argmax|any|all|var|cumsum|prod)$|scan"),
    ("elementwise", r"elementwise|triton_poi|aten::(mul|add|sub|div|neg|exp|log|pow|rsqrt|sqrt|where|clamp|minimum"
                    r"|maximum|masked_fill|rsub|abs|eq|ne|lt|gt|le|ge|bitwise_\w+|logical_\w+|is\w+)_?$"),
)  # fmt: skip
"""(kind, what its kernels' names hold), the first that fits."""
OTHER = "other"
ORDER = (
    *("matrix products", "attention, forward", "attention, backward", "norms", "rotary embedding", "activation"),
    *("log-softmax and head", "elementwise", "copies and casts", "reductions", "optimizer and clipping"),
    *("memory set", "communication", OTHER),
)
"""In which tables list them."""

_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in KINDS)
_FUSED = re.compile(r"^triton_[a-z]+_fused_(.*?)(_\d+)*$")
_MOVES = {"", "to", "copy", "clone", "view", "transpose", "permute", "slice", "unsqueeze", "expand", "t", "cat",
          "select", "embedding", "index", "gather"}  # fmt: skip
"""Parts of an Inductor name that compute nothing."""


def kind_of(name: str) -> str:
    """The kind of a kernel or operator."""
    lower = name.lower()
    fused = _FUSED.match(lower)
    for kind, pattern in _PATTERNS:
        if pattern.search(lower):
            if kind == "copies and casts" and fused and not set(fused[1].split("_")) <= _MOVES:
                continue  # it moves, and computes as well
            return kind
    return OTHER


def by_kind(seconds: Mapping[str, float]) -> dict[str, float]:
    """Name -> seconds becomes kind -> seconds, in the order of ``ORDER``; kinds without any are left out."""
    found = dict.fromkeys(ORDER, 0.0)
    for name, took in seconds.items():
        found[kind_of(name)] += took
    return {kind: took for kind, took in found.items() if took > 0}
