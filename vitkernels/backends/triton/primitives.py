"""What the kernels share: where a patch lies in the image, its pixels as operands, products and rounding."""

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """`value` to the nearest of `dtype`, ties to even.

    By way of fp32, as there is no instruction from fp64 or uint8 to bf16. The interpreter truncates to bf16: there the
    bits are rounded first.
    """
    if value.dtype != dtype and value.dtype != tl.float32 and dtype != tl.float64:
        value = value.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -0x10000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def pixels(x, k, centred, K_PAD: tl.constexpr, NORMALISED: tl.constexpr, COMPUTE: tl.constexpr, SUM: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    """Pixels to the product's operands: (x − m[k])·a[k] where channels are normalised, then rounded once."""
    if NORMALISED:
        x = (x.to(SUM) - tl.load(centred + k)[None, :]) * tl.load(centred + K_PAD + k)[None, :]
    return rounded(x, COMPUTE, INTERPRETED)


@triton.jit
def product(x, w, acc, PRECISION: tl.constexpr, SUM: tl.constexpr, SETTLE: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + x·w; the interpreter would multiply bf16 as the integers that hold it.

    SETTLE: x comes through registers on sm_90. Triton before 3.9 leaves such products in flight over the loop's back
    edge, while the next step writes the registers that they read (Triton issue 9433). Whatever uses the sum has to wait
    for it first, in its own step: that is all these instructions, none, do. They order what each warpgroup reads in
    shared memory before the next step's barrier, too (Triton issue 11047).
    """
    if INTERPRETED and SUM == tl.float32:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=SUM)
    if SETTLE and not INTERPRETED:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc


@triton.jit
def program_again(pid, INTERPRETED: tl.constexpr):
    """`pid`, but the compiler does not know: what is computed from it is computed anew, and nothing has to stay in a
    register across the loop before."""
    if not INTERPRETED:
        pid = tl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return pid


@triton.jit
def corners(n, b, G_h, G_w, image_b, image_f, image_h, image_w, S_t: tl.constexpr, S_h: tl.constexpr,
            S_w: tl.constexpr, pad_t: tl.constexpr, pad_h: tl.constexpr, pad_w: tl.constexpr,
            VEC: tl.constexpr):  # fmt: skip
    """First frame, row and pixel of patch n, and its offset in image b (64-bit)."""
    f0 = (n // (G_h * G_w)) * S_t - pad_t
    h0 = ((n // G_w) % G_h) * S_h - pad_h
    w0 = (n % G_w) * S_w - pad_w
    origin = b * image_b + f0.to(tl.int64) * image_f + h0.to(tl.int64) * image_h
    if VEC > 1:
        origin = origin * VEC + w0
    else:
        origin = origin + w0.to(tl.int64) * image_w
    return f0, h0, w0, origin


@triton.jit
def elements(k, image_c, image_f, image_h, image_w, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
             VEC: tl.constexpr):  # fmt: skip
    """Frame, row and pixel of element k of a patch, and its offset from the patch's first (64-bit)."""
    px = k % P_w
    py = (k // P_w) % P_h
    pt = (k // (P_w * P_h)) % P_t
    c = k // (P_w * P_h * P_t)
    inside = c.to(tl.int64) * image_c + pt.to(tl.int64) * image_f + py.to(tl.int64) * image_h
    if VEC > 1:
        inside = inside * VEC + px
    else:
        inside = inside + px.to(tl.int64) * image_w
    return pt, py, px, inside


@triton.jit
def gathered(images, origin, f0, h0, w0, real, k, pt, py, px, inside, F, H, W, centred, K: tl.constexpr,
             K_PAD: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr, NORMALISED: tl.constexpr,
             COMPUTE: tl.constexpr, SUM: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """Elements k [n] of the patches at origin [m] as operands of a product, [m, n]; 0 in the padding and past K.
    MASKED: only of the patches that are `real`."""
    pixel = images + origin[:, None] + inside[None, :]
    if PADDED:
        seen = (
            (k < K)[None, :]
            & (f0[:, None] + pt[None, :] >= 0) & (f0[:, None] + pt[None, :] < F)
            & (h0[:, None] + py[None, :] >= 0) & (h0[:, None] + py[None, :] < H)
            & (w0[:, None] + px[None, :] >= 0) & (w0[:, None] + px[None, :] < W)
        )  # fmt: skip
        if MASKED:
            seen = seen & real[:, None]
        x = tl.load(pixel, mask=seen, other=0)
        x = pixels(x, k, centred, K_PAD, NORMALISED, COMPUTE, SUM, INTERPRETED)
        if NORMALISED:
            x = tl.where(seen, x, 0.0).to(COMPUTE)
    else:
        if MASKED:
            x = tl.load(pixel, mask=real[:, None] & (k < K)[None, :], other=0)
        elif K_PAD > K:
            x = tl.load(pixel, mask=(k < K)[None, :], other=0)
        else:
            x = tl.load(pixel)
        x = pixels(x, k, centred, K_PAD, NORMALISED, COMPUTE, SUM, INTERPRETED)
    return x
