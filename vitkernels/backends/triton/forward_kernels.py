"""The Triton forward, two kernels for the same tokens. Letters: problem.py; a tile is BM patches × BN channels.

gather_kernel      every thread computes the addresses of its pixels: any strides, padding, overlap, keep, video.
descriptor_kernel  the copy engine cuts the patches out of the image (sm_90 and later), for aligned dense images.

Both read the image where it lies, add bias and position to the sum in registers, and write each token once. The
programs after the last tile write the prefix tokens. All offsets into images, tables and tokens are 64-bit.
"""

import triton
import triton.language as tl

from .primitives import corners, elements, gathered, pixels, product, program_again, rounded


@triton.jit
def _prefix_tile(pid, prefix, pos, out, B, T, rows, D, prefix_b, prefix_t, pos_b, pos_n, BT: tl.constexpr,
                 BD: tl.constexpr, HAS_POS: tl.constexpr, SUM: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """out[b, t] = prefix[b, t] (+ pos[b, t]) for BT of the B·T prefix rows and BD channels."""
    tiles_d = tl.cdiv(D, BD)
    r = (pid // tiles_d) * BT + tl.arange(0, BT)
    d = (pid % tiles_d) * BD + tl.arange(0, BD)
    b = (r // T).to(tl.int64)
    t = (r % T).to(tl.int64)
    mask = (r < B * T)[:, None] & (d < D)[None, :]
    value = tl.load(prefix + (b * prefix_b + t * prefix_t)[:, None] + d[None, :], mask=mask, other=0).to(SUM)
    if HAS_POS:
        value += tl.load(pos + (b * pos_b + t * pos_n)[:, None] + d[None, :], mask=mask, other=0).to(SUM)
    row = b * (T + rows) + t
    tl.store(out + (row * D)[:, None] + d[None, :], rounded(value, out.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _based(acc, bias, pos, at, d, D, HAS_BIAS: tl.constexpr, HAS_POS: tl.constexpr, SUM: tl.constexpr):
    """acc + pos[at + d] + bias[d]: the bias last, which is nothing but registers."""
    if HAS_POS:
        acc += tl.load(pos + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0).to(SUM)
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=d < D, other=0).to(SUM)[None, :]
    return acc


@triton.jit
def _patches(m, keep, M, N, rows, HAS_KEEP: tl.constexpr):
    """Image and patch of row m, and whether there is such a patch; rows past the end repeat the last one."""
    row = tl.minimum(m, M - 1)
    if HAS_KEEP:
        n = tl.load(keep + row)
        real = (n >= 0) & (n < N)
        n = tl.where(real, n, 0).to(tl.int32)
    else:
        n = row % rows
        real = n >= 0
    return (row // rows).to(tl.int64), n, real


@triton.jit
def gather_kernel(
    images,  # [B, C, F, H, W]
    weight,  # [D, WROW], rows in the order (c, t, y, x); WROW is K, or more with zeros after K
    centred,  # [2, K_PAD]: m and a of y = (x − m)·a
    bias,  # [D]
    pos,  # [1|B, N|T+N, D]
    prefix,  # [1|B, T, D]
    keep,  # [B, rows]
    out,  # [B, T + rows, D]
    B, F, H, W, T, D, rows,
    G_t, G_h, G_w,
    image_b, image_c, image_f, image_h, image_w,  # strides in units of VEC elements; image_w in elements
    pos_b, pos_n, prefix_b, prefix_t,
    scale, k_stop,
    K: tl.constexpr, K_PAD: tl.constexpr,
    P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr,
    pad_t: tl.constexpr, pad_h: tl.constexpr, pad_w: tl.constexpr,
    VEC: tl.constexpr, WROW: tl.constexpr,
    NORMALISED: tl.constexpr, SCALED: tl.constexpr, BASE_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POS: tl.constexpr,
    POS_PREFIX: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_KEEP: tl.constexpr,
    COMPUTE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = pad_t > 0 or pad_h > 0 or pad_w > 0
    pid = tl.program_id(0)
    M = B * rows
    tiles_n = tl.cdiv(D, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    if HAS_PREFIX and pid >= tiles:
        _prefix_tile(pid - tiles, prefix, pos, out, B, T, rows, D, prefix_b, prefix_t, pos_b, pos_n, 16, BN,
                     POS_PREFIX, SUM, INTERPRETED)  # fmt: skip
    else:
        # Neighbouring programs share their patches, not their weights: the weight stays in the L2 cache anyway.
        # Sums of halves take tiles so large that no register is left to remember rows in: each of three parts computes
        # its own.
        N = G_t * G_h * G_w
        first = T if POS_PREFIX else 0
        acc = tl.zeros((BM, BN), SUM)
        if BASE_FIRST:
            b, n, _ = _patches((pid // tiles_n) * BM + tl.arange(0, BM), keep, M, N, rows, HAS_KEEP)
            d = (pid % tiles_n) * BN + tl.arange(0, BN)
            acc = _based(acc, bias, pos, b * pos_b + (n + first).to(tl.int64) * pos_n, d, D, HAS_BIAS, HAS_POS, SUM)
            if SCALED:
                acc *= 1 / scale
            pid = program_again(pid, INTERPRETED)

        b, n, _ = _patches((pid // tiles_n) * BM + tl.arange(0, BM), keep, M, N, rows, HAS_KEEP)
        d = (pid % tiles_n) * BN + tl.arange(0, BN)
        f0, h0, w0, origin = corners(n, b, G_h, G_w, image_b, image_f, image_h, image_w, S_t, S_h, S_w,
                                     pad_t, pad_h, pad_w, VEC)  # fmt: skip
        w_rows = weight + d.to(tl.int64)[None, :] * WROW
        for k0 in tl.range(0, k_stop, BK):
            k = k0 + tl.arange(0, BK)
            pt, py, px, inside = elements(k, image_c, image_f, image_h, image_w, P_t, P_h, P_w, VEC)
            x = gathered(images, origin, f0, h0, w0, None, k, pt, py, px, inside, F, H, W, centred, K, K_PAD,
                         False, PADDED, NORMALISED, COMPUTE, SUM, INTERPRETED)  # fmt: skip
            if WROW < K_PAD:
                w = tl.load(w_rows + k[:, None], mask=(d < D)[None, :] & (k < K)[:, None], other=0)
            else:
                w = tl.load(w_rows + k[:, None], mask=(d < D)[None, :], other=0)
            acc = product(x, w, acc, PRECISION, SUM, SETTLE, INTERPRETED)
        if SCALED:
            acc *= scale

        if BASE_FIRST:
            pid = program_again(pid, INTERPRETED)
        m = (pid // tiles_n) * BM + tl.arange(0, BM)
        d = (pid % tiles_n) * BN + tl.arange(0, BN)
        b, n, real = _patches(m, keep, M, N, rows, HAS_KEEP)
        if not BASE_FIRST:
            acc = _based(acc, bias, pos, b * pos_b + (n + first).to(tl.int64) * pos_n, d, D, HAS_BIAS, HAS_POS, SUM)
        if HAS_KEEP:
            acc = tl.where(real[:, None], acc, float("nan"))
        token = (b * (T + rows) + T + m % rows) * D
        tokens = rounded(acc, out.dtype.element_ty, INTERPRETED)
        tl.store(out + token[:, None] + d[None, :], tokens, mask=(m < M)[:, None] & (d < D)[None, :])


@triton.jit
def descriptor_kernel(
    image_desc,  # [B, G_h, G_w, C·H, P_w] in blocks [BB, BY, BX, RK, XK]: BM patches, RK rows of XK pixels of each
    weight_desc,  # [D, K] in blocks [BN, RK·XK], in the order of the loop below
    out_desc,  # [B, G_h, G_w, D] behind the prefix, in blocks [BB, BY, BX, BN]
    centred,  # [2, K]: m and a of y = (x − m)·a, in the weight's order
    bias,  # [D]
    pos,  # [1|B, N|T+N, D]
    prefix,  # [1|B, T, D]
    out,  # [B, T + N, D]
    B, H, T, D, G_h, G_w,
    pos_b, pos_n, prefix_b, prefix_t,
    scale,
    C: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    NORMALISED: tl.constexpr, SCALED: tl.constexpr, BASE_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POS: tl.constexpr,
    POS_PREFIX: tl.constexpr, HAS_PREFIX: tl.constexpr,
    COMPUTE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BB: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BN: tl.constexpr, RK: tl.constexpr, XK: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = BB * BY * BX
    BK: tl.constexpr = RK * XK
    K: tl.constexpr = C * P_h * P_w
    STEPS_X: tl.constexpr = P_w // XK
    STEPS_Y: tl.constexpr = P_h // RK
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(D, BN)
    tiles_y = tl.cdiv(G_h, BY)
    tiles_x = tl.cdiv(G_w, BX)
    tiles = tl.cdiv(B, BB) * tiles_y * tiles_x * tiles_n
    if HAS_PREFIX and pid >= tiles:
        _prefix_tile(pid - tiles, prefix, pos, out, B, T, G_h * G_w, D, prefix_b, prefix_t, pos_b, pos_n, 16, BN,
                     POS_PREFIX, SUM, INTERPRETED)  # fmt: skip
    else:
        d0 = (pid % tiles_n) * BN
        tile = pid // tiles_n
        x0 = (tile % tiles_x) * BX
        y0 = ((tile // tiles_x) % tiles_y) * BY
        b0 = (tile // (tiles_x * tiles_y)) * BB

        d = d0 + tl.arange(0, BN)
        row = tl.arange(0, BM)
        b = tl.minimum(b0 + row // (BY * BX), B - 1).to(tl.int64)
        y = tl.minimum(y0 + (row // BX) % BY, G_h - 1)
        x = tl.minimum(x0 + row % BX, G_w - 1)
        first = T if POS_PREFIX else 0
        at = b * pos_b + (y * G_w + x + first).to(tl.int64) * pos_n
        acc = tl.zeros((BM, BN), SUM)
        if BASE_FIRST:
            acc = _based(acc, bias, pos, at, d, D, HAS_BIAS, HAS_POS, SUM)
            if SCALED:
                acc *= 1 / scale
        for step in tl.range(0, C * STEPS_Y * STEPS_X):
            kx = (step % STEPS_X) * XK
            ky = (step // STEPS_X) % STEPS_Y * RK
            c = step // (STEPS_X * STEPS_Y)
            patches = image_desc.load([b0, y0, x0, c * H + ky, kx])
            k = step * BK + tl.arange(0, BK)
            operand = pixels(patches.reshape(BM, BK), k, centred, K, NORMALISED, COMPUTE, SUM, INTERPRETED)
            weights = weight_desc.load([d0, step * BK])
            acc = product(operand, weights.T, acc, PRECISION, SUM, SETTLE, INTERPRETED)
        if SCALED:
            acc *= scale
        if not BASE_FIRST:
            acc = _based(acc, bias, pos, at, d, D, HAS_BIAS, HAS_POS, SUM)
        out_desc.store([b0, y0, x0, d0], rounded(acc, out.dtype.element_ty, INTERPRETED).reshape(BB, BY, BX, BN))
