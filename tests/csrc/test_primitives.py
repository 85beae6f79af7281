"""The CPU's stand-in for a GPU, on which tests run the CUDA kernels: its primitives against plain arithmetic, and the
mistakes that it is there to see."""

import math
import re

import numpy as np
import pytest
import torch
from host import build

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8]  # vk::Dtype
F16, BF16, F32 = 1, 2, 3
SPANS = {0: 0, 32: 1, 64: 3, 128: 7}  # of a swizzle: the bits of its pattern


@pytest.fixture(scope="session")
def probe():
    return build.probe()


@pytest.fixture(params=[1, 2, 3])
def seed(request, monkeypatch):
    monkeypatch.setenv("VITKERNELS_HOST_SEED", str(request.param))
    return request.param


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers at an address that is a multiple of 64, as those of CUDA's allocator are."""
    count = math.prod(shape)
    room = torch.empty(count + 64, dtype=dtype)
    start = -room.data_ptr() % 64 // room.element_size()
    values = room[start : start + count].view(shape)
    return values.copy_(torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 127, shape))


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = aligned(*shape, dtype=dtype)
    return out.fill_(float("nan")) if dtype.is_floating_point else out.fill_(77)


def test_numbers(probe):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    for dtype in (F16, BF16):
        all_values = bits.view(DTYPES[dtype])
        exact = torch.empty(2**16)
        probe.convert(dtype, True, bits.data_ptr(), exact.data_ptr(), 2**16)
        torch.testing.assert_close(exact, all_values.float(), rtol=0, atol=0, equal_nan=True)
        # every value, what is halfway to the next, its neighbours, and any bits
        half = 1 << (12 if dtype == F16 else 15)
        near = torch.cat([(exact.view(torch.int32) + d).view(torch.float32) for d in (0, half - 1, half, half + 1)])
        tiny = torch.randn(50_000, generator=generator) * 2.0 ** torch.randint(-28, -12, (50_000,), generator=generator)
        values = torch.cat([near, patterns, tiny])
        rounded = torch.empty(len(values), dtype=DTYPES[dtype])
        probe.convert(dtype, False, values.data_ptr(), rounded.data_ptr(), len(values))
        torch.testing.assert_close(rounded, values.to(DTYPES[dtype]), rtol=0, atol=0, equal_nan=True)
    tf32 = torch.empty(len(patterns))
    probe.convert(F32, False, patterns.data_ptr(), tf32.data_ptr(), len(patterns))
    assert (tf32.view(torch.int32) & 0x1FFF)[~patterns.isnan()].eq(0).all() and tf32[patterns.isnan()].isnan().all()
    good = patterns.isfinite() & (patterns.abs() > 2.0**-120) & (patterns.abs() < 2.0**120)
    mantissa, exponent = torch.frexp(patterns[good].double())
    away = torch.sign(mantissa) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11  # 11 bits: a leading one and 10
    assert torch.equal(tf32[good].double(), torch.ldexp(away, exponent))


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_product_of_a_warp(probe, seed, dtype):
    a, b, c = aligned(16, 48, dtype=DTYPES[dtype]), aligned(8, 48, dtype=DTYPES[dtype]), nothing(16, 8)
    probe.product(dtype, a.data_ptr(), b.data_ptr(), c.data_ptr(), 48)
    if dtype == F32:  # the operands as they are rounded
        for x in (a, b):
            probe.convert(F32, False, x.data_ptr(), x.data_ptr(), x.numel())
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_load_matrices(probe, seed):
    rows, out = aligned(4, 8, 8, dtype=torch.int16), nothing(2, 32, 4, 2, dtype=torch.int16)
    rows.copy_(torch.arange(256).view(4, 8, 8))
    probe.matrices(rows.data_ptr(), out.data_ptr())
    for lane in range(32):
        g, t = divmod(lane, 4)
        assert torch.equal(out[0, lane], rows[:, g, 2 * t : 2 * t + 2])
        assert torch.equal(out[1, lane], rows[:, 2 * t : 2 * t + 2, g])


@pytest.mark.parametrize("real", [16, 12, 1, 0])
def test_copies_land_when_they_are_waited_for(probe, real):
    source, out = aligned(32, 32, dtype=torch.uint8), nothing(4, 32, 32, dtype=torch.uint8)
    probe.copies(source.data_ptr(), out.data_ptr(), real)
    landed = source.clone()
    landed[:, real:16] = 0
    for when, end in enumerate((0, 16, 24, 28)):
        assert torch.equal(out[when, :, :end], landed[:, :end])
        assert out[when, :, end:28].eq(255).all()


def test_meetings(probe, seed):
    x, out = torch.arange(96, dtype=torch.int32) ** 2, nothing(96, 3, dtype=torch.int32)
    probe.sum(x.data_ptr(), out.data_ptr())
    warps = x.view(3, 32)
    sums = warps.sum(1, dtype=torch.int32)
    assert torch.equal(out[:, 0], warps[:, 5].repeat_interleave(32))
    assert torch.equal(out[:, 1], sums.repeat_interleave(32))
    assert torch.equal(out[:, 2], torch.stack([sums[0] + sums[1]] * 2 + [sums[2]]).repeat_interleave(32))


def test_a_missing_barrier_shows(probe, seed):
    x, out = aligned(20, 128), nothing(20, 128)
    probe.turn(x.data_ptr(), out.data_ptr(), 20, True)
    assert torch.equal(out, x.flip(1))
    probe.turn(x.data_ptr(), out.data_ptr(), 20, False)
    assert out.isnan().any(1).all()  # in every block


def box(x: np.ndarray, start: list[int], shape: list[int]) -> np.ndarray:
    """Of x, zeros around it; all outermost first."""
    around = np.pad(x, [(9, n) for n in shape])
    return around[tuple(slice(9 + s, 9 + s + n) for s, n in zip(start, shape, strict=True))]


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("dtype", [0, F16, F32])
def test_blocks_of_tensors(probe, rank, dtype, swizzle):
    size = DTYPES[dtype].itemsize
    width = (swizzle or 48) // size
    shape, block = ([7, 20, 80], [2, 12, width]) if rank == 3 else ([3, 4, 5, 6, 80], [2, 2, 1, 3, width])
    x = aligned(*shape, dtype=DTYPES[dtype])
    strides = [s * size for s in x.stride()]
    for start in ([0] * rank, [1] * rank, [-1] * (rank - 1) + [-3], [s - 1 for s in shape], [-9, *[0] * (rank - 1)]):
        out = nothing(math.prod(block) * size, dtype=torch.uint8)
        probe.fetch(dtype, shape[::-1], strides[::-1], block[::-1], swizzle, x.data_ptr(), start[::-1], out.data_ptr())
        address = np.arange(0, len(out), 16)  # of pieces; the swizzle is its own inverse
        pieces = out.numpy().reshape(-1, 16)[(address ^ ((address >> 7) & SPANS[swizzle]) << 4) // 16]
        expected = box(x.view(torch.uint8 if size == 1 else DTYPES[dtype]).numpy(), start, block)
        assert np.array_equal(pieces.reshape(-1), np.ascontiguousarray(expected).view(np.uint8).reshape(-1)), start


def put(probe, rounds: int, rows: int, columns: int, y: int, x: int, mistake: int = 0) -> bool:
    """Whether blocks of 16 × 32 are stored where they belong, and nothing else."""
    out = nothing(rounds, 3, rows, columns, dtype=torch.int16)
    expected = out.clone()
    block = torch.arange(16 * 32, dtype=torch.int16).view(16, 32)
    first_y, first_x, end_y, end_x = max(y, 0), max(x, 0), min(y + 16, rows), min(x + 32, columns)
    for r in range(rounds):
        inside = block[first_y - y : max(end_y - y, 0), first_x - x : max(end_x - x, 0)]
        expected[r, 1, first_y : max(end_y, 0), first_x : max(end_x, 0)] = inside + r
    probe.put(out.data_ptr(), rounds, rows, columns, y, x, mistake)
    return torch.equal(out, expected)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_stores_of_blocks(probe, seed, rounds):
    for rows, columns, y, x in [(16, 32, 0, 0), (40, 72, 9, 24), (20, 40, 8, 16), (20, 40, -3, -8), (9, 40, 20, 8)]:
        assert put(probe, rounds, rows, columns, y, x), (rows, columns, y, x)


@pytest.mark.parametrize(("mistake", "rounds"), [(1, 1), (2, 1), (3, 5)])
def test_mistakes_in_stores(probe, monkeypatch, mistake, rounds):
    """No fence, no meeting before the store, no wait before a place is used again: each shows, in some order."""
    seen = []
    for seed in range(1, 9):
        monkeypatch.setenv("VITKERNELS_HOST_SEED", str(seed))
        seen.append(put(probe, rounds, 20, 40, 2, 8, mistake))
    assert not all(seen) and (mistake != 1 or not any(seen)), seen


def test_stores_are_waited_for(probe, seed):
    with pytest.raises(RuntimeError, match=r"stores of the copy engine never waited for: [12], the first from shared"):
        put(probe, 3, 20, 40, 0, 0, mistake=4)


def test_maps_that_the_driver_would_refuse(probe):
    x, out = aligned(8, 8, 64), nothing(1024)

    def fetch(base=0, sizes=(64, 8, 8), strides=(4, 256, 2048), block=(8, 2, 2), swizzle=0):
        probe.fetch(F32, sizes, strides, block, swizzle, x.data_ptr() + base, (0, 0, 0), out.data_ptr())

    fetch()
    for wrong, why in [
        (dict(base=4), "4 bytes past a multiple of 16"),
        (dict(sizes=(64, 0, 8)), r"sizes\[1\] = 0 is not in"),
        (dict(strides=(4, 250, 2048)), r"strides\[1\] = 250 bytes is not a multiple of 16"),
        (dict(strides=(4, 256, 2**40)), r"strides\[2\] = 1099511627776 bytes is not below"),
        (dict(strides=(8, 256, 2048)), r"strides\[0\] = 8 is not the element's size, 4"),
        (dict(block=(8, 257, 2)), r"block\[1\] = 257 is not in"),
        (dict(block=(6, 2, 2)), r"block\[0\] = 6 of 4 bytes: 24 is not a multiple of 16"),
        (dict(block=(16, 2, 2), swizzle=32), r"64 is more than the swizzle's 32"),
        (dict(swizzle=16), "swizzle of 16 bytes"),
        (dict(sizes=(64,) * 6, strides=(4,) * 6, block=(8,) * 6), "rank 6"),
    ]:
        with pytest.raises(RuntimeError, match=why):
            fetch(**wrong)


def test_a_map_is_made_in_a_context(probe):
    """Bound where the thread has none; one that it has, maybe the caller's own, is left alone."""
    assert probe.bound_for_a_map(0, context=False, binds=True) == 1
    assert probe.bound_for_a_map(0, context=True, binds=True) == 0


@pytest.mark.parametrize(("result", "context"), [(0, False), (3, True), (201, True), (700, True), (1, True)])
def test_only_a_wrong_value_is_a_refusal(probe, result, context):
    answer = result if context else 201
    with pytest.raises(RuntimeError, match=rf"CUDA: CODE \({answer}\): a tensor map of 3 ") as raised:
        probe.bound_for_a_map(result, context, binds=False)
    assert isinstance(raised.value, probe.Refused) == (result == 1)


@pytest.mark.parametrize("from_registers", [True, False])
@pytest.mark.parametrize("span", [32, 128])
@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_product_of_a_warpgroup(probe, seed, dtype, n, span, from_registers):
    k = 128
    a, b, c = aligned(64, k, dtype=DTYPES[dtype]), aligned(n, k, dtype=DTYPES[dtype]), nothing(64, n)
    probe.group_product(dtype, a.data_ptr(), b.data_ptr(), c.data_ptr(), n, k, span, from_registers)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("from_registers", [True, False])
@pytest.mark.parametrize("span", [32, 128])
@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_product_of_a_warpgroup_across(probe, seed, dtype, n, span, from_registers):
    k = 64
    a, b, c = aligned(k, 64, dtype=DTYPES[dtype]), aligned(k, n, dtype=DTYPES[dtype]), nothing(64, n)
    probe.group_across(dtype, a.data_ptr(), b.data_ptr(), c.data_ptr(), n, k, span, from_registers)
    torch.testing.assert_close(c.double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-4)


def test_pipeline(probe, seed):
    for rounds in (1, 2, 3, 9):
        x, y, out = aligned(rounds, 128), aligned(rounds, 128), nothing(rounds, 128)
        probe.pipeline(x.data_ptr(), y.data_ptr(), out.data_ptr(), rounds, 0)
        assert torch.equal(out, x + y)


@pytest.mark.parametrize(
    ("mistake", "rounds", "message"),
    [
        (1, 9, "one arrival too many|wrong"),
        (2, 2, r"deadlock: threads? 0 .*at barrier_wait, parity|copies never waited for: some that count at"),
        (2, 9, r"deadlock: threads? 0 .*at barrier_wait, parity|copies never waited for"),
        (3, 9, "deadlock: threads 0 … 31 at barrier_wait, parity 0.*64 of 64 arrivals"),
        (4, 9, "deadlock.*0 of 33 arrivals and -256 bytes"),
    ],
)
def test_mistakes_in_a_pipeline(probe, seed, mistake, rounds, message):
    x, y, out = aligned(rounds, 128), aligned(rounds, 128), nothing(rounds, 128)
    try:
        probe.pipeline(x.data_ptr(), y.data_ptr(), out.data_ptr(), rounds, mistake)
        seen = "right" if torch.equal(out, x + y) else "wrong"
    except RuntimeError as error:
        seen = str(error)
    assert re.search(message, seen), seen
    assert mistake != 2 or out[0].isnan().any()


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_cluster(probe, seed, blocks):
    for rounds in (1, 2, 3, 9):
        x, out = aligned(rounds, 128), nothing(3 * blocks, rounds, 128)
        probe.cluster(x.data_ptr(), out.data_ptr(), rounds, blocks, 3, 0)
        assert torch.equal(out, x.expand_as(out))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, "the barrier at shared memory .* was not initialised|no barrier_init_done"),
        (2, "block [01] of the cluster has ended"),
        (3, "one arrival too many|wrong"),
        (4, "barrier_arrive: block 2 of a cluster of 2"),
        (5, "copy_tensor_to_all: to 3 blocks of a cluster of 2"),
    ],
)
def test_mistakes_in_a_cluster(probe, seed, mistake, message):
    x, out = aligned(9, 128), nothing(16, 9, 128)
    try:
        probe.cluster(x.data_ptr(), out.data_ptr(), 9, 2, 8, mistake)
        seen = "right" if torch.equal(out, x.expand_as(out)) else "wrong"
    except RuntimeError as error:
        seen = str(error)
    assert re.search(message, seen), seen
    probe.cluster(x.data_ptr(), out.data_ptr(), 9, 2, 8, 0)  # and nothing is left behind
    assert torch.equal(out, x.expand_as(out))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_what_a_block_reads_of_its_cluster(probe, seed, blocks):
    x, out = aligned(3, blocks, 128), nothing(3, blocks, 128)
    probe.peers(x.data_ptr(), out.data_ptr(), blocks, 3, 0)
    torch.testing.assert_close(out, x.sum(1, keepdim=True).expand_as(out))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (1, "nan|block 1 of the cluster has ended"),
        (2, "block [01] of the cluster has ended"),
        (3, "not aligned to 16 bytes"),
        (4, "read_words_of: block 2 of a cluster of 2"),
    ],
)
def test_mistakes_in_reading_of_a_cluster(probe, seed, mistake, message):
    x, out = aligned(8, 2, 128), nothing(8, 2, 128)
    try:
        probe.peers(x.data_ptr(), out.data_ptr(), 2, 8, mistake)
        seen = "nan" if out.isnan().any() else "right"
    except RuntimeError as error:
        seen = str(error)
    assert re.search(message, seen), seen


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("deadlock", r"deadlock: threads 0 … 31 at sync_some\(1, 64\); threads 32 … 127 at sync_block"),
        ("deadlock_at_barrier", r"deadlock: threads 0 … 32 at barrier_wait, parity 0, .* \+ 32768 .*2 of 2 arrivals"),
        ("divergence", r"thread \d+: lanes of a warp diverge: .*(shuffle.*sync_warp|sync_warp.*shuffle)"),
        ("returned_lane", r"lanes of a warp diverge: .*returned|only 31 of 32"),
        ("write_behind", r"written behind shared memory: at shared memory \+ 32776 of 32776 bytes"),
        ("write_in_front", r"written in front of shared memory: at shared memory \+ -2 "),
        ("misaligned_copy", r"copy_async of 16 bytes to shared memory \+ 4 .*misaligned"),
        ("misaligned_source", "4 past a multiple of 16: misaligned"),
        ("copy_outside", r"16 bytes at shared memory \+ 32768 are not within the 32776"),
        ("copy_never_waited_for", r"copies never waited for: 1, the first to shared memory \+ 0"),
        ("barrier_not_initialised", "was not initialised"),
        ("barrier_overwritten", "overwritten"),
        ("one_arrival_too_many", "one arrival too many"),
        ("no_fence", "no warpgroup_fence"),
        ("product_never_waited_for", "mmas of the warpgroup never waited for: 1 of warp"),
        ("warps_of_a_group_differ", "warps 0 and 3 of a warpgroup have not issued the same mmas"),
        ("operand_outside", r"operand B: row \d+ at shared memory \+ \d+ is not within the 32776"),
        ("operand_across_outside", r"operand B: k = \d+ at shared memory \+ \d+ is not within the 32776"),
        ("operand_across_inside_a_pattern", "operand B: address 1536 and offsets 8192, 1024 are not multiples of 1024"),
    ],
)
def test_mistakes(probe, seed, sample, message):
    out = aligned(256)
    with pytest.raises(RuntimeError, match=rf"^{sample} \(1 blocks of 128 threads, 32776 bytes.*{message}"):
        probe.sample(sample, out.data_ptr())
    probe.sample("returned_threads_are_no_matter", 0)  # and nothing is left behind


def test_what_wgmma_sees(probe, seed):
    out = aligned(128, 2)
    probe.sample("products_of_stores", out.data_ptr())
    assert out.isnan().all()  # threads' stores don't reach it without a fence between the proxies
    probe.sample("products_of_stores_behind_a_fence", out.data_ptr())
    assert out[:, 0].isnan().all() and out[:, 1].eq(0).all()  # and sums are there after the wait


def test_divisor(probe):
    last = 2**31 - 1
    edges = [2**s + d for s in range(1, 31) for d in (-1, 0, 1)]
    for divisor in sorted({1, 3, 7, 196, 197, 641, 6700417, last - 1, last, *edges}):
        assert probe.wrong_divisions(divisor, 0, 1, 1000) == 0
        assert probe.wrong_divisions(divisor, last - 1000, 1, 2000) == 0
        assert probe.wrong_divisions(divisor, divisor - 1, divisor, 1000) == 0  # the last of each quotient
        assert probe.wrong_divisions(divisor, divisor, divisor, 1000) == 0
        assert probe.wrong_divisions(divisor, last % divisor, max(divisor, 2**16), 2**15) == 0
        assert probe.wrong_divisions(divisor, 0, 104729, 2**15) == 0


def test_build_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(pytest.skip.Exception, match="no-such-compiler"):
        build.load.__wrapped__()
