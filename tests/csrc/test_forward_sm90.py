"""The forward on sm_90a where tiles are blocks of the grid, which the copy engine cuts or threads copy, and where the
copy engine stores the tokens as well (csrc/forward/epilogue_sm90.cuh): random problems against fp64."""

import random
import re
from functools import partial

import pytest
import torch
from problems import arguments, drawn_for_the_copy_engine, drawn_for_threads, on

import vitkernels as vk
from vitkernels.backends import cuda
from vitkernels.backends.common import canonical
from vitkernels.backends.cuda import forward_loaders, forward_plan
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton
from vitkernels.testing import accuracy, oracle

pytestmark = pytest.mark.usefixtures("poisoned")

CLUSTERS = {(1, 1): "", (2, 1): " in pairs", (2, 2): " by 2", (4, 4): " by 4"}
NAMES = ("images", "weight", "bias", "pos_embed", "prefix", "keep")


def with_positions(arguments: dict, seed: int) -> dict:
    """A table of any layout and type, or none."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    p = vk.explain(**arguments).problem
    rows = rng.choice((0, p.N, p.N + p.T))
    if not rows:
        return arguments
    dtype = rng.choice((arguments["weight"].dtype, torch.float32))
    table = torch.randn(rows, p.D, generator=generator).to(dtype)
    wide = torch.nn.functional.pad(table, (1, 7))[:, 1:-7]
    across = table.T.contiguous().T
    return arguments | {"pos_embed": rng.choice((table, table, wide, across))}


def tokens_of_all(arguments: dict, seed: int | None = None) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """The error allowed, what every plan of blocks makes, by its loader and tile, and the exact tokens. With a seed,
    of the plans with clusters those of every other tile."""
    p = vk.explain(**arguments).problem
    tensors = canonical(*(arguments.get(name) for name in NAMES))
    exact, eager = oracle.oracle(**arguments), oracle.eager(**arguments)
    bound = 2 * accuracy.error_of(eager, exact) + exact.abs().max().item() * torch.finfo(p.compute_dtype).eps
    plans = [q for q in cuda.candidates(p, *tensors).values() if q.loader in forward_loaders.BY_BLOCKS]
    how = {f"{q.loader} {q.BN}" + CLUSTERS[q.cluster, q.splits]: q for q in plans}
    assert len(how) == len(plans)
    if seed is not None:
        how = {name: q for name, q in how.items() if q.cluster == 1 or (seed + q.BN // 64) % 2 == 0}
    return bound, {name: cuda.forward(p, *tensors, plan=q) for name, q in how.items()}, exact


def pairs(names: set[str], multiprocessors: int, seed: int | None = None) -> set[str]:
    """And the same by clusters of two blocks, where there are two; with a seed, of every other tile."""
    taken = {name for name in names if seed is None or (seed + int(name.split()[1]) // 64) % 2 == 0}
    return names | {f"{name} in pairs" for name in taken if multiprocessors > 1}


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_random_problem(on_cuda_kernels, device, seed, in_groups):
    multiprocessors = random.Random(seed).choice((1, 2, 5, 132))
    on_cuda_kernels(90, multiprocessors)
    arguments = on(device, with_positions(drawn_for_the_copy_engine(seed, in_groups), seed))
    if seed % 5 == 0:
        arguments["out_dtype"] = torch.float32
    p = vk.explain(**arguments).problem
    if reason := forward_plan.candidates(p, NOMINAL[90], False)[1].get("engine"):
        assert in_groups and re.search(r"padded to \d+, no multiple of [34] channels", reason)
        arguments |= {"mean": None, "std": None}
    bound, tokens, exact = tokens_of_all(arguments, seed)
    by_engine = pairs({"engine 256", "engine 192", "engine 128", "engine 64"}, multiprocessors, seed)
    by_threads = pairs({"stored 256", "stored 192"}, 2) | {"copied 128"}
    divided = {f"engine {tile}" for tile in ("128 by 2", "128 by 4", "64 by 2")}
    assert tokens.keys() - by_threads - divided == by_engine
    for how, found in tokens.items():
        assert accuracy.error_of(found, exact) <= bound, how
    assert all(torch.equal(tokens["engine 256"], tokens[how]) for how in by_engine)


@pytest.mark.parametrize("seed", range(90))
def test_pixels_copied_by_threads(on_cuda_kernels, device, seed):
    multiprocessors = random.Random(seed).choice((1, 2, 5, 132))
    on_cuda_kernels(90, multiprocessors)
    arguments = on(device, with_positions(drawn_for_threads(seed), seed))
    if seed % 7 == 0:
        arguments["out_dtype"] = torch.float32
    p = vk.explain(**arguments).problem
    if forward_plan.candidates(p, NOMINAL[90], False)[1].get("copied"):
        arguments |= {"mean": None, "std": None}  # as above
    bound, tokens, exact = tokens_of_all(arguments, seed)
    own = "keep" in arguments and "pos_embed" in arguments
    why = forward_plan.candidates(p, NOMINAL[90], False)[1].get("stored", "")
    stored = set() if why or (own and p.D % 192) else pairs({"stored 192"}, multiprocessors, seed)
    assert tokens.keys() - pairs({"stored 256"}, 2) == {"copied 128"} | stored
    assert not why or "no two stages" in why or (own and re.search("positions|two channels", why))
    for how, found in tokens.items():
        assert accuracy.error_of(found, exact) <= bound, how


@pytest.mark.parametrize("seed", range(24))
def test_positions_of_their_own(on_cuda_kernels, device, seed):
    """Of kept patches, and of tables that each image has, in the product's type and in float32."""
    on_cuda_kernels(90, multiprocessors=random.Random(seed).choice((1, 2, 5, 132)))
    rng = random.Random(seed)
    weights = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    kept, D = rng.choice((None, 1, 7, 8)), rng.choice((256, 384))
    pos = "B" if kept is None else rng.choice(("B", "N", "T+N"))
    more = {"scale": 1 / 255} if rng.random() < 0.3 else {"mean": 0.4, "std": 0.2} if rng.random() < 0.5 else {}
    pixels = (torch.uint8, weights, torch.float32)[seed % 3]
    B, T = rng.choice((1, 3, 17, 33)), rng.choice((0, 1, 2))
    call = arguments(B, 3, 32, 64, 16, D, T, pixels=pixels, weights=weights, pos=pos, kept=kept, device=device, **more)
    call["pos_embed"] = call["pos_embed"].to(rng.choice((weights, torch.float32)))
    call["out_dtype"] = rng.choice((None, torch.float32))
    bound, tokens, exact = tokens_of_all(call)
    assert any(how.startswith("stored") for how in tokens) and tokens.keys() > {"copied 128"}
    for how, found in tokens.items():
        assert accuracy.error_of(found, exact) <= bound, how


@pytest.mark.parametrize("pos", [None, "N"])
def test_a_patch_that_is_not_there(on_cuda_kernels, device, pos):
    """Is NaN, and all others are as they are."""
    on_cuda_kernels(90)
    call = arguments(3, 3, 32, 64, 16, 192, 1, pos=pos, kept=5, device=device)
    p = vk.explain(**call).problem
    *tensors, keep = canonical(*(call.get(name) for name in NAMES))
    wrong = keep.clone()
    wrong[0, 3], wrong[2, 0] = 8, -1
    plans = cuda.candidates(p, *tensors, keep)
    assert {"stored", "copied"} < {plan.loader for plan in plans.values()}
    for how, plan in plans.items():
        right, tokens = (cuda.forward(p, *tensors, kept, plan=plan) for kept in (keep, wrong))
        lost = tokens.isnan().all(-1)
        assert lost.nonzero().tolist() == [[0, 4], [2, 1]], how
        assert torch.equal(tokens[~lost], right[~lost]), how


OWN = {
    "type": (
        dict(D=256), torch.Tensor.double,
        "each patch's positions are torch.float64, neither torch.bfloat16 nor torch.float32",
    ),
    "place": (
        dict(D=256), lambda table: torch.nn.functional.pad(table, (1, 1))[..., 1:-1],
        "each patch's positions can't be loaded two channels at a time",
    ),
    "D": (
        dict(D=200), torch.Tensor.clone,
        "each patch has positions of its own, and D = 200 is no multiple of a tile's channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_positions_that_threads_add(on_cuda_kernels, device, case):
    """Where the kernel that stores by the copy engine can't load them."""
    on_cuda_kernels(90)
    more, changed, reason = OWN[case]
    call = arguments(5, 3, 32, 48, 16, pos="N", kept=3, device=device, **more)
    call["pos_embed"] = changed(call["pos_embed"])
    p, at = vk.explain(**call).problem, call["pos_embed"].data_ptr() % 16
    assert forward_plan.candidates(p, NOMINAL[90], False, pos_at=at)[1]["stored"] == reason
    bound, tokens, exact = tokens_of_all(call)
    assert tokens.keys() == {"copied 128"}
    assert all(accuracy.error_of(found, exact) <= bound for found in tokens.values())


def test_the_plan_knows_where_positions_begin(on_cuda_kernels, device, monkeypatch):
    """A GPU loads two channels at a time from where they may begin alone."""
    on_cuda_kernels(90)
    seen, true = [], forward_plan.make_plan
    monkeypatch.setattr(forward_plan, "make_plan", lambda *call: seen.append(call[-1]) or true(*call))
    call = arguments(3, 3, 32, 48, 16, 192, pos="N", kept=3, device=device)
    call["pos_embed"] = torch.nn.functional.pad(call["pos_embed"], (1, 1))[..., 1:-1]
    vk.patch_embed(**call, backend="cuda")
    assert seen == [call["pos_embed"].data_ptr() % 16] != [0]


def single(arguments: dict, seed: int) -> dict:
    """The same in float32, in all of its bits, but for 8-bit pixels."""
    generator = torch.Generator().manual_seed(seed)

    def changed(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        t = torch.empty_strided(value.shape, value.stride(), dtype=torch.float32)
        return t.copy_(value.float() * (1 + torch.rand(value.shape, generator=generator) / 256))

    return {name: changed(value) for name, value in arguments.items()} | {"out_dtype": None}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To 11 bits of float32's 24, as TF32 has them, ties away from zero."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)


@pytest.mark.parametrize("seed", range(72))
def test_float32(on_cuda_kernels, device, monkeypatch, seed):
    """By three products of TF32, held to what float32 products are, though tensor cores cut off what their sums can't
    hold. And by one, where PyTorch is asked for TF32: that of operands rounded to it."""
    on_cuda_kernels(90, multiprocessors=random.Random(seed).choice((1, 2, 5, 132)))
    tf32 = seed % 2 == 1
    draw = (drawn_for_the_copy_engine, partial(drawn_for_the_copy_engine, in_groups=True), drawn_for_threads)[seed % 3]
    arguments = on(device, single(with_positions(draw(seed), seed), seed))
    p = vk.explain(**arguments).problem
    if tf32 or "padded to" in forward_plan.candidates(p, NOMINAL[90], tf32)[1].get("copied", ""):
        arguments |= {"mean": None, "std": None}
    monkeypatch.setattr(cuda, "tf32", lambda: tf32)
    bound, tokens, exact = tokens_of_all(arguments, seed)
    if tf32:
        exact = oracle.oracle(**arguments | {name: rounded(arguments[name]) for name in ("images", "weight")})
        bound += exact.abs().max().item() * p.K / 8 * 2**-23  # what is cut off a sum at each step
    why = forward_plan.candidates(p, NOMINAL[90], tf32)[1].get("copied", "")
    assert tokens or "no two stages fit" in why, why
    for how, found in tokens.items():
        assert accuracy.error_of(found, exact) <= bound, how


def test_a_sum_of_tf32_is_cut_off(on_cuda_kernels, device, monkeypatch):
    """One, and in each step of eight elements three quarters of what float32 holds next to it."""
    on_cuda_kernels(90)
    monkeypatch.setattr(cuda, "tf32", lambda: True)
    weight = torch.full((8, 1, 16, 16), 0.75 * 2**-23 / 8)
    weight[:, 0, 0, 0] = 1
    _, tokens, exact = tokens_of_all({"images": torch.ones(1, 1, 16, 16), "weight": weight})
    assert len(tokens) > 1 and exact.gt(1 + 2**-19).all()
    most = exact if device == "cuda" else 1  # how many bits a GPU keeps in between is its own affair
    whole = [found.double() for how, found in tokens.items() if " by " not in how]  # parts of k are cut off alone
    assert all((found >= 1).all() and (found <= most).all() for found in whole), tokens


def test_the_terms_of_float32(on_cuda_kernels, device):
    """Integers of 24 bits, which TF32 holds none of: each product has to be there, and the terms be the right ones."""
    on_cuda_kernels(90)
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(2, 1, 16, 32)
    weight = torch.zeros(8, 1, 16, 16)
    images[:, 0, 3, ::16] = torch.randint(2**23, 2**24, (2, 2), generator=generator).float()
    weight[:, 0, 3, 0] = torch.randint(2**23, 2**24, (8,), generator=generator).float()
    call = on(device, {"images": images, "weight": weight})
    _, tokens, exact = tokens_of_all(call)
    divided = {"engine 128 by 2", "engine 128 by 4", "engine 64 by 2"}
    by_engine = pairs({"engine 128", "engine 64", "stored 128"}, 2)
    assert tokens.keys() == {"copied 128"} | by_engine | divided
    for how, found in tokens.items():
        assert ((found.double() - exact.double()) / exact.double()).abs().max() < 2**-21, how


REFUSED = {
    "tokens of another type": (
        dict(out_dtype=torch.float16),
        "tokens are torch.float16, neither torch.bfloat16 nor torch.float32",
    ),
    "D": (dict(D=44), "D = 44 is no multiple of 8"),
    "positions": (dict(pos="B"), "positions per image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_store(on_cuda_kernels, device, case):
    """Then threads do, and no error is larger."""
    on_cuda_kernels(90)
    more, reason = REFUSED[case]
    call = arguments(5, 3, 32, 48, 16, **({"D": 40} | more), device=device)
    p = vk.explain(**call).problem
    assert forward_plan.candidates(p, NOMINAL[90], False)[1]["engine"] == reason
    bound, tokens, exact = tokens_of_all(call)
    assert tokens.keys() == {"copied 128"}
    assert all(accuracy.error_of(found, exact) <= bound for found in tokens.values())


def test_what_is_planned():
    """At most 64 positions in a tile of 64 channels, which leaves half of it empty with one image; 16 in the large."""
    blocks = {1: (2, 4, 16), 4: (4, 2, 16), 16: (8, 1, 16), 64: (32, 2, 2)}
    for B, block in blocks.items():
        plan = forward_plan.make_plan(compile_triton.problem(16, "bf16", B=B), NOMINAL[90], False)
        assert (plan.loader, plan.block) == ("engine", block)
        assert (plan.cluster, plan.lag) == ((2, 2) if B == 64 else (1, 0))
