"""The CUDA C++ backend: every loader of the forward with every tile on random problems, and what it says of itself.

Without a GPU the kernels' own source runs on the CPU (tests/host): threads of a block in random order, copies that
land as late as they may, poisoned shared memory.
"""

import json
import random
import warnings
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from host import backend

import vitkernels as vk
from vitkernels import cli
from vitkernels.backends import cuda, fallbacks
from vitkernels.backends.common import canonical
from vitkernels.backends.cuda import extension
from vitkernels.profiling.compile_triton import problem
from vitkernels.testing import accuracy, oracle

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, F32, U8 = torch.float16, torch.bfloat16, torch.float32, torch.uint8
NAMES = ("images", "weight", "bias", "pos_embed", "prefix", "keep")


def drawn(seed: int) -> dict:
    """A random problem of the kind that fast loaders are for: patches of 16, 14, …, pixels side by side in memory."""
    rng = random.Random(seed)
    one = rng.choice
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    T = F32 if rng.random() < 0.1 else one((BF16, HALF))
    pixels = one((U8, T, F32))
    P, C = one((16, 16, 16, 14, 14, 32, 8, 12, 10, 7)), one((3, 3, 1, 4))
    B, D = rng.randint(1, 6), one((8, 24, 64, 72, 130, 200, 256, 264))
    H = rng.randint(1, 5) * P + one((0, 0, 1, 5))
    W = rng.randint(1, 6) * P + one((0, 0, 0, 2, 6) if rng.random() < 0.4 else (0,))
    images = torch.rand(B, C, H, W, generator=generator)
    images = (images * 255).byte() if pixels == U8 else images.to(pixels)
    layout = one(("contiguous", "contiguous", "channels-last", "cut out"))
    if layout == "channels-last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "cut out":
        around = torch.full((B, C, H + 2, W + 16), 255 if pixels == U8 else float("nan"), dtype=pixels)
        around[:, :, 1:-1, :W] = images
        images = around[:, :, 1:-1, :W]
    arguments = {"images": images, "weight": (normal(D, C, P, P) * (C * P * P) ** -0.5).to(T)}
    if rng.random() < 0.6:
        arguments["bias"] = normal(D).to(T)
    if rng.random() < 0.5:
        arguments["prefix"] = normal(one((1, 2)), D).to(T)
    if rng.random() < 0.3 and H >= P + 2:
        arguments["stride"] = one((P, P // 2, P + 2, P - 2))
    if rng.random() < 0.15:
        arguments["padding"] = one((2, P // 2))
    if rng.random() < 0.4:
        arguments.update(mean=(0.4, 0.5, 0.6, 0.5)[:C], std=(0.2, 0.3, 0.25, 0.2)[:C])
    N = vk.explain(**arguments).problem.N
    if rng.random() < 0.5:
        T_rows = arguments["prefix"].shape[0] if "prefix" in arguments and rng.random() < 0.5 else 0
        arguments["pos_embed"] = normal(T_rows + N, D).to(T)
    if rng.random() < 0.15:
        arguments["keep"] = torch.randint(N, (B, rng.randint(1, N + 1)), generator=generator)
    if rng.random() < 0.2:
        arguments["out_dtype"] = one((F32, BF16))
    return arguments


def on(arguments: dict, device: str) -> dict:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", range(80))
def test_every_kernel(on_cuda_kernels, device, arch, seed):
    on_cuda_kernels(arch, multiprocessors=(None, 1, 3)[seed % 3])
    arguments = on(drawn(seed), device)
    p = vk.explain(**arguments).problem
    tensors = canonical(*(arguments.get(name) for name in NAMES))
    exact, eager = oracle.oracle(**arguments), oracle.eager(**arguments)
    bound = 2 * accuracy.error_of(eager, exact) + exact.abs().max().item() * torch.finfo(p.compute_dtype).eps
    plans = cuda.candidates(p, *tensors)
    assert plans
    for how, plan in plans.items():
        if plan.cluster > 1 and (seed + plan.BN // 64) % 2:
            continue  # every other draw: the same kernels, beside what they do alone
        tokens = cuda.forward(p, *tensors, plan=plan)
        assert accuracy.error_of(tokens, exact) <= bound, how
        assert torch.equal(tokens, cuda.forward(p, *tensors, plan=plan)), f"{how}: not twice the same bits"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("P", [5, 7, 9])
def test_channels_begin_at_odd_elements(on_cuda_kernels, device, arch, P):
    """Of two neighbouring elements the first may be the last of its channel."""
    on_cuda_kernels(arch)
    generator = torch.Generator().manual_seed(P)
    arguments = on(dict(
        images=torch.rand(2, 3, 4 * P, 3 * P, generator=generator), mean=(0.1, 0.5, 0.9), std=(0.1, 0.5, 0.9),
        weight=torch.randn(40, 3, P, P, generator=generator).bfloat16(),
    ), device)  # fmt: skip
    p = vk.explain(**arguments).problem
    tensors = canonical(*(arguments.get(name) for name in NAMES))
    exact, eager = oracle.oracle(**arguments), oracle.eager(**arguments)
    for how, plan in cuda.candidates(p, *tensors).items():
        error = accuracy.error_of(cuda.forward(p, *tensors, plan=plan), exact)
        assert error <= 2 * accuracy.error_of(eager, exact) + exact.abs().max().item() * 2**-8, how


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("pixels", [U8, BF16, F32])
def test_tiles_that_begin_within_a_line(on_cuda_kernels, device, arch, pixels):
    """Lines of 5 patches of 14 pixels, rows copied 16 bytes at a time: tiles begin at no multiple of 16 bytes."""
    on_cuda_kernels(arch, multiprocessors=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 70, 80), generator=generator).to(pixels)
    weight = torch.randn(40, 3, 14, 14, generator=generator).bfloat16()
    arguments = on(dict(images=images, weight=weight, scale=1 / 255), device)
    p = vk.explain(**arguments).problem
    tensors = canonical(*(arguments.get(name) for name in NAMES))
    exact, eager = oracle.oracle(**arguments), oracle.eager(**arguments)
    plans = cuda.candidates(p, *tensors)
    assert device == "cuda" or any("rows copied whole (16 bytes" in how for how in plans)
    for how, plan in plans.items():
        error = accuracy.error_of(cuda.forward(p, *tensors, plan=plan), exact)
        assert error <= 2 * accuracy.error_of(eager, exact) + exact.abs().max().item() * 2**-8, how


def test_a_tensor_map_that_the_driver_refuses(on_cuda_kernels, device, monkeypatch):
    """Then the same tokens come by another kernel."""
    on_cuda_kernels(90)
    arguments = on(
        dict(images=torch.rand(2, 3, 32, 64).bfloat16(), weight=torch.rand(64, 3, 16, 16).bfloat16()), device
    )
    expected = vk.patch_embed(**arguments, backend="cuda")
    asked, tried, true = [], [], extension.load()

    class Refusing:
        def __getattr__(self, name):
            return getattr(true, name)

        def ForwardPlan(self, fields):
            asked.append(fields["how"])
            return true.ForwardPlan(fields)

        def Forward(self, *prepared):
            launch = true.Forward(*prepared)

            def refused(*addresses):
                tried.append(asked[-1])
                if "wgmma" in tried[-1] or len(tried) == 1:
                    raise true.Refused("CUDA: CUDA_ERROR_INVALID_VALUE (1): a tensor map is refused by the driver")
                launch(*addresses)

            return refused

    refusing = Refusing()
    monkeypatch.setattr(extension, "load", lambda: refusing)
    backend.forget()
    monkeypatch.setattr(fallbacks, "_reasons", {})
    with pytest.warns(UserWarning, match="the copy engine is not used"):
        tokens = vk.patch_embed(**arguments, backend="cuda")
    assert len(tried) == 2 and "mma.sync" in tried[1]
    torch.testing.assert_close(tokens, expected, rtol=2e-2, atol=2e-2)
    vk.patch_embed(**arguments, backend="cuda")
    assert len(tried) == 3  # it is not asked again


@pytest.fixture
def driver(on_cuda_kernels, device, monkeypatch):
    """Call it with the CUresult that the emulated driver answers from then on."""
    if device == "cuda":
        pytest.skip("a GPU's driver answers for itself")
    on_cuda_kernels(90, multiprocessors=1)
    monkeypatch.setattr(fallbacks, "_reasons", {})
    warnings.simplefilter("error")  # pytest has the filters back afterwards
    return lambda result: monkeypatch.setenv("VITKERNELS_HOST_DRIVER", str(result))


def mapped() -> dict:
    """Tokens and the weight's gradient come by the copy engine."""
    generator = torch.Generator().manual_seed(3)
    return dict(
        images=torch.rand(40, 3, 32, 48, generator=generator).half(),
        weight=(torch.randn(72, 3, 16, 16, generator=generator) / 28).half().requires_grad_(),
    )


def wgmma(call: dict) -> bool:
    return "wgmma" in vk.explain(**call).notes["cuda"]


def step_of(name: str, call: dict, backend: str = "cuda"):
    """The forward, or the backward of tokens that are there already."""
    tokens = vk.patch_embed(**call, backend=backend)
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)).half()
    backward = partial(torch.autograd.grad, tokens, call["weight"], grad, retain_graph=True)
    return {"forward": lambda: (vk.patch_embed(**call, backend=backend),), "backward": backward}[name]


@pytest.mark.parametrize("result", [3, 201, 700])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_an_error_of_the_driver_is_no_refusal(driver, monkeypatch, name, result):
    """It is the caller's, named, and the next call is as if nothing had been."""
    call = mapped()
    step = step_of(name, call)
    right = step()
    driver(result)
    with pytest.raises(RuntimeError, match=rf"CUDA: CUresult \({result}\): a tensor map of .*: .*B=40"):
        step()
    assert vk.explain(**call).fallbacks == {} and wgmma(call)
    monkeypatch.delenv("VITKERNELS_HOST_DRIVER")
    assert torch.equal(*step(), *right)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_refusal_is_told(driver, capsys, name):
    call = mapped()
    step = step_of(name, call)
    assert wgmma(call) and "fell back" not in str(vk.explain(**call))
    driver(1)
    with pytest.warns(UserWarning, match="refused by the driver: .*; the copy engine is not used") as told:
        found = step()
    assert len(told) == 1
    torch.testing.assert_close(*found, *step_of(name, call, "reference")(), rtol=1e-2, atol=1e-2)
    for again in ("forward", "backward"):
        step_of(again, call)()

    explained = vk.explain(**call)
    assert not wgmma(call) and list(explained.fallbacks) == ["cuda"]
    assert f"fell back: {explained.fallbacks['cuda']}" in str(explained)
    fallback = {"backend": "cuda", "problem": str(explained.problem), "reason": explained.fallbacks["cuda"]}
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fallbacks"] == [fallback]
    assert cli.main(["info"]) == 0
    assert explained.fallbacks["cuda"] in capsys.readouterr().out
    assert vk.explain(**call | {"images": call["images"][:39]}).fallbacks == {}  # it is another problem


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_new_thread_has_no_context(on_cuda_kernels, device, monkeypatch, name):
    """As autograd's has none, where this may be the first call that needs one."""
    on_cuda_kernels(90, multiprocessors=1)
    monkeypatch.setattr(fallbacks, "_reasons", {})
    call = on(mapped(), device)
    call["weight"] = call["weight"].detach().requires_grad_()
    step = step_of(name, call)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(*pool.submit(step).result(), *step())
    assert fallbacks.listed() == []


def test_every_loader_is_drawn(on_cuda_kernels):
    """Enough problems of each loader with each of its tiles: a plan that takes none must not pass for right."""
    on_cuda_kernels(90)
    units = "three products of TF32", "wgmma in ", "mma.sync", "multiply-adds"
    counts: Counter[tuple] = Counter()
    for seed in range(80):
        arguments = drawn(seed)
        p = vk.explain(**arguments).problem
        plans = cuda.candidates(p, *canonical(*(arguments.get(name) for name in NAMES)))
        counts.update(
            (q.loader, next(u for u in units if u in how), q.BM, q.BN, q.cluster, q.splits) for how, q in plans.items()
        )
    assert len(counts) == 35, counts
    assert min(n for (_, unit, *_), n in counts.items() if unit in units[1:3]) >= 6, counts


BY_16 = " (16 bytes at a time)"
COPY, COPY_BY_4 = f"pixels copied asynchronously{BY_16}", "pixels copied asynchronously (4 bytes at a time)"
ROWS = f"image rows copied whole{BY_16}"
ENGINE, FP32 = "patches cut and tokens stored by the copy engine", "wgmma (three products of TF32)"


@pytest.mark.parametrize(("arch", "patch", "dtype", "batch", "loader", "product"), [
    (90, 16, "bf16", 256, ENGINE, "wgmma in pairs of tiles of 128×256"),
    (90, 16, "uint8->bf16", 256, ENGINE, "wgmma in pairs of tiles of 128×256"),
    (90, 32, "autocast", 256, ENGINE, "wgmma in pairs of tiles of 128×192, the weight packed first"),
    (90, 14, "bf16", 256, ENGINE, "wgmma in pairs of tiles of 128×256, the weight packed first"),
    (90, 14, "uint8->bf16", 256, ENGINE, "wgmma in pairs of tiles of 128×256, the weight packed first"),
    (90, 16, "bf16", 1, ENGINE, "wgmma in tiles of 128×64"),
    (90, 16, "bf16", 8, ENGINE, "wgmma in tiles of 128×128"),
    (90, 32, "bf16", 8, ENGINE, "wgmma in tiles of 128×128, each by 4 blocks"),
    (90, 32, "bf16", 16, ENGINE, "wgmma in tiles of 128×128, each by 2 blocks"),
    (80, 16, "bf16", 256, COPY, "mma.sync in tiles of 128×128"),
    (80, 14, "bf16", 256, COPY_BY_4, "mma.sync in tiles of 128×128, the weight packed first"),
    (80, 14, "bf16", 1, COPY_BY_4, "mma.sync in tiles of 32×64"),
    (89, 14, "uint8->bf16", 256, ROWS, "mma.sync in tiles of 128×128, the weight packed first"),
    (100, 16, "bf16", 256, COPY, "mma.sync in tiles of 128×128"),
    (90, 16, "tf32", 256, ENGINE, "wgmma in pairs of tiles of 128×256, the weight packed first"),
    (90, 16, "fp32", 256, ENGINE, f"{FP32} in pairs of tiles of 128×128, the weight packed first"),
    (89, 16, "tf32", 256, COPY, "mma.sync in tiles of 128×128"),
    (89, 16, "fp32", 256, COPY, "multiply-adds in tiles of 64×64"),
])  # fmt: skip
def test_the_kernel_taken(on_cuda_kernels, device, monkeypatch, arch, patch, dtype, batch, loader, product):
    if device == "cuda":
        pytest.skip("a GPU's architecture is its own")
    on_cuda_kernels(arch)
    monkeypatch.setattr(cuda, "tf32", lambda: dtype == "tf32")
    assert cuda.how(problem(patch, dtype, B=batch)) == f"{loader}, {product}"


def test_reasons_without_the_extension(device, monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: "the CUDA C++ extension was not built: no nvcc")
    arguments = dict(images=torch.zeros(1, 3, 16, 16), weight=torch.zeros(8, 3, 8, 8))
    assert vk.explain(**arguments)["cuda"] == ["the CUDA C++ extension was not built: no nvcc"]
    with pytest.raises(NotImplementedError, match="was not built: no nvcc"):
        vk.patch_embed(**arguments, backend="cuda")


def test_reasons_have_numbers(on_cuda_kernels, device):
    on_cuda_kernels()
    images = torch.zeros(1, dtype=U8, device=device).expand(2**16, 1, 2**8, 2**8)
    reasons = vk.explain(images, torch.zeros(8, 1, 1, 1, device=device))["cuda"]
    assert reasons[0].startswith("B·N = 4294967296 ")
    assert all("4294967296" in reason for reason in reasons)


def test_named_on_a_cpu(monkeypatch):
    class Extension:
        device_type = "cuda"

    monkeypatch.setattr(extension, "load", lambda: Extension)
    monkeypatch.setattr(extension, "missing", lambda: "")
    with pytest.raises(NotImplementedError, match="images are on cpu; the CUDA C\\+\\+ kernels need a CUDA device"):
        vk.patch_embed(torch.zeros(1, 3, 16, 16), torch.zeros(8, 3, 8, 8), backend="cuda")


@pytest.mark.parametrize(("built", "runs", "runs_not"), [
    ("8.0", (80, 86, 89), (75, 90, 120)),
    ("8.6", (86, 89), (80, 90)),
    ("9.0a", (90,), (80, 100)),
    ("10.0", (100, 103), (90, 120)),
    ("8.0+PTX", (80, 89, 90, 100, 120), (75,)),
])  # fmt: skip
def test_what_a_build_covers(built, runs, runs_not):
    assert all(cuda.covers(built, arch) for arch in runs)
    assert not any(cuda.covers(built, arch) for arch in runs_not)


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("kept", [False, True])
def test_gradient_of_tokens_past_2_31(on_cuda_kernels, device, tmp_path, dim, kept):
    """dY [2,4,8] whose batch, row or channel stride takes the last elements past 2³¹."""
    on_cuda_kernels(90)
    shape, strides = [2, 4, 8], [32, 8, 1]
    strides[dim] = 2**32 // (shape[dim] - 1)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if device == "cpu":  # a file with holes: what is not touched takes no memory
        memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=HALF)
    else:
        memory = torch.zeros(size, dtype=HALF, device=device)
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(shape, generator=generator).to(device, HALF)
    far = memory.as_strided(shape, strides).copy_(near)
    learnt = {
        "images": torch.rand(2, 3, 16, 16, generator=generator), "weight": torch.randn(8, 3, 8, 8, generator=generator),
        "bias": torch.zeros(8), "pos_embed": torch.zeros(1, 4, 8),
    }  # fmt: skip
    learnt = {name: t.to(device, HALF).requires_grad_() for name, t in learnt.items()}
    keep = torch.tensor([[3, 1, 0, 3], [2, 2, 1, 0]], device=device) if kept else None
    tokens = vk.patch_embed(**learnt, keep=keep, backend="cuda")
    found = [torch.autograd.grad(tokens, list(learnt.values()), g, retain_graph=True) for g in (far, near)]
    for name, one, other in zip(learnt, *found, strict=True):
        assert torch.equal(one, other), name


def test_constants_live_until_the_launch(on_cuda_kernels, device, monkeypatch):
    """While a graph is captured they come uncached: only their address is handed on, so somebody must hold them."""
    on_cuda_kernels(90)
    held, true = [], cuda.centred

    def uncached(p, dtype):
        constant = true(p, dtype).clone()
        held.append(weakref.ref(constant))
        return constant

    class Watching:
        def __getattr__(self, name):
            return getattr(module, name)

        def Forward(self, *prepared):
            return partial(self.launch, module.Forward(*prepared))

        def Backward(self, *prepared):
            return partial(self.launch, module.Backward(*prepared))

        def launch(self, launch, *addresses):
            assert held[-1]() is not None, "freed before the launch"
            launch(*addresses)

    module = extension.load()
    monkeypatch.setattr(cuda, "centred", uncached)
    monkeypatch.setattr(extension, "load", Watching)
    weight = torch.rand(8, 3, 8, 8, device=device, requires_grad=True)
    images = torch.rand(1, 3, 16, 16, device=device)
    vk.patch_embed(images, weight, mean=0.5, std=(0.1, 0.2, 0.3), backend="cuda").sum().backward()
    assert len(held) == 2


def test_under_func_and_compile(on_cuda_kernels, device):
    """What ops.py gives every backend: per-sample gradients, forward mode, fullgraph compilation."""
    on_cuda_kernels(90)
    images, weight = torch.rand(3, 3, 16, 16, device=device), torch.rand(8, 3, 8, 8, device=device)

    def tokens(weight, images, backend="cuda"):
        return vk.patch_embed(images, weight, mean=0.5, backend=backend)

    def loss(weight, image, backend="cuda"):
        return tokens(weight, image[None], backend).square().sum()

    for transformed in (
        lambda **kw: torch.func.vmap(partial(torch.func.grad(loss), **kw), (None, 0))(weight, images),
        lambda **kw: torch.func.jvp(partial(tokens, **kw), (weight, images), (weight, images))[1],
    ):
        torch.testing.assert_close(transformed(), transformed(backend="reference"), rtol=1e-4, atol=1e-3)
    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, images), tokens(weight, images))
