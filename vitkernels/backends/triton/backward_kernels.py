"""The Triton backward. Letters: problem.py; dY is the gradient of the tokens, [B, T + rows, D], in any strides.

reduce_kernel  from one launch: tiles of dW = dYᵀ·patches (no patch matrix), each over a part of the patches, and the
               sums of dY over images for position, prefix and bias, each over a part of the images.
weight_descriptor_kernel  those tiles of dW with dY and patches cut by the copy engine (sm_90 and later); reduce_kernel
               then gives the sums alone.
kept_kernel    the sums for the position where patches are kept.
finish_kernel  adds those parts, in order, and rounds: no atomics, so the same inputs give the same bits.
images_kernel  dX = dY·W, every pixel from the patches that saw it and written once.
"""

import triton
import triton.language as tl

from .primitives import corners, elements, gathered, pixels, product, rounded


@triton.jit
def _weight_tile(
    tile, split, images, grad, centred, keep, parts, B, F, H, W, T, D, rows, chunk, G_t, G_h, G_w,
    image_b, image_c, image_f, image_h, image_w, grad_b, grad_n, grad_d,
    K: tl.constexpr, K_PAD: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr,
    pad_t: tl.constexpr, pad_h: tl.constexpr, pad_w: tl.constexpr,
    VEC: tl.constexpr, NORMALISED: tl.constexpr, HAS_KEEP: tl.constexpr,
    COMPUTE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """parts[split, d, k] = Σ_m dY[m, d]·x[m, k] for BM channels × BN elements, over the `chunk` patches of a split."""
    PADDED: tl.constexpr = pad_t > 0 or pad_h > 0 or pad_w > 0
    tiles_k = tl.cdiv(K, BN)
    d = (tile // tiles_k) * BM + tl.arange(0, BM)
    k = (tile % tiles_k) * BN + tl.arange(0, BN)
    pt, py, px, inside = elements(k, image_c, image_f, image_h, image_w, P_t, P_h, P_w, VEC)
    M = B * rows
    grad_column = grad + d.to(tl.int64) * grad_d
    acc = tl.zeros((BM, BN), SUM)
    first = split * chunk
    for m0 in tl.range(first, tl.minimum(first + chunk, M), BK):
        m = m0 + tl.arange(0, BK)
        row = tl.minimum(m, M - 1)
        real = m < M
        b = (row // rows).to(tl.int64)
        i = row % rows
        if HAS_KEEP:
            n = tl.load(keep + row).to(tl.int64)
            real = real & (n >= 0) & (n < G_t * G_h * G_w)
            n = tl.where(real, n, 0)
        else:
            n = i
        f0, h0, w0, origin = corners(n, b, G_h, G_w, image_b, image_f, image_h, image_w, S_t, S_h, S_w,
                                     pad_t, pad_h, pad_w, VEC)  # fmt: skip
        x = gathered(images, origin, f0, h0, w0, real, k, pt, py, px, inside, F, H, W, centred, K, K_PAD, HAS_KEEP,
                     PADDED, NORMALISED, COMPUTE, SUM, INTERPRETED)  # fmt: skip
        at = b * grad_b + (T + i).to(tl.int64) * grad_n
        dy = tl.load(grad_column[:, None] + at[None, :], mask=(d < D)[:, None] & real[None, :], other=0)
        acc = product(rounded(dy, COMPUTE, INTERPRETED), x, acc, PRECISION, SUM, SETTLE, INTERPRETED)
    out = parts + (split.to(tl.int64) * D + d)[:, None] * K + k[None, :]
    tl.store(out, acc, mask=(d < D)[:, None] & (k < K)[None, :])


@triton.jit
def weight_descriptor_kernel(
    image_desc,  # [B, G_h, G_w, C·H, P_w] in blocks [BB, BY, BX, RK, XK]: BK patches, RK rows of XK pixels of each
    grad_desc,  # dY behind the prefix, [B, G_h, G_w, D], in blocks [BB, BY, BX, BM]
    centred,  # [2, K]: m and a of y = (x − m)·a
    weight_parts,  # [splits, D, K], K in the order of the image's layout
    B, H, D, G_h, G_w, chunk,
    C: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    NORMALISED: tl.constexpr, COMPUTE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BB: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BM: tl.constexpr, RK: tl.constexpr, XK: tl.constexpr,
):  # fmt: skip
    """weight_parts[split, d, k] = Σ_m dY[m, d]·x[m, k] for BM channels × BN = RK·XK elements, over the `chunk` blocks
    of BK patches of a split. The copy engine cuts both, and brings zeros where a block has no patch or channel."""
    BK: tl.constexpr = BB * BY * BX
    BN: tl.constexpr = RK * XK
    K: tl.constexpr = C * P_h * P_w
    STEPS_X: tl.constexpr = P_w // XK
    STEPS_Y: tl.constexpr = P_h // RK
    pid = tl.program_id(0)
    tiles_k: tl.constexpr = C * STEPS_Y * STEPS_X
    tiles = tl.cdiv(D, BM) * tiles_k  # neighbours share their patches and their dY
    split = pid // tiles
    d0 = (pid % tiles) // tiles_k * BM
    step = (pid % tiles) % tiles_k
    kx = (step % STEPS_X) * XK
    ky = (step // STEPS_X) % STEPS_Y * RK
    c = step // (STEPS_X * STEPS_Y)
    j = tl.arange(0, BN)
    k = (c * P_h + ky + j // XK) * P_w + kx + j % XK
    tiles_y = tl.cdiv(G_h, BY)
    tiles_x = tl.cdiv(G_w, BX)
    first = split * chunk
    acc = tl.zeros((BM, BN), SUM)
    for block in tl.range(first, tl.minimum(first + chunk, tl.cdiv(B, BB) * tiles_y * tiles_x)):
        x0 = (block % tiles_x) * BX
        y0 = ((block // tiles_x) % tiles_y) * BY
        b0 = (block // (tiles_x * tiles_y)) * BB
        patches = image_desc.load([b0, y0, x0, c * H + ky, kx])
        x = pixels(patches.reshape(BK, BN), k, centred, K, NORMALISED, COMPUTE, SUM, INTERPRETED)
        dy = rounded(grad_desc.load([b0, y0, x0, d0]).reshape(BK, BM), COMPUTE, INTERPRETED)
        acc = product(dy.T, x, acc, PRECISION, SUM, SETTLE, INTERPRETED)
    d = d0 + tl.arange(0, BM)
    out = weight_parts + (split.to(tl.int64) * D + d)[:, None] * K + k[None, :]
    tl.store(out, acc, mask=(d < D)[:, None])


@triton.jit
def _sums_tile(
    tile, split, grad, keep, table_parts, bias_parts, B, N, T, D, rows, chunk, first_row, last_row, table_stop,
    table_rows, grad_b, grad_n, grad_d, HAS_KEEP: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    SUM: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Σ_b dY[b, r] for BR token rows × BD channels over the `chunk` images of a split: to the table for rows before
    `table_stop`, and summed over the patches' rows to the bias."""
    tiles_d = tl.cdiv(D, BD)
    block = tile // tiles_d
    r = first_row + block * BR + tl.arange(0, BR)
    d = (tile % tiles_d) * BD + tl.arange(0, BD)
    real = (r < last_row)[:, None] & (d < D)[None, :]
    at = grad + (r.to(tl.int64) * grad_n)[:, None] + (d.to(tl.int64) * grad_d)[None, :]
    total = tl.zeros((BR, BD), SUM)
    stop = tl.minimum((split + 1) * chunk, B)
    for b0 in tl.range(split * chunk, stop, BI):
        b = b0 + tl.arange(0, BI)
        mask = (b < stop)[:, None, None] & real[None, :, :]
        if HAS_KEEP:  # a patch that is none has no gradient
            i = (r - T)[None, :]
            kept = tl.load(keep + b[:, None] * rows + i, mask=(b < stop)[:, None] & (i >= 0) & (i < rows), other=0)
            mask = mask & ((kept >= 0) & (kept < N))[:, :, None]
        dy = tl.load(at[None, :, :] + (b.to(tl.int64) * grad_b)[:, None, None], mask=mask, other=0)
        total += tl.sum(dy.to(SUM), 0)
    if TABLE:
        row = split.to(tl.int64) * table_rows + r - first_row
        tl.store(table_parts + (row * D)[:, None] + d[None, :], total, mask=real & (r < table_stop)[:, None])
    if BIAS:
        row = split.to(tl.int64) * tl.cdiv(last_row - first_row, BR) + block
        tl.store(bias_parts + row * D + d, tl.sum(tl.where((r >= T)[:, None], total, 0), 0), mask=d < D)


@triton.jit
def reduce_kernel(
    images,  # [B, C, F, H, W]
    grad,  # [B, T + rows, D]
    centred,  # [2, K_PAD]: m and a of y = (x − m)·a
    keep,  # [B, rows]
    weight_parts,  # [weight_splits, D, K], K in the order of the image's layout
    table_parts,  # [sums_splits, table_rows, D]: token rows from first_row on
    bias_parts,  # [sums_splits · blocks of rows, D]
    B, F, H, W, T, D, rows, G_t, G_h, G_w,
    image_b, image_c, image_f, image_h, image_w,  # strides in units of VEC elements; image_w in elements
    grad_b, grad_n, grad_d,
    weight_programs, weight_chunk, sums_chunk, first_row, last_row, table_stop, table_rows,
    K: tl.constexpr, K_PAD: tl.constexpr,
    P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr,
    pad_t: tl.constexpr, pad_h: tl.constexpr, pad_w: tl.constexpr,
    VEC: tl.constexpr, NORMALISED: tl.constexpr, HAS_KEEP: tl.constexpr,
    WEIGHT: tl.constexpr, SUMS: tl.constexpr, TABLE: tl.constexpr, BIAS: tl.constexpr,
    COMPUTE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BI: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    N = G_t * G_h * G_w
    if WEIGHT and pid < weight_programs:
        tiles = tl.cdiv(D, BM) * tl.cdiv(K, BN)  # neighbours share their patches and their dY
        _weight_tile(pid % tiles, pid // tiles, images, grad, centred, keep, weight_parts, B, F, H, W, T, D, rows,
                     weight_chunk, G_t, G_h, G_w, image_b, image_c, image_f, image_h, image_w, grad_b, grad_n, grad_d,
                     K, K_PAD, P_t, P_h, P_w, S_t, S_h, S_w, pad_t, pad_h, pad_w, VEC, NORMALISED, HAS_KEEP,
                     COMPUTE, SUM, PRECISION, SETTLE, INTERPRETED, BM, BN, BK)  # fmt: skip
    elif SUMS:
        tile = pid - weight_programs
        tiles = tl.cdiv(last_row - first_row, BR) * tl.cdiv(D, BD)
        _sums_tile(tile % tiles, tile // tiles, grad, keep, table_parts, bias_parts, B, N, T, D, rows, sums_chunk,
                   first_row, last_row, table_stop, table_rows, grad_b, grad_n, grad_d, HAS_KEEP, TABLE, BIAS, SUM,
                   BI, BR, BD)  # fmt: skip


@triton.jit
def kept_kernel(
    grad,  # [B, T + rows, D]
    keep,  # [B, rows]
    table_parts,  # [sums_splits, table_rows, D]
    B, N, T, D, rows, chunk, first_row, table_rows, grad_b, grad_n, grad_d,
    COMPUTE: tl.constexpr, SUM: tl.constexpr, SETTLE: tl.constexpr, INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ of dY over the kept patches that are patch n, BM of them × BN channels, over the `chunk` images of a split.

    A scatter without atomics: dY times the matrix that is 1 where row m keeps patch n, and 0 elsewhere. (So what is not
    finite in one row comes to all.)
    """
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(D, BN)
    tiles = tl.cdiv(N, BM) * tiles_d
    split = pid // tiles
    tile = pid % tiles
    n = (tile // tiles_d) * BM + tl.arange(0, BM)
    d = (tile % tiles_d) * BN + tl.arange(0, BN)
    grad_column = grad + d.to(tl.int64) * grad_d
    total = tl.zeros((BM, BN), SUM)
    stop = tl.minimum((split + 1) * chunk, B) * rows
    for m0 in tl.range(split * chunk * rows, stop, BK):
        m = m0 + tl.arange(0, BK)
        real = m < stop
        kept = tl.load(keep + m, mask=real, other=0).to(tl.int64)
        real = real & (kept >= 0) & (kept < N)  # the token of an index that is none is NaN, and its dY may be
        at = (m // rows).to(tl.int64) * grad_b + (T + m % rows).to(tl.int64) * grad_n
        dy = tl.load(grad_column[None, :] + at[:, None], mask=real[:, None] & (d < D)[None, :], other=0)
        chosen = tl.where(kept[None, :] == n[:, None], 1.0, 0.0).to(COMPUTE)
        total = product(chosen, dy.to(COMPUTE), total, "ieee", SUM, SETTLE, INTERPRETED)
    row = split.to(tl.int64) * table_rows + T - first_row + n
    tl.store(table_parts + (row * D)[:, None] + d[None, :], total, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _added(parts, stride, offset, mask, splits, SUM: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr):
    """Σ_s parts[s·stride + offset], s in order, BS of them at a time. offset, mask [BE]"""
    total = tl.zeros((BE,), SUM)
    for s0 in tl.range(0, splits, BS):
        s = s0 + tl.arange(0, BS)
        at = s.to(tl.int64)[:, None] * stride + offset[None, :]
        total += tl.sum(tl.load(parts + at, mask=(s < splits)[:, None] & mask[None, :], other=0), 0)
    return total


@triton.jit
def finish_kernel(
    weight_parts,  # [weight_splits, D, K]
    table_parts,  # [sums_splits, table_rows, D]
    bias_parts,  # [bias_splits, D]
    d_weight,  # [D, C, P_t, P_h, P_w], in its parameter's strides
    d_bias,  # [D]
    d_pos,  # [pos_rows, D]
    d_prefix,  # [T, D]
    D, weight_splits, sums_splits, bias_splits, weight_size, table_size,  # elements of one part
    pos_from, prefix_stop,  # rows of the table
    weight_d, weight_c, weight_t, weight_h, weight_w, pos_r, pos_d, prefix_r, prefix_d, bias_d,
    weight_programs, table_programs, scale,
    K: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a pixel where they lie side by side and P_w counts them; 1 otherwise
    WEIGHT: tl.constexpr, TABLE: tl.constexpr, POS: tl.constexpr, PREFIX: tl.constexpr, BIAS: tl.constexpr,
    SCALED: tl.constexpr, SUM: tl.constexpr, INTERPRETED: tl.constexpr,
    BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if WEIGHT and pid < weight_programs:
        e = pid.to(tl.int64) * BE + tl.arange(0, BE)
        real = e < weight_size
        total = _added(weight_parts, weight_size, e, real, weight_splits, SUM, BS, BE)
        if SCALED:
            total *= scale
        d = e // K
        k = (e % K).to(tl.int32)
        px = k % P_w
        py = (k // P_w) % P_h
        pt = (k // (P_w * P_h)) % P_t
        c = k // (P_w * P_h * P_t)
        if CHANNELS > 1:
            c = px % CHANNELS
            px = px // CHANNELS
        at = d * weight_d + c.to(tl.int64) * weight_c + pt * weight_t + py * weight_h + px * weight_w
        tl.store(d_weight + at, rounded(total, d_weight.dtype.element_ty, INTERPRETED), mask=real)
    elif TABLE and pid - weight_programs < table_programs:
        e = (pid - weight_programs).to(tl.int64) * BE + tl.arange(0, BE)
        real = e < table_size
        total = _added(table_parts, table_size, e, real, sums_splits, SUM, BS, BE)
        r = e // D
        d = e % D
        if POS:
            mask = real & (r >= pos_from)
            at = (r - pos_from) * pos_r + d * pos_d
            tl.store(d_pos + at, rounded(total, d_pos.dtype.element_ty, INTERPRETED), mask=mask)
        if PREFIX:
            at = r * prefix_r + d * prefix_d
            tl.store(
                d_prefix + at, rounded(total, d_prefix.dtype.element_ty, INTERPRETED), mask=real & (r < prefix_stop)
            )
    elif BIAS:
        # Many parts of few channels. Other names than above: a variable has one type in both arms of a branch.
        FEW: tl.constexpr = BE // 16
        channel = (pid - weight_programs - table_programs).to(tl.int64) * FEW + tl.arange(0, FEW)
        sums = _added(bias_parts, D, channel, channel < D, bias_splits, SUM, BS * 16, FEW)
        tl.store(d_bias + channel * bias_d, rounded(sums, d_bias.dtype.element_ty, INTERPRETED), mask=channel < D)


@triton.jit
def images_kernel(
    grad,  # [B, T + N, D]
    weight,  # [D, K], in the order of the image's layout
    factor,  # [C]: a of y = (x − m)·a
    d_images,  # [B, C, F, H, W]
    B, F, H, W, T, D, Q_t, Q_h, Q_w, G_t, G_h, G_w,
    image_b, image_c, image_f, image_h, image_w,  # strides of d_images in units of VEC elements; image_w in elements
    grad_b, grad_n, grad_d, scale, steps,
    C: tl.constexpr, CHANNELS: tl.constexpr, K: tl.constexpr,
    P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr,
    pad_t: tl.constexpr, pad_h: tl.constexpr, pad_w: tl.constexpr,
    J_t: tl.constexpr, J_h: tl.constexpr, J_w: tl.constexpr,
    VEC: tl.constexpr, NORMALISED: tl.constexpr, SCALED: tl.constexpr,
    COMPUTE: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pixels by cells of one stride: cell q holds the pixels q·S … q·S + S − 1 of the padded image, which patches
    q − j with 0 ≤ j < J = ⌈P/S⌉ saw, as their elements j·S … j·S + S − 1. So each pixel is summed by one program."""
    pid = tl.program_id(0)
    COLUMNS: tl.constexpr = C * S_t * S_h * S_w
    tiles_n = tl.cdiv(COLUMNS, BN)
    M = B * Q_t * Q_h * Q_w
    m = (pid // tiles_n) * BM + tl.arange(0, BM)
    row = tl.minimum(m, M - 1)
    qx = row % Q_w
    qy = (row // Q_w) % Q_h
    qt = (row // (Q_w * Q_h)) % Q_t
    b = (row // (Q_w * Q_h * Q_t)).to(tl.int64)
    column = (pid % tiles_n) * BN + tl.arange(0, BN)
    rx = column % S_w
    ry = (column // S_w) % S_h
    rt = (column // (S_w * S_h)) % S_t
    c = column // (S_w * S_h * S_t)

    token = b * grad_b + (T + (qt * G_h + qy) * G_w + qx).to(tl.int64) * grad_n
    element = ((c * P_t + rt) * P_h + ry) * P_w + rx
    acc = tl.zeros((BM, BN), SUM)
    for step in tl.range(0, steps):
        j = step % (J_t * J_h * J_w)
        jx = j % J_w
        jy = (j // J_w) % J_h
        jt = j // (J_w * J_h)
        d = (step // (J_t * J_h * J_w)) * BK + tl.arange(0, BK)
        seen = (
            (qt >= jt) & (qt - jt < G_t) & (qy >= jy) & (qy - jy < G_h) & (qx >= jx) & (qx - jx < G_w)
        )  # fmt: skip
        behind = ((jt * G_h + jy) * G_w + jx).to(tl.int64) * grad_n
        at = (token - behind)[:, None] + (d.to(tl.int64) * grad_d)[None, :]
        dy = tl.load(grad + at, mask=seen[:, None] & (d < D)[None, :], other=0)
        there = (column < COLUMNS) & (rt + jt * S_t < P_t) & (ry + jy * S_h < P_h) & (rx + jx * S_w < P_w)
        k = element + (jt * S_t * P_h + jy * S_h) * P_w + jx * S_w
        w = tl.load(weight + d.to(tl.int64)[:, None] * K + k[None, :], mask=(d < D)[:, None] & there[None, :], other=0)
        acc = product(rounded(dy, COMPUTE, INTERPRETED), w, acc, PRECISION, SUM, SETTLE, INTERPRETED)
    if NORMALISED:
        channel = rx % CHANNELS if CHANNELS > 1 else c
        acc *= tl.load(factor + channel, mask=column < COLUMNS, other=0)[None, :]
    if SCALED:
        acc *= scale

    f0 = qt * S_t - pad_t
    h0 = qy * S_h - pad_h
    w0 = qx * S_w - pad_w
    origin = b * image_b + f0.to(tl.int64) * image_f + h0.to(tl.int64) * image_h
    inside = c.to(tl.int64) * image_c + rt.to(tl.int64) * image_f + ry.to(tl.int64) * image_h
    if VEC > 1:
        origin = origin * VEC + w0
        inside = inside * VEC + rx
    else:
        origin = origin + w0.to(tl.int64) * image_w
        inside = inside + rx.to(tl.int64) * image_w
    real = (
        (m < M)[:, None] & (column < COLUMNS)[None, :]
        & (f0[:, None] + rt[None, :] >= 0) & (f0[:, None] + rt[None, :] < F)
        & (h0[:, None] + ry[None, :] >= 0) & (h0[:, None] + ry[None, :] < H)
        & (w0[:, None] + rx[None, :] >= 0) & (w0[:, None] + rx[None, :] < W)
    )  # fmt: skip
    pixel = d_images + origin[:, None] + inside[None, :]
    tl.store(pixel, rounded(acc, d_images.dtype.element_ty, INTERPRETED), mask=real)
