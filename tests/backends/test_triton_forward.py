"""The Triton forward by kernel and tile, in the interpreter where there is no GPU; plans and tables by arithmetic."""

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import pytest
import torch
from problems import arguments, on

import vitkernels as vk
from vitkernels.backends import fallbacks, patch_layout, triton
from vitkernels.backends.triton import config_cache, configs, forward_launch, forward_plan
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton
from vitkernels.testing import accuracy
from vitkernels.tuning import tune

pytest.importorskip("triton")

H100 = NOMINAL[90]
NORM = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
HALF, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
NO_MAP = "Triton Error [CUDA]: Failed to create tensor map descriptor"


@pytest.fixture(autouse=True)
def fresh_plans():
    config_cache.forget_plans()
    yield
    config_cache.forget_plans()


def problem(call):
    return vk.explain(**call).problem


def right(call):
    (row,) = accuracy.compare(call, "triton")
    assert row["ok"], row


DESCRIPTOR = {
    "bf16": dict(B=3, C=3, H=32, W=48, P=16, D=40, pixels=HALF),
    "batch no multiple of the block": dict(B=33, C=1, H=32, W=32, P=16, D=8, pixels=HALF),
    "uint8": dict(B=3, C=3, H=32, W=48, P=16, D=40, pixels=U8),
    "uint8 normalised": dict(B=3, C=3, H=32, W=48, P=16, D=40, pixels=U8, **NORM),
    "uint8 channels-last normalised": dict(B=3, C=3, H=32, W=48, P=16, D=40, pixels=U8, channels_last=True, **NORM),
    "bf16 channels-last": dict(B=2, C=3, H=48, W=32, P=16, D=24, T=0, pixels=HALF, channels_last=True),
    "fp32 pixels, fp16 weights": dict(B=2, C=4, H=24, W=40, P=8, D=16, T=5, pixels=F32, weights=torch.float16),
    "P = 32, positions per image": dict(B=3, C=3, H=64, W=96, P=32, D=40, pixels=HALF, pos="B"),
    "patches apart": dict(B=2, C=3, H=40, W=72, P=16, D=16, pixels=HALF, pos="N", stride=24),
    "overlap": dict(B=2, C=3, H=32, W=48, P=16, D=16, pixels=HALF, stride=8),
    "patches not square": dict(B=2, C=3, H=32, W=48, P=(4, 16), D=16, pixels=HALF),
    "13 channels": dict(B=1, C=13, H=32, W=32, P=16, D=16, pixels=HALF),
    "an odd grid that leaves pixels over": dict(B=2, C=3, H=57, W=80, P=16, D=16, pixels=HALF),
}


@pytest.mark.parametrize("name", DESCRIPTOR)
@pytest.mark.parametrize("tile", configs.TABLE[90, "descriptor", "half"], ids=lambda c: f"{c.BM}x{c.BN}")
def test_descriptor_kernel(name, tile, monkeypatch, device):
    call = arguments(**DESCRIPTOR[name], device=device)
    assert forward_plan.no_descriptor(problem(call), H100, "half", True) == []
    monkeypatch.setattr(forward_plan, "kernels_of", lambda *_: ("descriptor",))
    monkeypatch.setattr(configs, "default", lambda *_: tile)
    right(call)


@pytest.mark.parametrize("name", DESCRIPTOR)
@pytest.mark.parametrize("tile", configs.TABLE[90, "gather", "half"], ids=lambda c: f"{c.BM}x{c.BN}")
def test_gather_kernel_takes_the_same_problems(name, tile, monkeypatch, device):
    call = arguments(**DESCRIPTOR[name], device=device)
    monkeypatch.setattr(forward_plan, "kernels_of", lambda *_: ("gather",))
    monkeypatch.setattr(configs, "default", lambda *_: tile)
    right(call)


def test_an_odd_patch_reads_a_repacked_weight_once_the_work_pays_for_it(device, monkeypatch):
    small = problem(arguments(2, 3, 28, 28, 14, 16, pixels=HALF, device=device))
    large = problem(arguments(256, 3, 56, 56, 14, 16, pixels=HALF, device=device))
    direct, repacked = (forward_plan.make_plan(p, H100, True, False).weight_columns for p in (small, large))
    assert direct == 588 and repacked > 588 and repacked * 2 % 16 == 0
    monkeypatch.setattr(forward_plan, "REPACK_ROWS", 0)
    right(arguments(2, 3, 28, 28, 14, 16, pixels=HALF, device=device))


def test_a_written_weight_is_never_stale(device, monkeypatch):
    """Whatever the write leaves of the parameter's version: in place, `.data`, load_state_dict, an optimiser's step."""
    monkeypatch.setattr(forward_plan, "REPACK_ROWS", 0)
    call = arguments(2, 3, 28, 28, 14, 8, pixels=U8, device=device, **NORM)
    layer = torch.nn.Conv2d(3, 8, 14, 14).to(device, HALF)
    call["weight"] = layer.weight

    def step():
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimiser.step()

    writes = [
        lambda: None,
        lambda: layer.weight.detach().mul_(2),
        lambda: layer.weight.data.add_(0.5),
        lambda: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        step,
    ]
    for write in writes:
        write()
        with torch.no_grad():
            right(call)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (dict(keep=torch.zeros(2, 3, dtype=torch.long)), "keep list"),
        (dict(padding=2, pos_embed=None), "padding (2, 2)"),
        (dict(images=torch.zeros(2, 3, 32, 96)[..., ::2]), "2 apart"),
        (dict(images=torch.zeros(2, 6, 32, 48)[:, ::2]), "channels are 3072 apart, not H·row = 1536"),
        (dict(images=torch.zeros(1, 3, 32, 48).expand(2, -1, -1, -1)), "images are 0 bytes apart"),
        (dict(images=torch.zeros(2, 3, 32, 50)[..., :48]), "rows are 200 bytes"),
        (dict(stride=7, pos_embed=None), "patches are 28 bytes apart"),
    ],
)
def test_the_descriptor_road_says_why_not_with_numbers(change, number, device):
    call = {**arguments(2, 3, 32, 48, 16, 40, pixels=F32), **change}
    reasons = forward_plan.no_descriptor(problem(call), H100, "half", True)
    assert any(number in reason for reason in reasons), reasons
    right(on(device, call))


def test_what_no_descriptor_can_do_here():
    p = problem(arguments(2, 3, 28, 28, 14, 20, pixels=HALF))
    assert "patches are 28 bytes apart, no multiple of 16" in forward_plan.no_descriptor(p, H100, "half", True)
    assert "a token has 40 bytes, no multiple of 16" in forward_plan.no_descriptor(p, H100, "half", True)
    assert "images do not start on 16 bytes" in forward_plan.no_descriptor(p, H100, "half", False)
    assert any("sm_80" in r for r in forward_plan.no_descriptor(p, NOMINAL[80], "half", True))


@pytest.mark.parametrize("BM", (64, 128))
@pytest.mark.parametrize("grid", [(256, 14, 14), (1, 14, 14), (7, 7, 7), (64, 16, 16), (3, 1, 200), (256, 37, 37)])
def test_blocks_cover_the_grid(grid, BM):
    B, gh, gw = grid
    call = dict(images=torch.zeros(1, 3, 16 * gh, 16 * gw).expand(B, -1, -1, -1), weight=torch.zeros(8, 3, 16, 16))
    block = patch_layout.blocks_of(problem(call), BM)
    assert prod(block) == BM
    waste = prod(-(-n // b) * b for n, b in zip(grid, block, strict=True)) / prod(grid)
    assert waste < (1.5 if prod(grid) >= BM else 4)
    if grid == (256, 14, 14):
        assert waste == 1


def test_pixels_past_2_31_elements(device):
    """Addresses are 64-bit: only the last patches of an image of 4.8 · 10⁹ pixels are touched, or paid for."""
    side = 40_000
    pixels = np.zeros((3, side, side), np.uint8)  # pages that are never touched are never there
    images = torch.from_numpy(pixels)[None]
    images[..., -16:, -32:] = torch.randint(0, 256, (3, 16, 32), dtype=torch.uint8)
    N = (side // 16) ** 2
    call = dict(images=images, weight=torch.randn(8, 3, 16, 16), keep=torch.tensor([[N - 1, 0, N - 2]]))
    patch = images[0, :, -16:, -16:].double().flatten() / 255
    exact = patch @ call["weight"].double().flatten(1).t()
    for backend in ("reference", "triton"):
        tokens = vk.patch_embed(**on(device, call), backend=backend).cpu()
        torch.testing.assert_close(tokens[0, 0].double(), exact, rtol=1e-5, atol=1e-4)
        assert tokens[0, 1].abs().max() == 0


def test_an_index_out_of_range_is_nan_where_it_is_not_checked(monkeypatch, device):
    from vitkernels import ops

    monkeypatch.setattr(ops, "check_keep", lambda *_: None)
    call = arguments(2, 3, 32, 32, 8, 16, pixels=HALF)
    call["keep"] = torch.tensor([[0, 16, 3], [-1, 2, 15]])
    tokens = vk.patch_embed(**on(device, call), backend="triton")
    lost = tokens.isnan().all(-1)
    assert lost.tolist() == [[False, False, True, False], [False, True, False, False]]


def test_tables_pick_large_tiles_for_large_batches_and_small_for_one_image():
    def tile(B, D=768):
        return configs.default(compile_triton.problem(16, "bf16", B=B, D=D), "gather", "half", H100)

    assert (tile(256).BM, tile(256).BN) == (128, 256)
    assert tile(1).BM * tile(1).BN < 128 * 128
    assert tile(256, D=384).BN == 128  # 256 wide tiles would be a quarter empty


def test_every_gpu_has_a_tile_that_fits():
    for arch, gpu in NOMINAL.items():
        for patch in compile_triton.PATCHES:
            for dtype, (_, _, tf32) in compile_triton.DTYPES.items():
                p = compile_triton.problem(patch, dtype)
                product = patch_layout.product_of(p, tf32)
                for kernel in ("gather", "descriptor"):
                    if configs.rows(arch, kernel, product):
                        c = configs.default(p, kernel, product, gpu)
                        stage = c.BK * (c.BM * p.image_dtype.itemsize + c.BN * p.compute_dtype.itemsize)
                        assert c.stages * stage <= gpu.shared_bytes


def test_a_measured_entry_goes_before_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path))
    config_cache.measured.cache_clear()
    p = compile_triton.problem(16, "bf16")
    gpu = H100._replace(name="Some GPU 9000")
    entry = {"kernel": "descriptor", "config": [64, 64, 64, 4, 2, 1.0], "ms": 0.1, **config_cache.compiled_from()}
    file = config_cache.remember(gpu.name, config_cache.key(p, "half", True), entry)
    assert file.name == "some-gpu-9000.json"
    config_cache.forget_plans()
    chosen = forward_plan.make_plan(p, gpu, True, False)
    assert (chosen.kernel, chosen.config.stages) == ("descriptor", 2)
    assert forward_plan.make_plan(compile_triton.problem(16, "bf16", B=2), gpu, True, False).kernel == "gather"
    config_cache.measured.cache_clear()


def test_a_refused_descriptor_falls_to_the_gather_kernel(monkeypatch, device):
    call = arguments(2, 3, 32, 48, 16, 40, pixels=U8, device=device)
    real = forward_launch._launch

    def launch(p, prepared, *rest):
        if prepared.plan.kernel == "descriptor":
            raise RuntimeError(f"{NO_MAP}: invalid argument\nelemType=9 rank=5")
        real(p, prepared, *rest)

    monkeypatch.setattr(forward_launch, "_launch", launch)
    monkeypatch.setattr(fallbacks, "_reasons", {})
    with pytest.warns(UserWarning, match="invalid argument elemType=9 rank=5; pixels are gathered") as told:
        right(call)
    assert sum("pixels are gathered" in str(warning.message) for warning in told) == 1  # NumPy may warn besides
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pixels are gathered")
        right(call)
    explained = vk.explain(**call)
    assert explained.notes["triton"] == triton.HOW["gather"]
    assert "fell back: Triton Error" in str(explained) and list(explained.fallbacks) == ["triton"]


@pytest.mark.parametrize("error", [
    f"{NO_MAP}: invalid device context\nelemType=9", f"{NO_MAP}: an illegal memory access was encountered\nelemType=9",
    "Triton Error [CUDA]: invalid argument", "CUDA error: invalid argument",
])  # fmt: skip
def test_no_other_error_is_a_refusal(monkeypatch, device, error):
    call = arguments(2, 3, 32, 48, 16, 40, pixels=U8, device=device)

    def launch(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(forward_launch, "_launch", launch)
    monkeypatch.setattr(fallbacks, "_reasons", {})
    with pytest.raises(RuntimeError, match=re.escape(error)):
        vk.patch_embed(**call, backend="triton")
    assert fallbacks.listed() == []


@pytest.mark.parametrize("kernel", ["descriptor", "gather"])
def test_descriptors_are_made_in_a_context(monkeypatch, device, kernel):
    """Triton gives a thread one only as it launches, when they are there already."""
    call = arguments(2, 3, 32, 48, 16, 40, pixels=HALF, device=device)
    p, done, real = problem(call), [], forward_launch._prepared

    def prepared(*args):
        made = real(*args)
        return made._replace(kernel=lambda *tensors: (done.append("kernel"), made.kernel(*tensors)))

    monkeypatch.setattr(forward_plan, "kernels_of", lambda *_: (kernel,))
    monkeypatch.setattr(forward_launch, "_prepared", prepared)
    monkeypatch.setattr(forward_launch, "bind_context", lambda on: done.append(on))
    vk.patch_embed(**call, backend="triton")
    assert done == [p.device] * (kernel == "descriptor") + ["kernel"]


def test_a_new_thread(monkeypatch, device):
    """It has no context yet; and memory for its tokens is there, so that PyTorch needs none either."""
    call = arguments(2, 3, 32, 48, 16, 40, pixels=HALF, device=device)
    monkeypatch.setattr(fallbacks, "_reasons", {})
    tokens = vk.patch_embed(**call, backend="triton").cpu()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(vk.patch_embed, **call, backend="triton").result().cpu(), tokens)
    assert fallbacks.listed() == []


def test_tune_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NotImplementedError, match="on cpu"):
        tune.tune(arguments(2, 3, 32, 48, 16, 40))
