"""The C++ extension's arithmetic without data (csrc: patch_layout.h, the plans, weight_sm90.h), compiled
for the CPU; and kernels that were broken on purpose, which the emulator must not run as if nothing were wrong."""

import math
import multiprocessing
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from host import build

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.backends import cuda
from vitkernels.backends.cuda import extension
from vitkernels.dispatch import canonical
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton
from vitkernels.testing import verify

ARCHS = (80, 89, 90, 100, 120)
DTYPES = cuda.DTYPES
U8, HALF, BF16, F32, F64 = DTYPES[:5]
ADDRESS = 1 << 20  # of tensors that have no data


@pytest.fixture(scope="module")
def csrc():
    try:
        return build.arithmetic()
    except build.NoCompiler as reason:
        pytest.skip(str(reason))


def gpu_of(arch: int) -> tuple[int, int, int]:
    gpu = NOMINAL[arch]
    return gpu.arch, gpu.multiprocessors, gpu.shared_bytes


def dense(*sizes: int) -> tuple[int, ...]:
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def described(
    B=2, C=3, F=1, H=32, W=32, P=(1, 16, 16), S=None, pad=(0, 0, 0), *, D=64, T=0, keep=None, pos_rows=0, strides=None,
    normalised=False, scale=1.0, tf32=False, image=HALF, compute=HALF,
) -> dict:  # fmt: skip
    """A problem as vitkernels/backends/cuda/__init__.py describes it to C++."""
    S = S or P
    G = tuple((size + 2 * p - patch) // step + 1 for size, p, patch, step in zip((F, H, W), pad, P, S, strict=True))
    N = math.prod(G)
    return {
        "B": B, "C": C, "F": F, "H": H, "W": W, "P": P, "S": S, "pad": pad, "G": G, "D": D, "T": T, "N": N,
        "rows": N if keep is None else keep, "K": C * math.prod(P), "keep": keep is not None, "pos_rows": pos_rows,
        "strides": strides or dense(B, C, F, H, W), "normalised": normalised, "scale": scale, "tf32": tf32,
        **{name: DTYPES.index(dtype) for name, dtype in
           (("image", image), ("weight", compute), ("compute", compute), ("out", compute))},
    }  # fmt: skip


def of(monkeypatch, p, tf32=False) -> dict:
    """The description of a PatchProblem."""
    with monkeypatch.context() as patch:
        patch.setattr(extension, "load", lambda: SimpleNamespace(Problem=dict))
        return cuda._problem.__wrapped__(p, tf32)


def is_last(d: dict) -> bool:
    return d["C"] > 1 and d["strides"][1] == 1 and d["strides"][4] == d["C"]


def size_of(d: dict, name: str) -> int:
    return DTYPES[d[name]].itemsize


# Offsets


class Exact:
    """Where everything lies, in Python's integers."""

    def __init__(self, d: dict):
        self.d = d

    def element(self, k: int) -> tuple[int, int, int, int]:
        """(c, t, y, x) of element k of a patch: c varies slowest, or fastest where pixels lie channels last."""
        C, (P_t, P_h, P_w) = self.d["C"], self.d["P"]
        if is_last(self.d):
            return k % C, k // (C * P_w * P_h), k // (C * P_w) % P_h, k // C % P_w
        return k // (P_t * P_h * P_w), k // (P_h * P_w) % P_t, k // P_w % P_h, k % P_w

    def place(self, n: int, k: int) -> list[int]:
        """(f, h, w) in the image of element k of patch n, in the padding outside of it."""
        (_, G_h, G_w), (_, *within) = self.d["G"], self.element(k)
        cell = n // (G_h * G_w), n // G_w % G_h, n % G_w
        return [g * s - p + e for g, s, p, e in zip(cell, self.d["S"], self.d["pad"], within, strict=True)]

    def offset(self, b: int, n: int, k: int) -> int:
        c, index = self.element(k)[0], self.place(n, k)
        return sum(i * s for i, s in zip((b, c, *index), self.d["strides"], strict=True))

    def inside(self, n: int, k: int) -> bool:
        sizes = (self.d["F"], self.d["H"], self.d["W"])
        return all(0 <= i < size for i, size in zip(self.place(n, k), sizes, strict=True))


def drawn(rng: random.Random, large: bool) -> dict:
    """A random problem; a large one has images of gigabytes and more."""
    one = rng.choice
    video = rng.random() < 0.3
    C, H, W, F = one((1, 3, 3, 4, 12)), rng.randint(1, 70), rng.randint(1, 70), rng.randint(1, 9) if video else 1
    if large:
        C, H, W = one((1, 3, 16, 100)), rng.randint(500, 60_000), rng.randint(500, 60_000)
        F = rng.randint(1, 300) if video else 1
    side = one((1, 2, 7, 14, 16, 32, 200)) if large else one((1, 2, 3, 7, 14, 16))
    P = (rng.randint(1, min(F, 4)), min(H, side), min(W, one((side, side, 8, 5))))
    pad = tuple(rng.randint(0, p) if rng.random() < 0.2 else 0 for p in P[1:])
    S = tuple(one((p, p, max(1, p // 2), p + 3)) for p in P)
    pad = (rng.randint(0, 1) if video and rng.random() < 0.2 else 0, *pad)
    layout = one(("planar", "planar", "last", "apart", "expanded"))
    strides = dense(1, C, F, H, W)
    if layout == "last":
        strides = (F * H * W * C, 1, H * W * C, W * C, C)
    elif layout == "apart":  # cut out of larger images
        step, strides = 1, []
        for size in (W, H, F, C, 1):
            strides.insert(0, step * one((1, 1, 2)))
            step = strides[0] * (size + rng.randint(0, 16))
    elif layout == "expanded":
        strides = (strides[0], 0, *strides[2:])
    most = max(1, (2**31 - 2**17) // math.prod(described(1, C, F, H, W, P, S, pad)["G"]))
    B = rng.randint(1, min(most, 2**20)) if large else rng.randint(1, 5)
    return described(B, C, F, H, W, P, S, pad, strides=tuple(strides))


@pytest.mark.parametrize("large", [False, True])
def test_offsets(csrc, large):
    rng = random.Random(large)
    farthest, skipped = [], 0
    for _ in range(600):
        d = drawn(rng, large)
        if csrc.why_not(d, gpu_of(90)):
            skipped += 1
            continue
        walk, exact = csrc.Walk(d), Exact(d)
        assert walk.channels_last == is_last(d)
        weights = dense(64, d["C"], *d["P"]), (2**40, 1, 2**33 + 1, 5, 2**31 - 1), (7, 0, 0, 2**35, -3)
        for _ in range(20):
            b, n, k = (rng.choice((rng.randrange(size), size - 1)) for size in (d["B"], d["N"], d["K"]))
            (from_, f, h, w), (offset, t, y, x) = walk.corner(b, n), walk.element(k)
            c, *element = exact.element(k)
            assert from_ + offset == exact.offset(b, n, k), (d, b, n, k)
            if not walk.channels_last:
                assert [f + t, h + y, w + x] == exact.place(n, k), (d, n, k)
            assert walk.inside(b, n, k) == exact.inside(n, k), (d, n, k)
            assert walk.channel(k) == c
            for strides in weights:
                assert walk.weight_offset(k, strides) == sum(
                    i * s for i, s in zip((c, *element), strides[1:], strict=True)
                )
            farthest.append(exact.offset(b, n, k))
    assert skipped < 100
    for power in (31, 32, 40) if large else ():
        assert sum(offset > 2**power for offset in farthest) > 500


def test_divisors(csrc):
    rng = random.Random(0)
    divisors = [*range(1, 600), 2**16, 2**30, 2**31 - 1, *(rng.randrange(1, 2**31) for _ in range(400))]
    for divisor in divisors:
        whole = rng.randrange(2**31 // divisor) * divisor if divisor < 2**31 - 1 else 0
        for n in (0, 1, divisor - 1, divisor, whole, whole + 1, max(whole, 1) - 1, 2**31 - 1, rng.randrange(2**31)):
            if n < 2**31:
                assert csrc.divided(divisor, n) == divmod(n, divisor), (n, divisor)


def test_what_32_bits_count_is_refused(csrc):
    most = 2**31 - 2**16
    for change in (
        dict(W=most, H=1, C=1), dict(W=most // 3 + 1, H=1), dict(F=most, H=1, W=1), dict(B=most // 1024), dict(D=most),
        dict(T=most), dict(pad=(0, most // 2, 0)), dict(S=(1, 1, most)),
    ):  # fmt: skip
        assert csrc.why_not(described(P=(1, 1, 1), **change), gpu_of(90)), change
    assert csrc.why_not(described(), gpu_of(90)) == []
    assert csrc.why_not(described(), (75, 40, 65536)) == ["the GPU is sm_75; the kernels need sm_80 or later"]


# Plans of the forward


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def divide(chunk: int, *numbers: int) -> bool:
    return all(n % chunk == 0 for n in numbers)


def check_copies(d: dict, f: dict, images: int) -> None:
    """Copies of `chunk` bytes are aligned, and end where a patch's row does: all offsets are multiples of it."""
    size, chunk, wide = size_of(d, "image"), f["chunk"], d["C"] if is_last(d) else 1
    b, c, t, h, w = d["strides"]
    assert (1 if is_last(d) else w) == 1
    steps = [b * (d["B"] > 1), 0 if is_last(d) else c * (d["C"] > 1), t * (d["F"] > 1), h * (d["H"] > 1)]
    assert chunk in (2, 4, 8, 16)
    assert divide(chunk, images, *(s * size for s in steps))
    if f["road"] == "copy":
        assert chunk >= 4
        assert divide(chunk, d["P"][2] * wide * size, d["S"][2] * wide * size, f["step_k"] * size)
        if any(d["pad"]):
            assert divide(chunk, d["pad"][2] * wide * size, d["W"] * wide * size)
        across = f["step_k"] * size // chunk
        assert across & (across - 1) == 0 and across <= f["threads"]


def check_rows(d: dict, f: dict) -> None:
    """A stage holds the rows of the image that a step needs, of all runs of patches that a tile can have."""
    size, chunk, BM, wide = size_of(d, "image"), f["chunk"], f["BM"], d["C"] if is_last(d) else 1
    G_w, P_w, S_w = d["G"][2], d["P"][2] * wide, d["S"][2] * wide
    for first in {*range(min(G_w, 600)), G_w - 1}:  # of the tile's patches, in its line of the grid
        assert (first + BM - 1) // G_w + 1 <= f["segments"]
        ahead = first * S_w * size % chunk
        run = ((min(BM, G_w - first) - 1) * S_w + P_w) * size + ahead
        assert ceil_div(run, chunk) * chunk <= f["segment_bytes"]
    assert divide(16, f["segment_bytes"]) and divide(chunk, f["segment_bytes"])
    assert f["segments"] * f["segment_bytes"] <= f["slot_bytes"]
    assert f["stage_rows"] * f["slot_bytes"] <= f["a_bytes"]
    assert f["segments"] * 16 <= f["table_bytes"]
    for k in range(0, d["K"], f["step_k"]):
        assert (k + f["step_k"] - 1) // P_w - k // P_w < f["stage_rows"]


def check_maps(d: dict, f: dict) -> None:
    """The driver takes the maps, and what a step's copies bring is what its barrier was told, to the byte."""
    maps = [f[name] for name in ("weight_map", "image_map") if name in f]
    for m in maps:
        assert m["refused"] == ""
        assert all(1 <= n <= 256 for n in m["block"])
        assert all(0 < s < 2**40 and s % 16 == 0 for s in m["strides"][1:])
        assert m["swizzle"] in (0, m["block"][0] * m["itemsize"])
    weight = f["weight_map"]
    assert math.prod(weight["block"]) * 2 == f["BN"] * f["step_k"] * 2
    assert weight["block"][0] * weight["block"][2] == f["step_k"] and weight["sizes"][1] == d["D"]
    assert ceil_div(d["K"], 16) * 16 <= weight["sizes"][0] * weight["sizes"][2] == f["weight_row"]
    if f["road"] != "patches":
        return
    image, size, wide = f["image_map"], size_of(d, "image"), d["C"] if is_last(d) else 1
    copies = d["P"][2] * wide // f["box"]
    assert copies * math.prod(image["block"]) * size == f["BM"] * f["step_k"] * size
    assert copies * f["box"] == d["P"][2] * wide
    assert image["sizes"] == [d["P"][2] * wide, d["G"][2], d["G"][1], d["B"], (1 if is_last(d) else d["C"]) * d["H"]]
    # Each copy's place: the copy engine writes to multiples of 128 bytes, swizzled to eight rows' span.
    assert f["stage_rows"] * f["BM"] * f["box"] * size % max(128, 8 * image["swizzle"]) == 0


def check_forward(d: dict, gpu: tuple, f: dict, images: int = ADDRESS, weight: int = ADDRESS, row: int = 0) -> None:
    arch, multiprocessors, shared = gpu
    image, value, K, D = size_of(d, "image"), size_of(d, "compute"), d["K"], d["D"]
    BM, BN, road, hopper, stages = f["BM"], f["BN"], f["road"], f["hopper"], f["stages"]
    alignment, total = (1024 if hopper else 128), 8 if value == 8 else 4
    tensor_cores = 0 if value == 8 else 16 if value == 2 else 8 if d["tf32"] else 0
    assert stages >= 2 and f["shared_bytes"] <= shared
    assert (f["steps"] - 1) * f["step_k"] < K <= f["steps"] * f["step_k"]
    assert f["step_k"] % (tensor_cores or 1) == 0
    assert not hopper or (arch == 90 and tensor_cores == 16 and f["step_k"] % 16 == 0)
    # A table, then stages of (patches, weight), over which slices of sums lie; Hopper: stages, slices, table, barriers
    assert divide(alignment, f["a_bytes"], f["stage_bytes"]) and divide(128, f["table_bytes"])
    assert f["a_bytes"] + BN * f["b_pitch"] * value <= f["stage_bytes"]
    assert f["b_pitch"] >= f["step_k"] and divide(16, f["b_pitch"] * value)
    if hopper:
        slices = 8 * 16 * (64 + 4) * 4
        assert stages * f["stage_bytes"] + slices + f["table_bytes"] + 16 * stages <= f["shared_bytes"]
    else:
        slices = f["threads"] // 32 * 16 * (32 + 8) * total
        assert f["table_bytes"] + max(stages * f["stage_bytes"], slices) <= f["shared_bytes"]
    if road == "gather":
        assert BM * (f["step_k"] * value + 16) <= f["a_bytes"] and BM * 24 <= f["table_bytes"]
    elif road == "copy":
        assert BM * (f["step_k"] * image + 16) <= f["a_bytes"] and BM * 24 <= f["table_bytes"]
        check_copies(d, f, images)
    elif road == "rows":
        assert not any(d["pad"]) and not d["keep"]
        check_copies(d, f, images)
        check_rows(d, f)
    else:
        assert BM * f["step_k"] * image <= f["a_bytes"] and f["steps"] * f["step_k"] == K
        assert math.prod(f["block"]) == BM and d["P"][1] % f["stage_rows"] == 0
        assert f["stage_rows"] * d["P"][2] * (d["C"] if is_last(d) else 1) == f["step_k"]
    # Tiles
    tiles_m = ceil_div(d["B"] * d["rows"], BM)
    if road == "patches":
        tiles_m = math.prod(ceil_div(n, m) for n, m in zip((d["B"], *d["G"][1:]), f["block"], strict=True))
    assert f["tiles"] == tiles_m * ceil_div(D, BN) < 2**31
    assert f["blocks"] == (min(f["tiles"], multiprocessors) if hopper else f["tiles"])
    # The weight
    if f["pack"]:
        assert f["weight_row"] >= K and divide(16, f["weight_row"] * value) and f["weight_chunk"] == 16
        assert f["scratch_bytes"] == D * f["weight_row"] * value
    else:
        assert f["weight_row"] == row and f["weight_chunk"] >= 4 and f["scratch_bytes"] == 0
        assert divide(f["weight_chunk"], weight, row * value, K * value)
    assert divide(f["weight_chunk"], f["step_k"] * value, f["b_pitch"] * value)
    if hopper:
        check_maps(d, f)


def tensors_of(d: dict, images: int = ADDRESS, weight: int = ADDRESS) -> tuple[tuple, tuple]:
    return (images, d["image"], *d["strides"]), (weight, d["weight"], *dense(d["D"], d["C"], *d["P"]))


@pytest.mark.parametrize("dtype", compile_triton.DTYPES)
@pytest.mark.parametrize("patch", compile_triton.PATCHES)
def test_plans_of_the_tables(csrc, monkeypatch, patch, dtype):
    tf32 = compile_triton.DTYPES[dtype][2]
    for keep, D, B in product((False, True), compile_triton.WIDTHS, compile_triton.BATCHES):
        d = of(monkeypatch, compile_triton.problem(patch, dtype, B=B, D=D, keep=keep), tf32)
        for arch in ARCHS:
            gpu = gpu_of(arch)
            found = csrc.forward_candidates(d, gpu, *tensors_of(d))
            for f in found:
                check_forward(d, gpu, f, row=d["K"])
            chosen = csrc.plan_forward(d, gpu, *tensors_of(d))
            assert chosen["cost"] == min(f["cost"] for f in found)


@pytest.mark.parametrize("image", [U8, HALF, F32])
def test_plans_of_random_problems(csrc, image):
    rng = random.Random(image.itemsize)
    roads = dict.fromkeys(("gather", "copy", "rows", "patches"), 0)
    for _ in range(1500):
        one = rng.choice
        compute = one((HALF, HALF, HALF, BF16, F32, F64))
        P = one((2, 4, 8, 10, 14, 14, 16, 16, 16, 18, 32, 48, 130))
        H, W, C, B = rng.randint(1, 9) * P + one((0, 1)), rng.randint(1, 40) * P, one((1, 3, 3, 4)), rng.randint(1, 300)
        H, W = H + one((0, 0, 3)), W + one((0, 0, 0, 2, 8))
        pitch = W + one((0, 0, 4, 16))
        strides = one((
            (C * H * pitch, H * pitch, H * pitch, pitch, 1), (C * H * pitch + 8, H * pitch, 0, pitch, 1),
            (H * W * C, 1, H * W * C, W * C, C),
        ))  # fmt: skip
        pad = one((0, 0, 0, 0, 2))
        d = described(
            B, C, 1, H, W, (1, P, P), (1, one((P, P, P // 2)), one((P, P, P, P + 2))), (0, pad, pad),
            strides=strides, image=image, compute=compute, D=one((8, 72, 256, 1000)), tf32=rng.random() < 0.5,
            normalised=rng.random() < 0.3, keep=5 if rng.random() < 0.1 else None,
        )  # fmt: skip
        images, weight = ADDRESS + one((0, 0, 0, 8, 4, 2)), ADDRESS + one((0, 0, 0, 8, 4))
        gpu = gpu_of(one((*ARCHS, 90, 90, 90)))
        for f in csrc.forward_candidates(d, gpu, *tensors_of(d, images, weight)):
            check_forward(d, gpu, f, images, weight, d["K"])
            roads[f["road"]] += 1
    assert min(roads.values()) > 25, roads


def test_blocks_of_patches(csrc):
    for *grid, BM in product((1, 2, 3, 17, 256), (1, 3, 7, 14, 16), (1, 5, 14, 64), (64, 128)):
        chosen = csrc.choose_block(described(grid[0], 1, 1, 16 * grid[1], 16 * grid[2]), BM)
        powers = [2**i for i in range(8)]
        blocks = [(BM // (y * x), y, x) for y, x in product(powers, powers) if y * x <= BM]
        tiles = {block: math.prod(map(ceil_div, grid, block)) for block in blocks}
        fewest = [block for block in blocks if tiles[block] == min(tiles.values())]
        assert tuple(chosen) in fewest and chosen[2] == max(x for _, _, x in fewest)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("patch", compile_triton.PATCHES)
def test_tiles_of_small_and_large_batches(csrc, monkeypatch, arch, patch):
    gpu, costs = gpu_of(arch), {}
    for B in compile_triton.BATCHES:
        d = of(monkeypatch, compile_triton.problem(patch, "bf16", B=B))
        found = csrc.forward_candidates(d, gpu, *tensors_of(d))
        chosen = csrc.plan_forward(d, gpu, *tensors_of(d))
        area = {f["BM"] * f["BN"] for f in found}
        if B == 1:
            assert chosen["BM"] * chosen["BN"] == min(area)
        if B >= 128:
            assert chosen["BM"] * chosen["BN"] >= 128 * 128
        # A kernel whose tiles leave multiprocessors idle is only taken where it beats all that leave none.
        full = [f["cost"] for f in found if f["tiles"] >= gpu[1]]
        assert chosen["tiles"] >= gpu[1] or chosen["cost"] <= min(full, default=math.inf)
        costs[B] = {f["how"]: f["cost"] for f in found}
    for fewer, more in zip(compile_triton.BATCHES, compile_triton.BATCHES[1:], strict=False):
        for how in costs[fewer].keys() & costs[more].keys():
            assert costs[fewer][how] <= costs[more][how], (how, more)


# Plans of the backward


def backward_tensors(d: dict) -> tuple:
    """dY, images, weight, keep, m and a, and all gradients, as vitkernels/backends/cuda/__init__.py hands them over."""
    images, weight = tensors_of(d)
    rows, D = d["T"] + d["rows"], d["D"]

    def table(*sizes):
        return (ADDRESS, d["weight"], *dense(*sizes))

    return (
        (ADDRESS, d["out"], *dense(d["B"], rows, D)), images, weight, (ADDRESS, 8, d["rows"], 1) if d["keep"] else None,
        (ADDRESS, 3, d["C"], 1) if d["normalised"] else None, None if d["image"] == 0 else images, weight,
        table(D), table(1, d["pos_rows"], D) if d["pos_rows"] else None, table(1, d["T"], D) if d["T"] else None,
    )  # fmt: skip


def check_backward(d: dict, gpu: tuple, b: dict) -> None:
    D, K, total = d["D"], d["K"], 8 if size_of(d, "compute") == 8 else 4
    weight, sums = b["weight"], b["sums"]
    # dW: parts of whole steps have every patch once, tiles every element
    patches = d["B"] * d["rows"]
    if weight["hopper"]:
        patches = 64 * math.prod(ceil_div(n, m) for n, m in zip((d["B"], *d["G"][1:]), weight["block"], strict=True))
        assert math.prod(weight["block"]) == 64
    assert (weight["splits"] - 1) * weight["chunk"] < patches <= weight["splits"] * weight["chunk"]
    assert weight["chunk"] % weight["BK"] == 0
    assert weight["tiles"] == ceil_div(D, weight["BM"]) * weight["tiles_k"]
    assert weight["tiles_k"] * weight["BN"] >= K
    assert weight["splits"] * weight["tiles"] < 2**31
    assert weight["shared_bytes"] <= gpu[2]
    # Sums: parts have every image once, blocks every row and tiles every channel
    assert (sums["splits"] - 1) * sums["chunk"] < d["B"] <= sums["splits"] * sums["chunk"]
    assert sums["blocks"] * (256 // sums["lanes"]) >= sums["last"] - sums["first"]
    assert sums["tiles_d"] * sums["lanes"] * 8 >= D
    assert sums["table_rows"] == sums["stored"] - sums["first"] and sums["last"] == d["T"] + d["N"]
    # Scratch
    at = 0
    for name, begin, size, count in sorted(b["regions"], key=lambda region: region[1]):
        assert begin >= at and begin % 256 == 0, name
        at = begin + size * count
    assert at <= b["scratch_bytes"]
    counts = {name: size * count for name, _, size, count in b["regions"]}
    assert counts["weight_parts"] == total * weight["splits"] * D * K
    assert counts["bias_parts"] == total * sums["splits"] * sums["blocks"] * D
    if d["keep"]:
        assert (counts["heads"], counts["nexts"]) == (4 * d["B"] * d["N"], 4 * d["B"] * d["rows"])
    if "images" in b:
        check_classes(d, gpu, b["images"])


def check_classes(d: dict, gpu: tuple, images: dict) -> None:
    """Every pixel of a cell is in one class, and that knows how many windows saw it."""
    wide = d["C"] if is_last(d) else 1
    P, sizes = (*d["P"][:2], d["P"][2] * wide), (d["F"], d["H"], d["W"] * wide)
    pads = (*d["pad"][:2], d["pad"][2] * wide)
    S = [min(s, max(p, n + e)) for s, p, n, e in zip((*d["S"][:2], d["S"][2] * wide), P, sizes, pads, strict=True)]
    assert [c * s >= n + e for c, s, n, e in zip(images["cells"], S, sizes, pads, strict=True)] == 3 * [True]
    assert images["M"] == d["B"] * math.prod(images["cells"])
    seen, packed, blocks = 0, 0, 0
    for c in images["classes"]:
        for axis in range(3):
            for r in range(c["first"][axis], c["first"][axis] + c["size"][axis]):
                windows = sum(0 <= r + j * S[axis] < P[axis] for j in range(ceil_div(P[axis], S[axis])))
                assert windows == c["windows"][axis]
        assert c["columns"] == math.prod(c["size"]) * (1 if is_last(d) else d["C"])
        assert c["pitch"] == ceil_div(c["columns"], 8) * 8
        assert (c["packed"], c["first_block"]) == (packed, blocks)
        packed += math.prod(c["windows"]) * d["D"] * c["pitch"]
        blocks += ceil_div(images["M"], images["BM"]) * ceil_div(c["columns"], images["BN"])
        seen += math.prod(c["size"])
    assert seen == math.prod(S)
    assert (images["packed"], images["blocks"]) == (packed, blocks)
    assert images["shared_bytes"] <= gpu[2] and blocks < 2**31


@pytest.mark.parametrize("dtype", compile_triton.DTYPES)
@pytest.mark.parametrize("patch", compile_triton.PATCHES)
def test_backward_plans_of_the_tables(csrc, monkeypatch, patch, dtype):
    tf32 = compile_triton.DTYPES[dtype][2]
    for keep, D, B in product((False, True), compile_triton.WIDTHS, compile_triton.BATCHES):
        d = of(monkeypatch, compile_triton.problem(patch, dtype, B=B, D=D, keep=keep), tf32)
        for arch in ARCHS:
            check_backward(d, gpu_of(arch), csrc.plan_backward(d, gpu_of(arch), backward_tensors(d)))


@pytest.mark.parametrize("large", [False, True])
def test_backward_plans_of_random_problems(csrc, large):
    rng = random.Random(2 + large)
    for _ in range(300):
        d = drawn(rng, large)
        d |= {"D": rng.randint(1, 1500), "T": rng.randint(0, 5), "normalised": rng.random() < 0.3}
        d |= {"pos_rows": rng.choice((0, d["N"], d["N"] + d["T"]))}
        d |= dict.fromkeys(("compute", "weight", "out", "image"), rng.randint(1, 4))
        gpu = gpu_of(rng.choice(ARCHS))
        if not csrc.backward_refused(d) and 0 not in d["strides"]:
            check_backward(d, gpu, csrc.plan_backward(d, gpu, backward_tensors(d)))


@pytest.mark.parametrize("dtype", ["bf16", "uint8->bf16", "fp32", "autocast"])
@pytest.mark.parametrize("arch", ARCHS)
def test_memory_of_the_backward(csrc, monkeypatch, arch, dtype):
    d = of(monkeypatch, compile_triton.problem(16, dtype, B=256))
    assert csrc.plan_backward(d, gpu_of(arch), backward_tensors(d))["scratch_bytes"] < 32 * 10**6


# Kernels, and the same broken on purpose


def arguments(B, C, H, W, P, D, pixels=HALF, **more) -> dict:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(B, C, H, W, generator=generator)
    return dict(
        images=(images * 255).byte() if pixels == U8 else images.to(pixels),
        weight=(torch.randn(D, C, P, P, generator=generator) * (C * P * P) ** -0.5).half(),
        bias=torch.randn(D, generator=generator).half(), **more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def forget_after(on_cuda_kernels):
    """What is cached of an emulated GPU ends with the test: on_cuda_kernels sees to it."""


def use(monkeypatch, module, arch: int, multiprocessors: int) -> None:
    gpu = NOMINAL[arch]._replace(multiprocessors=multiprocessors)
    monkeypatch.setattr(extension, "load", lambda: module)
    monkeypatch.setattr(extension, "missing", lambda: "")
    monkeypatch.setattr(cuda, "gpu_of", lambda device: gpu)
    for cached in (cuda._gpu, cuda._plan, cuda._problem, dispatch._choose):
        cached.cache_clear()


def wrong_tokens(road: str, **arguments) -> list[str]:
    """What is wrong with the forward on each plan of this road."""
    p = vk.explain(**arguments).problem
    tensors = canonical(*(arguments[name] for name in ("images", "weight", "bias")), None, None, None)
    exact, eager = verify.oracle(**arguments), verify.eager(**arguments)
    bound = 2 * verify.error_of(eager, exact) + exact.abs().max().item() * torch.finfo(p.compute_dtype).eps
    plans = {how: q for how, q in cuda.candidates(p, *tensors[:2]).items() if road in how.replace(BY_16, "")}
    assert plans
    errors = {how: verify.error_of(cuda.forward(p, *tensors, plan=plan), exact) for how, plan in plans.items()}
    return [f"{how}: {error} above {bound}" for how, error in errors.items() if not error <= bound]


def wrong_gradients(**arguments) -> list[str]:
    return [str(row) for row in verify.compare(arguments, "cuda", gradients=True) if not row["ok"]]


def alone(act):
    """What act() returns in a process of its own: a broken kernel may write anywhere."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)  # a fork has no more
        try:
            send.send(act())
        except RuntimeError as error:  # the emulator's
            send.send([str(error)])

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        return [f"ended with {process.exitcode}"]
    finally:
        process.join()


COPY, ROWS, ENGINE = "pixels copied asynchronously", "image rows copied whole", "patches cut by the copy engine"
BY_16 = " (16 bytes at a time)"
CASES = {  # architecture, and what is computed there: on one multiprocessor, so that a block has many tiles or steps
    "copy": (80, lambda: wrong_tokens(COPY, **arguments(2, 3, 32, 48, 16, 72))),
    "rows": (80, lambda: wrong_tokens(ROWS, **arguments(2, 3, 28, 42, 14, 72))),
    "hopper": (90, lambda: wrong_tokens(ENGINE, **arguments(33, 3, 64, 48, 16, 264))),
    "hopper, bytes": (90, lambda: wrong_tokens(ENGINE, **arguments(33, 3, 64, 48, 16, 264, U8, mean=0.5, std=0.2))),
    "hopper, rows": (90, lambda: wrong_tokens(f"{ROWS}, wgmma", **arguments(33, 1, 56, 56, 14, 264))),
    "backward": (80, lambda: wrong_gradients(**arguments(3, 3, 32, 48, 16, 72))),
    "backward, bytes": (80, lambda: wrong_gradients(**arguments(40, 3, 32, 48, 16, 72, U8, mean=0.5, std=0.2))),
    "backward, hopper": (90, lambda: wrong_gradients(**arguments(40, 3, 32, 48, 16, 72))),
}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_right_as_they_are(host_extension, monkeypatch, case, seed):
    arch, act = CASES[case]
    monkeypatch.setenv("VITKERNELS_HOST_SEED", str(seed))
    use(monkeypatch, host_extension, arch, multiprocessors=1)
    assert act() == []


FORWARD, HOPPER, BACKWARD = (
    "forward/instances/forward_sm80_f16.cu",
    "forward/instances/forward_sm90_f16.cu",
    "backward/instances/backward_sm80_f16.cu",
)


MUTATIONS = {  # object, header, what it says and what it is to say, and the case that shows it
    "a row of a fragment": (FORWARD, "common/warp_mma.cuh", "(row + lane % 16)", "(row + (lane + 1) % 16)", "copy"),
    "a pixel of a fragment": (FORWARD, "forward/loaders.cuh", "2 * t + 8 * h)", "2 * t + 1 + 8 * h)", "rows"),
    "no barrier in a step": (FORWARD, "forward/sm80.cuh", "sync_block();  // the step's", "// the step's", "copy"),
    "a wait too short": (FORWARD, "forward/sm80.cuh", "default: copy_wait<2>();", "default: copy_wait<3>();", "copy"),
    "a stage overwritten": (
        HOPPER, "forward/sm90.cuh", "barrier_wait(&empty[turn.slot], turn.phase ^ 1);", "", "hopper",
    ),
    "a descriptor": (HOPPER, "common/ptx.cuh", ">> 4) | uint64_t{1} << 16", ">> 5) | uint64_t{1} << 16", "hopper"),
    "a slice not met at": (
        HOPPER, "forward/sm90.cuh", "slice, 64 + 4);\n            sync_warp();", "slice, 64 + 4);", "hopper",
    ),
    "the next tile too early": (
        HOPPER, "forward/sm90.cuh", "sync_some(1, 128);  // the last", "// the last", "hopper, rows",
    ),
    "no barrier in a step of dW": (
        BACKWARD, "backward/weight_sm80.cuh", "convert(step);\n            sync_block();", "convert(step);", "backward",
    ),
    "patches looked up too early": (
        BACKWARD, "backward/weight_sm80.cuh", "ROW_STEPS == STAGES - 2)", "ROW_STEPS == STAGES - 3)", "backward, bytes",
    ),
    "a row of dY": (BACKWARD, "backward/weight_sm80.cuh", "+ row) * LEFT", "+ (row ^ 1)) * LEFT", "backward"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_caught(monkeypatch, name):
    source, *change, case = MUTATIONS[name]
    try:
        module = build.mutated(source, tuple(change))
    except build.NoCompiler as reason:
        pytest.skip(str(reason))
    arch, act = CASES[case]
    use(monkeypatch, module, arch, multiprocessors=1)
    for seed in range(1, 4):
        monkeypatch.setenv("VITKERNELS_HOST_SEED", str(seed))
        if alone(act):
            return
    pytest.fail("no order of the threads shows it")
