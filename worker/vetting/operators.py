"""The operators that an exported program may call, by name: an allow-list, since some of torch's own read files.

All are functions of torch's `aten` library that compute tensors from tensors, check their arguments, and give the same
result every time; and the arithmetic of sizes. `add_`, the form that writes into its first argument, comes with `add`.
"""

from __future__ import annotations

import re

_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"_operator\.([a-z]+)_?")

_PRODUCTS = (
    "linear matmul mm bmm addmm baddbmm addbmm mv addmv dot outer bilinear einsum tensordot conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d convolution scaled_dot_product_attention "
    "_scaled_dot_product_flash_attention_for_cpu _safe_softmax cosine_similarity linalg_vector_norm norm"
)
_LAYERS = (
    "embedding batch_norm layer_norm group_norm instance_norm rms_norm _fused_rms_norm native_layer_norm "
    "native_group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_native_batch_norm_legit_functional _weight_norm dropout feature_dropout alpha_dropout feature_alpha_dropout "
    "native_dropout lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
)
_ACTIVATIONS = (
    "relu relu6 gelu silu mish elu selu celu leaky_relu prelu hardswish hardsigmoid hardtanh softplus softshrink "
    "hardshrink threshold sigmoid log_sigmoid tanh glu softmax log_softmax _softmax _log_softmax"
)
_POOLING = (
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator pixel_shuffle "
    "pixel_unshuffle channel_shuffle im2col col2im unfold"
)
_ARITHMETIC = (
    "add sub rsub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power square sqrt "
    "rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p neg negative abs absolute sign sgn sin cos tan asin acos "
    "atan atan2 sinh cosh asinh acosh atanh erf erfc sinc floor ceil round trunc frac clamp clamp_min clamp_max clip "
    "minimum maximum fmin fmax lerp addcmul addcdiv logaddexp hypot where masked_fill nan_to_num isnan isinf isfinite "
    "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ "
    "__xor__ eq ne lt le gt ge not_equal less less_equal greater greater_equal"
)
_REDUCTIONS = (
    "sum mean prod var std var_mean std_mean any all amax amin aminmax max min argmax argmin cumsum cumprod logsumexp "
    "logcumsumexp topk sort argsort median count_nonzero"
)
_SHAPES = (
    "view _unsafe_view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze permute transpose t "
    "swapaxes swapdims movedim numpy_T mT expand expand_as broadcast_to repeat repeat_interleave tile cat concat "
    "concatenate stack hstack vstack split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
    "tensor_split unbind select narrow slice index index_select gather scatter scatter_add take_along_dim index_put "
    "index_add index_copy index_fill select_scatter slice_scatter roll flip rot90 tril triu diagonal diag diag_embed "
    "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d as_strided contiguous clone alias detach lift_fresh_copy lift_fresh copy fill zero meshgrid "
    "broadcast_tensors atleast_1d atleast_2d atleast_3d"
)
_CREATION = (
    "zeros ones full arange linspace eye scalar_tensor zeros_like ones_like full_like new_zeros new_ones new_full "
    "tril_indices triu_indices hann_window hamming_window"
)
_CONVERSION = "to type_as _to_copy sym_size sym_numel sym_stride"
_SPECTRA = (
    "stft fft_fft fft_ifft fft_rfft fft_irfft fft_rfft2 fft_irfft2 _fft_r2c _fft_c2r _fft_c2c view_as_real "
    "view_as_complex real imag angle"
)


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


ATEN = _names(
    _PRODUCTS, _LAYERS, _ACTIVATIONS, _POOLING, _ARITHMETIC, _REDUCTIONS, _SHAPES, _CREATION, _CONVERSION, _SPECTRA
)
# Checks of what was true when the program was exported: they compute nothing, and are left out.
ASSERTIONS = _names(
    "_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range sym_constrain_range_for_size"
)
RANDOM = _names(
    "rand rand_like randn randn_like randint randint_like randperm normal normal_ uniform uniform_ bernoulli "
    "bernoulli_ multinomial poisson exponential_ rrelu rrelu_ rrelu_with_noise"
)
SIZES = _names("add sub mul floordiv truediv mod neg pos pow eq ne lt le gt ge and or getitem")
_SIZE_FUNCTIONS = _names(
    "torch.sym_max torch.sym_min torch.sym_not torch.sym_ite torch.sym_int torch.sym_float torch.sym_sqrt "
    "torch.sym_sum torch._sym_sqrt math.trunc"
)
# Blocks `with torch.no_grad():` and `with torch.autocast(…, enabled=False):`.
NO_GRAD = "torch.ops.higher_order.wrap_with_set_grad_enabled"
AUTOCAST = "torch.ops.higher_order.wrap_with_autocast"
BLOCKS = frozenset({NO_GRAD, AUTOCAST})


def base_name(name: str) -> str:
    """relu_ -> relu; names that begin and end with underscores stay as they are."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def refusal(target: str) -> str | None:
    """Why a node may not call `target`, as a sentence; None where it may."""
    if target in BLOCKS or target in _SIZE_FUNCTIONS:
        return None
    shown = target[:120]
    if (match := _OPERATOR.fullmatch(target)) is not None:
        return None if match[1] in SIZES else f"The program computes a size by {shown!r}, which is not taken."
    match = _ATEN.fullmatch(target)
    if match is None:
        return (
            f"The program calls {shown!r}. Only operators of torch's own aten library are taken: export without custom "
            "operators and without control flow (torch.cond, while_loop)."
        )
    name = match[1]
    if name in RANDOM:
        return (
            f"The program draws random numbers ({shown}), so that its output differs from call to call: call "
            "model.eval() before torch.export.export."
        )
    if base_name(name) not in ATEN and name not in ASSERTIONS:
        return f"The program calls the operator {shown!r}, which is not among those that are taken."
    return None
