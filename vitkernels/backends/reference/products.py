"""The product of patches and weight, by the library that multiplies fastest on this processor, and what each library
wants of its operands."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ... import cpu
from ...gpu import not_nvidia
from ...problem import PatchProblem

_POINTWISE: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
PACKED_FROM = 1_500_000_000  # multiply-adds, but for those of 3,000 rows
TABLE_BYTES = 5 << 18  # of a table of positions with the bias in them, at most


def product_dtype(p: PatchProblem) -> torch.dtype:
    """The operands' dtype: a CPU without instructions for bf16 (any, for fp16) multiplies halves faster as fp32. One
    with them rounds products to bf16, as autocast does; who asks for more of weights in bf16 gets more."""
    rounded = p.out_dtype.itemsize == 2 or p.weight_dtype != p.compute_dtype
    native = p.compute_dtype == torch.bfloat16 and rounded and _has_bf16()
    if p.on_cpu and not native:
        return p.sum_dtype
    return p.compute_dtype


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    """Whether oneDNN has bf16 instructions: the CPU's, unless the environment takes them away."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    older = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
    return torch.cpu._is_avx512_bf16_supported() and limit not in older


def linear_of(on_cpu: bool, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """x·Wᵀ + bias, by what Inductor calls, or by F.linear, which calls MKL in fp32. oneDNN adds a bias in bf16 for
    nothing, for which F.linear takes a tenth longer. In fp32 it takes a tenth longer than MKL on Intel's CPUs."""
    if not (on_cpu and has_onednn()):
        return F.linear
    if dtype == torch.float32:
        return F.linear if cpu.is_intel() else _linear_of_zen5 if mkl_is_slow(dtype) else _linear
    return onednn if dtype == torch.bfloat16 else F.linear


def mkl_is_slow(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes half of MKL's time for any product in fp32: MKL keeps AVX-512 for Intel's CPUs (2 cores of
    an AMD EPYC, Zen 5, torch 2.14: 1.7 to 2.2 × from 49 rows on, 1.6 to 2 × for the weight's gradient). Where units are
    256 bits wide that costs nothing: on Zen 4 both are as fast."""
    return dtype == torch.float32 and is_zen5s(dtype)


def _linear(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Up to Zen 4: by MKL where x and W are small. One image in 192 channels takes oneDNN 540 µs and MKL
    490, and P = 14 770 and 525; large products take MKL up to 2.2 × as long (2 cores of an AMD EPYC, torch 2.14)."""
    small = W.shape[0] <= 384 and x.shape[0] < 1000
    return (F.linear if small else onednn)(x, W, bias)


def _linear_of_zen5(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """By MKL where there is little to do, as it finds its code faster where that is no longer in the cache: 3,136 rows
    of 48 elements in 40 channels take 90 µs by MKL and 140 by oneDNN, in 96 channels 173 and 166."""
    return (F.linear if x.shape[0] * W.numel() < 10_000_000 else onednn)(x, W, bias)


def onednn(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _POINTWISE(x, W, bias, "none", [], "")


def is_zen5s(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies on Zen 5, where the next two were measured (oneDNN 3.12)."""
    return dtype in (torch.bfloat16, torch.float32) and cpu.is_zen5() and has_onednn()


@lru_cache(maxsize=1024)
def padded_rows(n: int) -> int:
    """A product's rows and others behind them, which make nothing. oneDNN cuts rows into blocks of one size, and for
    some numbers there is no good one: 1,369 (518 px in patches of 14) take 1.3 × as long as 1,376, 961 and 578 up to
    1.2 ×. Of 18 numbers from 343 to 1,875 in four sizes and both dtypes, the next multiple of 8 took 0.77 to 1.02 ×,
    and up to 1.04 × where a block of 25, 27 or 28 fits."""
    fits = n < 300 or any(n % block == 0 for block in (25, 27, 28))
    return n if fits else -(-n // 8) * 8


def gains_by_packing(p: PatchProblem, dtype: torch.dtype) -> bool:
    """Whether to bring the weight into oneDNN's order once, not for each piece: 5 % of a product of 196 to 3,136 rows,
    with the same bits; it takes as long as that is of some 3,000 rows, and 50 µs. Of 30 shapes, with oneDNN 3.12 and
    3.13, those that are taken take 0.93 to 1.01 × the time. Small ones are MKL's (`_linear_of_zen5`)."""
    gains = (p.B * p.rows - 3000) * p.D * p.K >= PACKED_FROM and p.D * p.K >= 1 << 15
    return gains and p.on_cpu and is_zen5s(dtype)


def packed(W: torch.Tensor, rows: int) -> torch.Tensor:
    """For `onednn` alone, in products of so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(W, rows)


def has_onednn() -> bool:
    return _is_built_with_onednn() and torch._C._get_mkldnn_enabled()  # as torch.backends.mkldnn asks


@lru_cache(maxsize=1)
def _is_built_with_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and _POINTWISE is not None


def add_product(total: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """total [D, columns] += dyᵀ·x, of contiguous dy [n, D] and x [n, columns] on a CPU."""
    (D, columns), n = total.shape, len(x)
    if not mkl_is_slow(total.dtype) or n * total.numel() < 10_000_000:
        total.addmm_(dy.t(), x)
    elif n < 2 * max(D, columns):
        total.add_(onednn(dy.t(), x.t()))
    else:
        total.add_(_of_convolution(dy, x))


def _of_convolution(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dyᵀ·x as the gradient of a convolution's weight, of one image of n pixels, channels side by side: oneDNN reads
    both where they lie. Its product has them transposed first, which took half of 256 µs (2,048 rows, D = 192, K = 48)
    and with twice as many rows as channels still a tenth."""
    grad, pixels = (t.as_strided((1, c, n, 1), (n * c, 1, c, c)) for t in (dy, x) for n, c in (t.shape,))
    weight = x.new_empty((dy.shape[1], x.shape[1], 1, 1))  # of which nothing is read but its sizes
    more = None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False)
    return torch.ops.aten.convolution_backward(grad, pixels, weight, *more)[1][..., 0, 0]


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a·b in `dtype`, in which it is summed: fp32 where a GPU multiplies halves."""
    if a.is_cpu and a.dtype == dtype and mkl_is_slow(dtype):
        return onednn(a, b.t())
    if a.dtype == dtype or not_nvidia():  # mm's out_dtype is cuBLAS's
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def padded(n: int, on_cpu: bool, dtype: torch.dtype) -> int:
    """n elements of a product's row and zeros behind them. On a GPU rows of halves begin at 16 bytes: the library's
    product of K = 588 takes 441 µs as it lies and 129 padded (H200, ViT-L/14, B = 256). On a CPU with AMX oneDNN's
    product in bfloat16 reads past a row that is no multiple of 32, and NaN of the next times its zero is NaN: one image
    would reach another's tokens (https://github.com/uxlfoundation/oneDNN/issues/5717). It would on a CPU that does not
    tell its instructions, too."""
    if not on_cpu:
        return n if dtype.itemsize > 2 else -(-n // 8) * 8
    if n % 32 == 0 or not may_have_amx():
        return n
    rounded = dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    return -(-n // 32) * 32 if dtype == torch.bfloat16 or rounded else n


def may_have_amx() -> bool:
    return not cpu.instructions() or "amx_bf16" in cpu.instructions()


def by_one_thread(p: PatchProblem, dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """From how many rows, and below how many, oneDNN's product for AMX keeps the second of two threads idle (3.12; seen
    in what it asks of OpenMP, for K = 192 to 3,072, D = 192 to 1,536). With more threads it does not."""
    if not (p.on_cpu and threads == 2 and dtype == torch.bfloat16 and "amx_bf16" in cpu.instructions()):
        return 0, 0
    few = min(p.D, 768)
    return few * 5 // 6, few * 2


def has_bias_in_table(p: PatchProblem, dtype: torch.dtype) -> bool:
    """Whether the bias of products that land in their tokens is added to the positions, once a call: MKL takes 3 %
    longer with one. In bf16 it would be rounded apart from the product."""
    return p.has_bias and dtype == torch.float32 and p.N * p.D * dtype.itemsize <= TABLE_BYTES
