"""The learner's benchmark: which kind of work a kernel is, by names as profilers, Inductor and Liger give them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._autograd import DeviceType

from benchmarks.learner_parts.kernels import KINDS, ORDER, OTHER, by_kind, kind_of
from benchmarks.learner_parts.profile import of_device, seconds_by_kernel

NAMES = {
    "matrix products": (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(T1::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>",
        "triton_tem_fused_mm_4",
        "aten::addmm",
    ),
    "attention, forward": (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false>>",
        "triton_tem_fused_flex_attention_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1_kernel0_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    "attention, backward": (
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, 64, 64>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<128, 64, 64>>",
        "triton_tem_fused_flex_attention_backward_3",
        "triton_red_fused_flex_attention_backward_sum_2",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x128x128_4x1x1_kernel0_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "norms": (
        "_rms_norm_forward_kernel",
        "_rms_norm_backward_kernel",
        "_block_rms_norm_forward_kernel",
        "_fused_add_rms_norm_backward_kernel",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3",
        "triton_per_fused__fused_rms_norm_view_1",
    ),
    "rotary embedding": (
        "_triton_rope",
        "triton_poi_fused__to_copy_cos_mul_2",
        "triton_poi_fused_add_cat_mul_neg_slice_unsqueeze_5",
        "void at::native::vectorized_elementwise_kernel<4, at::native::cos_kernel_cuda(at::TensorIteratorBase&)>",
    ),
    "activation": (
        "_swiglu_forward_kernel",
        "_swiglu_backward_kernel_tiled",
        "triton_poi_fused_mul_silu_7",
        "triton_poi_fused_mul_sigmoid_backward_silu_8",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel>",
    ),
    "log-softmax and head": (
        "liger_cross_entropy_kernel",
        "element_mul_kernel",
        "_selective_log_softmax_kernel",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, LogSoftMaxForwardEpilogue>",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
        "triton_red_fused__log_softmax_9",
        "triton_red_fused__to_copy_amax_exp_log_sub_sum_0",
        "triton_poi_fused__to_copy_exp_mul_neg_sub_0",
        "triton_red_fused__to_copy_logsumexp_prepare_softmax_online_1",
    ),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor>>",
        "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl<CUDAFunctor_add<float>>>",
        "triton_poi_fused__to_copy_add_mul_1",
        "aten::mul",
    ),
    "copies and casts": (
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<BFloat16, unsigned int, 3>",
        "void at::native::indexSelectLargeIndex<float, long, unsigned int, 2, 2, -2, true>",
        "Memcpy DtoH (Device -> Pinned)",
        "triton_poi_fused__to_copy_0",
        "triton_poi_fused_clone_transpose_3",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float>>",
        "aten::copy_",
    ),
    "reductions": (
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float>>>",
        "triton_red_fused_sum_4",
        "aten::sum",
    ),
    "optimizer and clipping": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, "
        "FusedAdamMathFunctor<float, 4>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor>",
        "Optimizer.step: triton_poi_fused_add_div_mul_sqrt_0",
        "aten::_fused_adamw_",
    ),
    "memory set": (
        "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "aten::fill_",
    ),
    "communication": (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    ),
    OTHER: ("some_kernel_of_ones_own",),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_kernel_is_known_by_its_name(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_every_kind_has_a_place_in_the_table_and_a_name_that_is_of_it() -> None:
    assert {kind for kind, _ in KINDS} | {OTHER} == set(ORDER) == set(NAMES)


def test_seconds_add_up_by_kind_in_the_order_of_the_table() -> None:
    found = by_kind({"Memset (Device)": 1.0, "nvjet_tst": 2.0, "_triton_rope": 0.5, "aten::mm": 3.0, "x": 0.0})
    assert found == {"matrix products": 5.0, "rotary embedding": 0.5, "memory set": 1.0}
    assert list(found) == ["matrix products", "rotary embedding", "memory set"]


def test_the_operators_of_a_step_on_the_cpu_are_profiled_and_known() -> None:
    layer = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)

    def step() -> None:
        nn.functional.silu(layer(torch.ones(32, 64))).log_softmax(-1).sum().backward()
        optimizer.step()

    found = by_kind(seconds_by_kernel(step, "cpu"))
    expected = {"matrix products", "activation", "log-softmax and head", "optimizer and clipping", "reductions"}
    assert expected <= set(found)
    assert all(seconds > 0 for seconds in found.values())


def event(name: str, start: float, end: float, *, annotation: bool = False, kind: Any = DeviceType.CUDA) -> Any:
    return SimpleNamespace(
        name=name, device_type=kind, is_user_annotation=annotation,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
    )  # fmt: skip


def test_kernels_of_the_optimizer_are_those_in_its_range_and_ranges_are_no_kernels() -> None:
    found = of_device(
        [
            event("triton_poi_fused_add_0", 0, 10),
            event("Optimizer.step#AdamW8bit.step", 10, 30, annotation=True),
            event("triton_poi_fused_add_0", 12, 17),
            event("triton_poi_fused_add_0", 30, 31),
            event("a range", 0, 40, annotation=True),
            event("aten::add", 0, 40, kind=DeviceType.CPU),
        ]
    )
    assert found == {
        "triton_poi_fused_add_0": pytest.approx(11e-6),
        "Optimizer.step: triton_poi_fused_add_0": pytest.approx(5e-6),
    }
