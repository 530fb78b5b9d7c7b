"""Kernel names as profilers print them, by class."""

from __future__ import annotations

import pytest

from perf.analysis.kernel_classes import kernel_class
from perf.report.palette import KERNEL_CLASSES

NAMES = {
    "conv": (
        "sm80_xmma_fprop_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_warpsize2x2x1",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64_warpgroupsize2x1x1_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128_32x4_nhwc_align8>(Params)",
        "cutlass_80_tensorop_s1688fprop_optimized_tf32_128x128_16x4_nhwc",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(cudnn::winograd_nonfused::Params)",
        "volta_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1",
        "ampere_scudnn_128x64_relu_interior_nn_v1",
        "turing_fp16_s1688cudnn_fp16_128x128_ldg8_relu_f2f_exp_interior_nhwc_tn_v1",
        "volta_fp16_s884cudnn_fp16_256x64_ldg8_relu_f2f_exp_small_nhwc2nchw_tn_v1",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>(int, int, int)",
        "void precomputed_convolve_sgemm<float, 512, 5, 5, 3, 3, 3, 1, false>(int, int, int)",
        "void cudnn::cnn::conv2d_grouped_direct_kernel<float, float, float, float, float, true>(cudnnTensorStruct)",
        "cudnn::cnn::kern_precompute_indices(int*, int, int, int, int, int)",
        "void at::native::im2col_kernel<float>(long, float const*, long, long)",
        "void fft2d_r2c_32x32<float, false, 1u, false>(float2*, float const*, int)",
        "triton_tem_fused_convolution_3",
        "triton_tem_fused__to_copy_convolution_3",
        "triton_tem_fused__unsafe_index_clone_convolution_silu_8",
        "aten::mkldnn_convolution",
        "aten::cudnn_convolution",
        "aten::conv2d",
    ),
    "gemm": (
        "ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_32x6_nn",
        "ampere_sgemm_128x64_tn",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "volta_h884gemm_256x128_ldg8_nn",
        "turing_fp16_s1688gemm_fp16_256x128_ldg8_f2f_tn",
        "void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_128x256_16x3_nt_align4>(cutlass_80_tensorop_s1688gemm::Params)",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16_16x16_128x2_tn_align8>(Params)",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off__5x_cublas",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, cutlass::gemm::"
        "collective::CollectiveMma<cutlass::gemm::MainloopSm90TmaGmmaWarpSpecialized, cute::Copy_Atom<cute::SM75_U32x4_LDSM_N>",
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __half, __half, float, __half, true, false, false>(Params)",
        "void splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(cublasSplitKParams<float>)",
        "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>(cublasGemvParams)",
        "void gemvNSP_kernel<float, float, float, float, 1, 32, 4, 1024>(cublasGemvParamsEx)",
        "triton_tem_fused_addmm_silu_12",
        "triton_tem_fused_mm_7",
        "triton_tem_fused__to_copy_add_addmm_native_layer_norm_view_21",
        "triton_tem_fused_addmm_gelu_mul_split_t_view_9",
        "triton_tem_fused__scaled_dot_product_flash_attention_addmm_t_transpose_view_4",
        "aten::addmm",
        "aten::bmm",
        "aten::_int_mm",
        "aten::_scaled_mm",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::"
        "half_t>, false, false, false, false, true, true, false>(pytorch_flash::Flash_fwd_params)",
        "void pytorch_flash::flash_fwd_splitkv_combine_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 64, 256, 4>>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90>>>",
        "fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::half_t>::Params)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128_4x1x1_cga1x1x1_kernel0_0",
        "void (anonymous namespace)::softmax_warp_forward<c10::Half, c10::Half, float, 7, false, false>(c10::Half*)",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForwardSmem<8, float, float, float>(float*, float const*)",
        "triton_per_fused__softmax_mul_5",
        "triton_red_fused__softmax__to_copy_mul_9",
        "triton_tem_fused_flex_attention_0",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_softmax",
    ),
    "norm": (
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float, float const*)",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float, float const*)",
        "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<c10::Half>(long, long, long)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::(anonymous namespace)::"
        "GroupNormKernelImplInternal<c10::Half>(at::Tensor const&)::{lambda(c10::Half, float, float)#1}>>(int)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::WelfordOps<float, float, int>>>",
        "triton_red_fused_native_group_norm_silu_3",
        "triton_per_fused__to_copy_add_native_layer_norm_17",
        "triton_red_fused_convolution_native_group_norm_2",
        "triton_per_fused__scaled_dot_product_flash_attention_add_native_layer_norm_view_21",
        "cpp_fused_native_group_norm_silu_3",
        "aten::native_group_norm",
    ),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>, std::array<char*, 3ul>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::silu_kernel(at::Tensor&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>(int)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<c10::Half, "
        "c10::Half, c10::Half, at::native::binary_internal::MulFunctor<float>>>>",
        "void (anonymous namespace)::elementwise_kernel_with_index<int, at::native::arange_cuda_out(c10::Scalar const&)>",
        "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4, at::native::templates::"
        "cuda::normal_and_transform<float, float, at::CUDAGeneratorImpl*>>",
        "void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::Half>(c10::Half const*)",
        "triton_poi_fused_add_7",
        "triton_poi_fused_convolution_silu_5",
        "triton_poi_fused__scaled_dot_product_flash_attention_add_view_6",
        "triton_poi_fused__to_copy_add_mul_3",
        "triton_poi_fused_gelu_mul_split_8",
        "cpp_fused_add_mul_2",
        "aten::silu",
        "aten::normal_",
        "aten::mul",
    ),
    "copy": (
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy HtoD (Pageable -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>(Params)",
        "void cudnn::engines_precompiled::nhwcToNchwKernel<__half, __half, float, true, false>(Params)",
        "void cudnn::ops::convertTensor_kernel<float, float, float, (cudnnKernelDataType_t)2>(float, float const*)",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda("
        "at::TensorIteratorBase&)::{lambda()#3}>>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<c10::Half, unsigned int, 4, 64, 64>",
        "void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long, unsigned int, 2, 2, -2>",
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_kernel_impl>>",
        "triton_poi_fused_clone_12",
        "triton_poi_fused__to_copy_0",
        "triton_poi_fused_cat_5",
        "aten::copy_",
        "aten::_to_copy",
        "aten::to",
        "aten::index_select",
    ),
    "other": (
        "something_new",
        "void at::native::triu_tril_kernel<float, int, false, 8, false>",
        "aten::topk",
        "aten::view",
    ),
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kernel_classes(kind, name):
    assert kernel_class(name) == kind


def test_every_class_has_its_colour():
    assert NAMES.keys() | {"launch gap"} == KERNEL_CLASSES.keys()
