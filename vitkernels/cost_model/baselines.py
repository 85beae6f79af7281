"""The passes of bench/baselines.py's ways, operator by operator, forward and backward.

`inside`: what PyTorch's convolution does on a GPU beside cuDNN's kernel. cuDNN adds no bias ("Bias is handled outside",
aten/src/ATen/native/cudnn/ConvShared.cpp), so tokens are read and written once more; and its tensor-core kernels take
channels-last operands, so planar ones are copied. That its result comes back planar, which costs the same again, is not
counted: in the peers' favour.
"""

from __future__ import annotations

from math import prod

from ..problem import PatchProblem
from .traffic import INDEX, Algorithm, Pass


def why_not(p: PatchProblem, name: str) -> str:
    """Why bench/baselines.py's function does not cover the problem."""
    if p.compute_dtype != p.weight_dtype or p.out_dtype != p.weight_dtype:
        return "autocast, or tokens of another dtype than the weight"
    if p.pos_rows != p.T + p.N or p.pos_per_image:
        return "needs a position table of T+N rows for all images"
    if name == "reshape_linear" and (p.S != p.P or any(p.pad)):
        return "patches overlap, are apart or padded"
    return ""


def algorithms(p: PatchProblem, mode: str) -> tuple[dict[str, Algorithm], dict[str, str]]:
    """Name -> algorithm, and name -> why there is none. Under a keep list convolutions embed all, then gather."""
    eager = "timm_eager" if p.n_keep is None else "embed_all_then_gather"
    names = {eager: _convolution, "conv_channels_last": _convolution, "reshape_linear": _linear}
    refused = {name: reason for name in names if (reason := why_not(p, name))}
    if mode == "images":
        refused = dict.fromkeys(names, "only the gradients of what is learnt are modelled")
    return {name: modelled(p, mode, name) for name, modelled in names.items() if name not in refused}, refused


def _layout(p: PatchProblem) -> bool:
    """Whether images lie channels-last."""
    return p.C > 1 and p.image_strides[1] == 1 and p.image_strides[4] == p.C


def _pixels(p: PatchProblem, elements: int) -> list[Pass]:
    """Conversion and normalisation of so many pixels."""
    s, c, passes = p.image_dtype.itemsize, p.weight_dtype.itemsize, []
    if p.image_dtype != p.weight_dtype:
        passes.append(Pass("pixels to float", elements * s, elements * c))
    if p.normalised or p.scale != 1:
        passes.append(Pass("normalise", elements * c + 2 * p.C * c, elements * c))
    return passes


def _convolution(p: PatchProblem, mode: str, name: str) -> Algorithm:
    c, pixels, M = p.weight_dtype.itemsize, p.B * p.C * p.F * p.H * p.W, p.B * p.N
    flops, tokens, weight = 2 * M * p.K * p.D, M * p.D * c, p.D * p.K * c
    last, tensor_cores = _layout(p), p.compute_dtype.itemsize == 2
    planar = name != "conv_channels_last" and not last
    copied = Pass("channels-last copy", (pixels * c), (pixels * c))
    before = _pixels(p, pixels) + [copied] * (name == "conv_channels_last" and not last)
    relaid = Pass("operands to channels-last", pixels * c + weight, pixels * c + weight, 0, 2, inside="convolution")
    kept = pixels * c * bool(before) + tokens * (p.n_keep is not None)  # a gather's backward keeps what it took from
    if mode == "forward":
        bias = Pass("bias", tokens + p.D * c, tokens, inside="convolution")
        passes = [
            *before,
            *[relaid] * (planar and tensor_cores),
            Pass("convolution", pixels * c + weight + p.D * c * p.has_bias, tokens, flops),
            *[bias] * p.has_bias,
        ]
        if p.n_keep is not None:
            taken = p.B * p.rows
            passes.append(Pass("gather", min(M, taken) * p.D * c + taken * INDEX, taken * p.D * c))
        return Algorithm((*passes, *_assembled(p)), kept)
    passes = _disassembled(p)
    if p.n_keep is not None:
        taken = p.B * p.rows
        passes += [
            Pass("zeros", 0, tokens),
            Pass("scatter_add", tokens + taken * (INDEX + p.D * c), tokens),
        ]
    both = Pass(
        "operands to channels-last", pixels * c + tokens, pixels * c + tokens, 0, 2, inside="convolution_backward"
    )
    summed = Pass("bias gradient", tokens, p.D * c, inside="convolution_backward")
    passes += [
        *[both] * (planar and tensor_cores),
        Pass("convolution_backward", pixels * c + tokens, weight + p.D * c * p.has_bias, flops),
        *[summed] * p.has_bias,
    ]
    return Algorithm(tuple(passes), kept)


def _linear(p: PatchProblem, mode: str, name: str) -> Algorithm:
    s, c, M = p.image_dtype.itemsize, p.weight_dtype.itemsize, p.B * p.rows
    elements, weight, tokens, flops = M * p.K, p.D * p.K * c, M * p.D * c, 2 * M * p.K * p.D
    kept = elements * c
    if mode == "backward":
        passes = [
            *_disassembled(p),
            *[Pass("copy of dY", tokens, tokens)] * (p.T > 0),  # behind the prefix its rows are not one matrix
            Pass("product", tokens + elements * c, weight, flops),
            *[Pass("bias gradient", tokens, p.D * c)] * p.has_bias,
        ]
        return Algorithm(tuple(passes), kept)
    axes = 3 if p.video else 2
    passes = [Pass("patches", elements * s, elements * s)]
    if p.n_keep is not None:
        coordinates = [
            Pass("image of each row", 0, p.B * INDEX),
            *[Pass("line of each", M * INDEX, M * INDEX), Pass("place in it", M * INDEX, M * INDEX)] * (axes - 1),
        ]
        index = (p.B + axes * M) * INDEX
        passes = [*coordinates, Pass("patches", min(pixels_of(p), elements) * s + index, elements * s)]
    passes += [
        *_pixels(p, elements),
        Pass("product", elements * c + weight + p.D * c * p.has_bias, tokens, flops),
    ]
    return Algorithm((*passes, *_assembled(p)), kept)


def pixels_of(p: PatchProblem) -> int:
    """Pixels of the images cut to whole patches."""
    return p.B * p.N * p.K


def _assembled(p: PatchProblem) -> list[Pass]:
    c, M = p.weight_dtype.itemsize, p.B * p.rows * p.D
    whole, prefix = prod(p.out_shape), p.T * p.D
    if p.n_keep is None:
        cat = Pass("cat", (prefix + M) * c, whole * c)
        return [*[cat] * (p.T > 0), Pass("add", (whole + p.pos_rows * p.D) * c, whole * c)]
    return [
        Pass("position of the kept", min(p.N * p.D, M) * c + p.B * p.rows * INDEX, M * c),
        Pass("add", 2 * M * c, M * c),
        *[Pass("add to prefix", 2 * prefix * c, prefix * c), Pass("cat", (prefix + M) * c, whole * c)] * (p.T > 0),
    ]


def _disassembled(p: PatchProblem) -> list[Pass]:
    """The gradients of position and prefix, from dY."""
    c, M = p.weight_dtype.itemsize, p.B * p.rows * p.D
    whole, prefix, table = prod(p.out_shape), p.T * p.D, p.pos_rows * p.D
    of_prefix = [Pass("prefix gradient", p.B * prefix * c, prefix * c)] * (p.T > 0)
    if p.n_keep is None:
        return [Pass("position gradient", whole * c, table * c), *of_prefix]
    N = p.N * p.D
    return [
        *of_prefix,
        *[Pass("prefix's part of the table", prefix * c, table * c)] * (p.T > 0),
        Pass("zeros", 0, N * c),
        Pass("index_put", (N + M) * c + p.B * p.rows * INDEX, N * c),
        Pass("patches' part of the table", N * c, table * c),
        *[Pass("add", 2 * table * c, table * c)] * (p.T > 0),
    ]
