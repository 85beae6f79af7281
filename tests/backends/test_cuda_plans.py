"""What the CUDA C++ backend plans: launches that fit, are aligned, and have every patch and element once. Arithmetic
alone; that kernels do it right is test_cuda.py's, that the driver takes their tensor maps tests/csrc's."""

import math
import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from host import backend
from problems import dense, described, drawn, drawn_patches

import vitkernels as vk
from vitkernels.backends import cuda
from vitkernels.backends.cuda import backward_plan, forward_loaders, images_plan
from vitkernels.backends.cuda.backward_operands import Grad
from vitkernels.backends.cuda.forward_plan import candidates, make_plan
from vitkernels.backends.patch_layout import blocks_of, layout_of, product_of, within_image
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton

ARCHS = (80, 89, 90, 100, 120)
U8, HALF, F32 = torch.uint8, torch.float16, torch.float32
LARGE = 2**31


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divide(chunk: int, *numbers: int) -> bool:
    return all(n % chunk == 0 for n in numbers)


def tables(patch, dtype):
    """Every problem of the tables with this patch and dtype, on every GPU: (problem, GPU, TF32)."""
    for keep, D, B in product((False, True), compile_triton.WIDTHS, compile_triton.BATCHES):
        p = compile_triton.problem(patch, dtype, B=B, D=D, keep=keep)
        for arch in ARCHS:
            yield p, NOMINAL[arch], compile_triton.DTYPES[dtype][2]


def test_what_32_bits_count_is_refused():
    most = 2**31 - 2**16
    for change in (
        dict(W=most, H=1, C=1), dict(W=most // 3 + 1, H=1), dict(F=most, H=1, W=1), dict(B=most // 1024), dict(D=most),
        dict(T=most), dict(pad=(0, most // 2, 0)),
    ):  # fmt: skip
        assert cuda.too_large(described(P=(1, 1, 1), **change)), change
    assert cuda.too_large(described()) == []


def test_an_old_gpu_is_refused(monkeypatch):
    backend.use(monkeypatch, SimpleNamespace(device_type="cpu"), NOMINAL[80]._replace(arch=75))
    assert cuda.why_not(described()) == ["the GPU is sm_75; the kernels need sm_80 or later"]
    backend.forget()


def test_a_stride_past_the_image():
    """It is as good as one that ends with it, however long."""
    assert within_image(described(S=(1, 2**40, 16))) == (1, 32, 16)
    assert cuda.too_large(described(S=(1, 2**40, 16))) == []


# The forward


def check_copies(p, f, images: int) -> None:
    """Copies of `chunk` bytes are aligned, and end where a patch's row does: all offsets are multiples of it."""
    v, size = layout_of(p), p.image_dtype.itemsize
    assert v.strides[4] == 1
    counts = (p.B, v.C, p.F, p.H)
    assert f.chunk in (2, 4, 8, 16)
    assert divide(f.chunk, images, *(s * size for s, n in zip(v.strides[:4], counts, strict=True) if n > 1))
    if f.loader == "copy":
        assert f.chunk >= 4
        assert divide(f.chunk, v.P[2] * size, v.S[2] * size, f.step_k * size)
        if any(p.pad):
            assert divide(f.chunk, v.pad[2] * size, v.W * size)
        across = f.step_k * size // f.chunk
        assert across & (across - 1) == 0 and across <= f.threads


def check_rows(p, f) -> None:
    """A stage holds the rows of the image that a step needs, of all runs of patches that a tile can have."""
    v, size = layout_of(p), p.image_dtype.itemsize
    G_w, P_w, S_w = p.G[2], v.P[2], v.S[2]
    for first in {*range(min(G_w, 600)), G_w - 1}:  # of the tile's patches, in its line of the grid
        assert (first + f.BM - 1) // G_w + 1 <= f.segments
        ahead = first * S_w * size % f.chunk
        run = ((min(f.BM, G_w - first) - 1) * S_w + P_w) * size + ahead
        assert ceil_div(run, f.chunk) * f.chunk <= f.segment_bytes
    assert divide(16, f.segment_bytes) and divide(f.chunk, f.segment_bytes)
    assert f.segments * f.segment_bytes <= f.slot_bytes
    assert f.stage_rows * f.slot_bytes <= f.a_bytes
    assert f.segments * 16 <= f.table_bytes
    for k in range(0, p.K, f.step_k):
        assert (k + f.step_k - 1) // P_w - k // P_w < f.stage_rows


def check_forward(p, gpu, tf32: bool, f, images: int = 0, weight: int = 0) -> None:
    v, image, value = layout_of(p), p.image_dtype.itemsize, p.compute_dtype.itemsize
    product = product_of(p, tf32)
    tensor_cores = {"half": 16, "tf32": 8}.get(product, 0)
    terms = max(f.tf32_terms, 1)
    alignment = 1024 if f.wgmma else 128
    assert f.stages >= 2 and f.shared_bytes <= gpu.shared_bytes
    padded = ceil_div(v.P[2], 16) * 16 if f.loader in forward_loaders.BY_BLOCKS else v.P[2]
    K = p.K // v.P[2] * padded
    assert (f.steps - 1) * f.step_k < K <= f.steps * f.step_k
    assert f.step_k % (tensor_cores or 1) == 0
    assert not f.wgmma or (gpu.arch == 90 and product != "fp64" and f.step_k % 16 == 0)
    assert f.tf32_terms == ({"tf32": 1, "fp32": 2}.get(product, 0) if f.wgmma else 0)
    # A table, then stages of (patches, weight), over which the epilogue stages; wgmma: stages, staging, table, barriers
    assert divide(alignment, f.a_bytes, f.stage_bytes) and divide(128, f.table_bytes)
    assert f.a_bytes + terms * f.BN * f.b_pitch * value <= f.stage_bytes
    assert f.b_pitch >= f.step_k and divide(16, f.b_pitch * value)
    if f.wgmma:
        staging = 8 * 2 * 16 * 64 if f.loader in forward_loaders.STORING else 8 * 16 * (64 + 4) * 4
        staging += 8 * f.step_k * (v.channels_last and p.normalised)
        assert f.stages * f.stage_bytes + staging + f.table_bytes + 16 * f.stages + 16 <= f.shared_bytes
        assert f.step_k * value <= 128 or f.stage_rows == 1 or f.loader == "rows"
    else:
        staging = f.threads // 32 * 16 * (32 + 8) * p.sum_dtype.itemsize
        assert f.table_bytes + max(f.stages * f.stage_bytes, staging) <= f.shared_bytes
    tiles_m = ceil_div(p.B * p.rows, f.BM)
    if f.loader in forward_loaders.BY_BLOCKS:
        assert f.BM * f.step_k * image <= f.a_bytes and f.stage_rows * padded == f.step_k
        assert math.prod(f.block) == f.BM
        grid = (p.B, p.G[0] * p.G[1], p.G[2]) if p.n_keep is None else (p.B, 1, p.rows)
        tiles_m = math.prod(ceil_div(n, m) for n, m in zip(grid, f.block, strict=True))
        if f.loader == "engine":
            assert f.block[2] % f.group == 0 == p.G[2] % f.group
            assert divide(16, f.group * v.S[2] * image, f.BM // f.group)
            assert f.group > 1 or p.P[1] % f.stage_rows == 0
        else:
            assert f.chunk in (4, 16) and f.group == 1
            counts = zip(v.strides[:4], (p.B, v.C, p.F, p.H), strict=True)
            assert divide(f.chunk, images, v.P[2] * image, *(s * image for s, n in counts if n > 1))
            assert divide(f.chunk, v.S[2] * image)
            assert not any(p.pad) or (not p.normalised and divide(f.chunk, v.pad[2] * image, v.W * image))
        if f.loader in forward_loaders.STORING:
            shared = p.pos_rows > 0 and p.n_keep is None and not p.pos_per_image
            positions = f.block[1] * f.block[2] if shared else 1
            assert positions * f.BN <= 4096 and positions * (f.BN + 8) * 4 <= f.table_bytes
            assert p.out_dtype in (p.compute_dtype, F32) and p.D % 8 == 0
            assert shared or p.pos_rows == 0 or (f.loader == "stored" and p.D % f.BN == 0)
    elif f.loader == "rows":
        assert not any(p.pad) and p.n_keep is None
        check_copies(p, f, images)
        check_rows(p, f)
    else:
        row = f.step_k * (value if f.loader == "gather" else image) + 16
        assert f.BM * row <= f.a_bytes and f.BM * 24 <= f.table_bytes
        if f.loader == "copy":
            check_copies(p, f, images)
    if f.lag:  # steps that are there, stages for both warpgroups, and a tile after this one
        assert f.loader in forward_loaders.STORING and f.lag < min(f.steps, f.stages) and f.tiles > f.blocks
    pair = f.cluster // f.splits
    assert f.cluster == 1 or (f.loader in forward_loaders.STORING and divide(8 * f.cluster, f.BN))
    assert f.tiles == ceil_div(tiles_m, pair) * pair * ceil_div(p.D, f.BN) < LARGE
    at_once = gpu.multiprocessors // f.cluster * f.cluster
    assert f.blocks == (min(f.tiles * f.splits, at_once) if f.wgmma else f.tiles)
    if f.splits > 1:  # a block has one tile, sums where the stages were, and whole stores of 64 bytes
        assert f.splits == f.cluster and f.blocks == f.tiles * f.splits and f.steps >= 2 * f.splits
        assert f.BM * f.BN * 4 <= f.stages * f.stage_bytes and divide(32 * f.splits, f.BN)
    if f.pack:
        assert f.weight_row >= terms * K and divide(16 * terms, f.weight_row * value) and f.weight_chunk == 16
        assert f.scratch_bytes == p.D * f.weight_row * value
    else:
        assert f.weight_row == p.K == K and f.weight_chunk >= 4 and f.scratch_bytes == 0
        assert divide(f.weight_chunk, weight, p.K * value)
    assert divide(f.weight_chunk, f.step_k * value, f.b_pitch * value)


@pytest.mark.parametrize("dtype", compile_triton.DTYPES)
@pytest.mark.parametrize("patch", compile_triton.PATCHES)
def test_plans_of_the_tables(patch, dtype):
    for p, gpu, tf32 in tables(patch, dtype):
        found, refused = candidates(p, gpu, tf32)
        for f in found:
            check_forward(p, gpu, tf32, f)
        assert make_plan(p, gpu, tf32).cost == min(f.cost for f in found)
        assert {f.loader for f in found} | set(refused) == set(forward_loaders.LOADERS)


@pytest.mark.parametrize("image", [U8, HALF, F32])
def test_plans_of_random_problems(image):
    rng = random.Random(image.itemsize)
    loaders = dict.fromkeys(forward_loaders.LOADERS, 0)
    for _ in range(1500):
        p, tf32 = drawn_patches(rng, image), rng.random() < 0.5
        images, weight = rng.choice((0, 0, 0, 8, 4, 2)), rng.choice((0, 0, 0, 8, 4))
        gpu = NOMINAL[rng.choice((*ARCHS, 90, 90, 90))]
        for f in candidates(p, gpu, tf32, images, weight)[0]:
            check_forward(p, gpu, tf32, f, images, weight)
            loaders[f.loader] += 1
    assert min(loaders.values()) > 15, loaders


def test_blocks_of_patches():
    for *grid, BM in product((1, 2, 3, 17, 256), (1, 3, 7, 14, 16), (1, 5, 14, 64), (64, 128)):
        chosen = blocks_of(described(grid[0], 1, 1, 16 * grid[1], 16 * grid[2]), BM)
        powers = [2**i for i in range(8)]
        blocks = [(BM // (y * x), y, x) for y, x in product(powers, powers) if y * x <= BM]
        tiles = {block: math.prod(map(ceil_div, grid, block)) for block in blocks}
        fewest = [block for block in blocks if tiles[block] == min(tiles.values())]
        assert chosen in fewest and chosen[2] == max(x for _, _, x in fewest)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("patch", compile_triton.PATCHES)
def test_tiles_of_small_and_large_batches(arch, patch):
    gpu, costs = NOMINAL[arch], {}
    for B in compile_triton.BATCHES:
        p = compile_triton.problem(patch, "bf16", B=B)
        found, chosen = candidates(p, gpu, False)[0], make_plan(p, gpu, False)
        if B == 1 and not chosen.wgmma:
            assert chosen.BM * chosen.BN == min(f.BM * f.BN for f in found)
        if B >= 128:
            assert chosen.BM * chosen.BN >= 128 * 128
        # A kernel whose tiles leave multiprocessors idle is only taken where it beats all that leave none.
        full = [f.cost for f in found if f.tiles >= gpu.multiprocessors]
        assert chosen.tiles >= gpu.multiprocessors or chosen.cost <= min(full, default=math.inf)
        costs[B] = {f.how: f.cost for f in found}
    for fewer, more in zip(compile_triton.BATCHES, compile_triton.BATCHES[1:], strict=False):
        for how in costs[fewer].keys() & costs[more].keys():
            assert costs[fewer][how] <= costs[more][how], (how, more)


# The backward


def plan_of(p, gpu, tf32: bool):
    """Of every gradient there is, in dense strides."""
    images = p.image_strides if p.image_dtype.is_floating_point else None
    return backward_plan.make_plan(
        p, gpu, tf32, 0, Grad(0, dense(p.B, p.T + p.rows, p.D)), weight=True, bias=True, pos=p.pos_rows > 0,
        prefix=p.T > 0, images=images,
    )  # fmt: skip


def check_backward(p, gpu, b) -> None:
    weight, sums, total = b.weight, b.sums, p.sum_dtype.itemsize
    # Copies of dY, of a piece of the images at a time, or dY as it lies
    assert (b.piece == p.B and b.copy_row == 0) or (b.copy_row == ceil_div(p.D, 8) * 8 and weight.wgmma)
    assert 1 <= b.piece <= p.B and (b.piece > 1 or p.B == 1) and ceil_div(p.B, b.piece) * b.piece < p.B + b.piece
    # dW: parts of whole steps have every patch once, tiles every element
    patches = b.piece * p.rows
    if weight.wgmma:
        grid = (b.piece, p.G[0] * p.G[1], p.G[2]) if p.n_keep is None else (b.piece, 1, p.rows)
        patches = 64 * math.prod(ceil_div(n, m) for n, m in zip(grid, weight.block, strict=True))
        assert math.prod(weight.block) == 64 and weight.block[2] % weight.group == 0 == grid[2] % weight.group
        if weight.pixels.chunk:  # threads copy them
            v, size = layout_of(p), p.image_dtype.itemsize
            counts = zip(v.strides[:4], (p.B, v.C, p.F, p.H), strict=True)
            assert v.strides[4] == 1 == weight.group and weight.pixels.chunk in (4, 16)
            assert divide(weight.pixels.chunk, v.P[2] * size, v.S[2] * size, *(s * size for s, n in counts if n > 1))
            assert not any(p.pad) or divide(weight.pixels.chunk, v.pad[2] * size, v.W * size)
            assert not any(p.pad) or not p.normalised
    assert (weight.splits - 1) * weight.chunk < patches <= weight.splits * weight.chunk
    assert weight.chunk % weight.BK == 0
    assert weight.tiles == ceil_div(p.D, weight.BM) * weight.tiles_k
    assert weight.tiles_k * weight.BN >= p.K
    assert weight.splits * weight.tiles < LARGE
    if weight.pair > 1:
        assert weight.wgmma and not weight.pixels.chunk and weight.tiles_k % 2 == 0 and weight.blocks % 2 == 0
    assert weight.shared_bytes <= gpu.shared_bytes
    # Sums: parts have every image once, blocks every row and tiles every channel
    assert (sums.splits - 1) * sums.chunk < b.piece <= sums.splits * sums.chunk
    assert sums.blocks * (256 // sums.lanes) >= sums.last - sums.first
    assert sums.tiles_d * sums.lanes * 8 >= p.D
    assert sums.table_rows == sums.stored - sums.first and sums.last == p.T + p.N
    # Scratch: regions in turn, each large enough
    sizes = {
        "weight_parts": total * weight.splits * p.D * p.K, "table_parts": total * sums.splits * sums.table_rows * p.D,
        "bias_parts": total * sums.splits * sums.blocks * p.D,
        "copies": b.piece * p.rows * b.copy_row * p.compute_dtype.itemsize,
    }  # fmt: skip
    assert not (b.images and b.wgmma_images)
    if b.images:
        sizes["packed"] = b.images.packed * p.compute_dtype.itemsize
    if b.wgmma_images:
        sizes["packed"] = b.wgmma_images.weight_row * p.D * p.compute_dtype.itemsize
    if p.n_keep is not None:
        sizes |= {"heads": 4 * p.B * p.N, "nexts": 4 * p.B * p.rows}
    at = 0
    for name, size in sizes.items():
        assert getattr(b, name) >= at and getattr(b, name) % 256 == 0, name
        at = getattr(b, name) + size
    assert at <= b.scratch_bytes
    if b.images:
        check_classes(p, gpu, b.images)
    if b.wgmma_images:
        check_wgmma_images(p, gpu, b.wgmma_images)


def check_wgmma_images(p, gpu, f) -> None:
    """Tiles have every patch and element once; stages, staging and barriers fit."""
    v, size = layout_of(p), p.image_dtype.itemsize
    row = ceil_div(v.P[2], 16) * 16
    assert gpu.arch == 90 and p.n_keep is None and p.S == p.P and p.G[1] * p.P[1] == p.H and p.G[2] * p.P[2] == p.W
    assert math.prod(f.block) == 128 and f.block[2] % f.group == 0 == p.G[2] % f.group
    assert divide(16, f.group * v.S[2] * size, 128 // f.group)
    assert f.weight_row == p.K // v.P[2] * row and f.tiles_k == ceil_div(f.weight_row, f.BN)
    grid = p.B, p.G[1], p.G[2]
    tiles_m = math.prod(ceil_div(n, m) for n, m in zip(grid, f.block, strict=True))
    assert f.tiles == f.tiles_k * ceil_div(tiles_m, f.pair) * f.pair < LARGE
    assert f.blocks == min(f.tiles, gpu.multiprocessors // f.pair * f.pair) and f.blocks % f.pair == 0
    stage = 128 * 128 + f.BN * 128
    assert f.stages >= 3 and f.stages * (stage + 16) + 8 * 2 * 16 * 16 * size <= f.shared_bytes <= gpu.shared_bytes


def check_classes(p, gpu, images) -> None:
    """Every pixel of a cell is in one class, and that knows how many windows saw it."""
    v = layout_of(p)
    sizes = (p.F, p.H, v.W)
    assert [c * s >= n + e for c, s, n, e in zip(images.cells, v.S, sizes, v.pad, strict=True)] == 3 * [True]
    assert images.M == p.B * math.prod(images.cells)
    BM, BN = images_plan.IMAGE_TILES[product_of(p, False)][:2]
    seen, packed, blocks = 0, 0, 0
    for c in images.classes:
        for axis in range(3):
            P, S = v.P[axis], v.S[axis]
            for r in range(c.first[axis], c.first[axis] + c.size[axis]):
                assert sum(0 <= r + j * S < P for j in range(ceil_div(P, S))) == c.windows[axis]
        assert c.columns == math.prod(c.size) * v.C and c.all_windows == math.prod(c.windows)
        assert c.pitch == ceil_div(c.columns, 8) * 8
        assert (c.packed, c.first_block) == (packed, blocks)
        packed += c.all_windows * p.D * c.pitch
        blocks += ceil_div(images.M, BM) * ceil_div(c.columns, BN)
        seen += math.prod(c.size)
    assert seen == math.prod(v.S)
    assert (images.packed, images.blocks) == (packed, blocks)
    assert images.shared_bytes <= gpu.shared_bytes and blocks < LARGE


@pytest.mark.parametrize("dtype", compile_triton.DTYPES)
@pytest.mark.parametrize("patch", compile_triton.PATCHES)
def test_backward_plans_of_the_tables(patch, dtype):
    for p, gpu, tf32 in tables(patch, dtype):
        check_backward(p, gpu, plan_of(p, gpu, tf32))


@pytest.mark.parametrize("large", [False, True])
def test_backward_plans_of_random_problems(large):
    rng = random.Random(2 + large)
    for _ in range(300):
        p = drawn(rng, large)
        dtype = rng.choice((HALF, torch.bfloat16, F32, torch.float64))
        T = rng.randint(0, 5)
        p = replace(
            p, D=rng.randint(1, 1500), T=T, mean=(0.5,) * p.C if rng.random() < 0.3 else None,
            pos_rows=rng.choice((0, p.N, p.N + T)), image_dtype=dtype, weight_dtype=dtype, compute_dtype=dtype,
            out_dtype=dtype,
        )  # fmt: skip
        gpu = NOMINAL[rng.choice(ARCHS)]
        if not cuda.too_large(p) and 0 not in p.image_strides:
            check_backward(p, gpu, plan_of(p, gpu, False))


@pytest.mark.parametrize("dtype", ["bf16", "uint8->bf16", "fp32", "autocast"])
@pytest.mark.parametrize("arch", ARCHS)
def test_memory_of_the_backward(arch, dtype):
    assert plan_of(compile_triton.problem(16, dtype, B=256), NOMINAL[arch], False).scratch_bytes < 32 * 10**6


@pytest.mark.parametrize(
    ("B", "side", "keep", "piece"),
    [
        (256, 224, None, 43),
        (2048, 224, None, 46),
        (1, 224, None, 1),
        (0, 224, None, None),
        (2, 224, 0, None),
        (2, 1792, None, None),  # 19 MB of copies of each, and 39 of positions
        (1, 896, None, 1),
    ],
)
def test_images_whose_gradient_of_tokens_is_copied_at_a_time(B, side, keep, piece):
    images = torch.empty(B, 3, side, side, dtype=HALF, device="meta")
    weight = torch.empty(768, 3, 16, 16, dtype=HALF, device="meta")
    kept = None if keep is None else torch.empty(B, keep, dtype=torch.int64, device="meta")
    p = vk.explain(images, weight, keep=kept, out_dtype=F32).problem
    found = backward_plan.copied_plan(p, NOMINAL[90], False, 0, bias=True, pos=True, prefix=False)
    assert (found and found.piece) == piece


@pytest.mark.parametrize(("patch", "dtype", "batch", "taken"), [
    (16, "bf16", 256, True),
    (16, "uint8->bf16", 256, True),
    (32, "bf16", 256, True),
    (14, "bf16", 256, True),
    (14, "uint8->bf16", 256, True),
    (16, "tf32", 256, False),
    (16, "bf16", 1, True),
])  # fmt: skip
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_weights_gradient_by_wgmma(arch, patch, dtype, batch, taken):
    plan = plan_of(compile_triton.problem(patch, dtype, B=batch), NOMINAL[arch], dtype == "tf32")
    assert plan.weight.wgmma == (taken and arch == 90)


@pytest.mark.parametrize(("W", "patch", "image", "reason"), [
    (224, 14, HALF, ""),
    (336, 14, U8, ""),
    (518, 14, HALF, "rows are 1036 bytes apart, no multiple of 16"),
    (240, 14, HALF, "17 patches in a line, no multiple of the 4 of which one begins on 16 bytes"),
    (224, 14, F32, ""),
    (272, 17, U8, "one of 16 patches begins on 16 bytes, of 8 at least it must"),
])  # fmt: skip
def test_patches_in_groups(W, patch, image, reason):
    """Both directions take and refuse the same, with the same words. (For the gradient, threads may then.)"""
    p = described(8, 3, 1, W, W, (1, patch, patch), (1, patch, patch), image=image, compute=HALF, D=64)
    assert candidates(p, NOMINAL[90], False)[1].get("engine", "") == reason
    assert backward_plan.not_by_engine(p, 0) == reason
    none = backward_plan.no_wgmma(p, NOMINAL[90], 0, Grad(0, dense(p.B, p.T + p.rows, p.D)))
    assert none == (f"{reason}; patches begin at multiples of 1 bytes, of 4 at least they must" if patch % 2 else "")


@pytest.mark.parametrize("normalised", [False, True])
def test_padded_rows_of_channels(normalised):
    """A channels-last pixel's channel is k % C, which padding of rows would shift."""
    H, W, C = 40, 320, 3
    p = described(
        8, C, 1, H, W, (1, 20, 20), (1, 20, 20), strides=(H * W * C, 1, H * W * C, W * C, C),
        image=U8, compute=HALF, D=64, normalised=normalised,
    )  # fmt: skip
    reasons = candidates(p, NOMINAL[90], False)[1]
    expected = "normalised patch rows of 60 elements, padded to 64, no multiple of 3 channels" * normalised
    assert [reasons.get(loader, "") for loader in ("engine", "stored", "copied")] == [expected] * 3
