"""Machines on which Triton can't compile: no compiler, no headers, no folder to write; known before, or at the first
call. The next backend runs, and a named one says what to do."""

import os
import subprocess
import sys
import sysconfig
import warnings

import pytest
import torch
from problems import arguments

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.backends import fallbacks

pytest.importorskip("triton")
from vitkernels.backends.triton import config_cache, launch, toolchain

META = dict(images=torch.empty(1, 3, 32, 32, device="meta"), weight=torch.empty(8, 3, 8, 8, device="meta").bfloat16())


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    def forget():
        fallbacks._unusable.clear()
        dispatch._choose.cache_clear()
        toolchain.missing.cache_clear()
        config_cache.forget_plans()

    monkeypatch.setattr(toolchain, "_has_launched", lambda: False)  # on a machine with a GPU it has
    forget()
    yield
    monkeypatch.undo()
    forget()


def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def without_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})


def without_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))


LACKING = {
    "compiler": (without_compiler, ["neither gcc nor clang", "install gcc, or set CC"]),
    "CC": (lambda m, _: m.setenv("CC", "/no/such/cc"), ["CC = '/no/such/cc'"]),
    "headers": (without_headers, ["no Python.h", "python3-dev"]),
    "cache": (without_cache, ["can't be made", "TRITON_CACHE_DIR"]),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_is_lacking_is_known_before_a_call(what, monkeypatch, tmp_path):
    assert vk.explain(**META, gpu="sm_90").chosen == "triton"
    toolchain.missing.cache_clear()
    dispatch._choose.cache_clear()
    take_away, said = LACKING[what]
    take_away(monkeypatch, tmp_path)
    explanation = vk.explain(**META, gpu="sm_90")
    assert all(words in explanation["triton"][0] for words in said), explanation
    assert explanation.chosen != "triton"


def test_what_was_compiled_before_needs_no_compiler(monkeypatch, tmp_path):
    without_compiler(monkeypatch, tmp_path)
    monkeypatch.setattr(toolchain, "_has_launched", lambda: True)
    assert vk.explain(**META, gpu="sm_90").chosen == "triton"


def test_a_read_only_folder_may_hold_all_that_is_needed(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert toolchain._cache() == ""


def test_a_home_that_can_not_be_written(tmp_path):
    """As a user meets it: the whole process."""
    (tmp_path / "file").touch()
    code = """if True:
        import torch, vitkernels as vk
        images, weight = torch.empty(1, 3, 32, 32, device="meta"), torch.empty(8, 3, 8, 8, device="meta")
        print(vk.explain(images, weight, gpu="sm_90"))
    """
    away = ("TRITON_CACHE_DIR", "TRITON_HOME", "CC")
    env = {k: v for k, v in os.environ.items() if k not in away} | {"HOME": str(tmp_path / "file"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "neither gcc nor clang" in done.stdout, done.stderr
    assert "set TRITON_CACHE_DIR" in done.stdout


MACHINE = {  # what Triton 3.6 to 3.9 raise
    "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set …"),
    "no Python.h": subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x/main.c", "-O3", "-shared"]),
    "read-only": PermissionError(13, "Permission denied", "/root/.triton"),
    "no space": OSError(28, "No space left on device"),
    "a file that went": FileNotFoundError(2, "No such file or directory", "/root/.triton/cache/A/cuda_utils.so"),
    "not loaded": ImportError("/root/.triton/cache/A/__triton_launcher.so: failed to map segment from shared object"),
    "no folder": RuntimeError("Could not create or locate cache dir"),
}
OTHER = {
    "out of memory": RuntimeError("Triton Error [CUDA]: out of memory"),
    "illegal address": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "our mistake": KeyError("BM"),
}


def failing(monkeypatch, error, names):
    kernel_of = launch.kernel_of

    class Kernel:
        def __init__(self, kernel):
            self.arg_names = kernel.arg_names

        def __getitem__(self, grid):
            return self

        def __call__(self, *_, **__):
            raise error

    monkeypatch.setattr(launch, "kernel_of", lambda name: Kernel(kernel_of(name)) if name in names else kernel_of(name))


FORWARD, BACKWARD = ("gather_kernel", "descriptor_kernel"), ("reduce_kernel", "finish_kernel", "images_kernel")


@pytest.mark.parametrize("kernels", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("name", MACHINE)
def test_what_shows_at_the_first_call_is_remembered(name, kernels, monkeypatch, device):
    call = arguments(B=2, H=32, W=32, P=8, D=16, pixels=torch.float32, weights=torch.float32, device=device)
    call["weight"].requires_grad_()
    tokens = vk.patch_embed(**call, backend="reference")
    (expected,) = torch.autograd.grad(tokens.sum(), call["weight"])
    row = dispatch.Row(("triton", "reference"), "a test")
    monkeypatch.setattr(dispatch, "row_of", lambda *_: row)
    failing(monkeypatch, MACHINE[name], kernels)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            got = vk.patch_embed(**call)
            (gradient,) = torch.autograd.grad(got.sum(), call["weight"])
    ours = [str(w.message) for w in warned if w.category is UserWarning]
    assert [text.startswith("backend 'triton' is not used") for text in ours] == [True], ours
    torch.testing.assert_close(got, tokens)
    torch.testing.assert_close(gradient, expected)
    assert toolchain.REMEDY in vk.explain(**call)["triton"][0]
    assert type(MACHINE[name]).__name__ in vk.explain(**call)["triton"][0]
    with pytest.raises(NotImplementedError, match="TRITON_CACHE_DIR"):
        vk.patch_embed(**call, backend="triton")


@pytest.mark.filterwarnings("ignore:backend 'triton' is not used")
def test_a_named_backend_says_what_to_do_in_its_first_call(monkeypatch, device):
    call = arguments(B=2, H=32, W=32, P=8, D=16, device=device)
    failing(monkeypatch, MACHINE["no compiler"], FORWARD)
    with pytest.raises(NotImplementedError, match="install gcc"):
        vk.patch_embed(**call, backend="triton")


@pytest.mark.filterwarnings("ignore:backend 'triton' is not used")
def test_a_gpu_that_is_newer_than_triton(monkeypatch, device):
    call = arguments(B=2, H=32, W=32, P=8, D=16, device=device)
    said = "PTXAS error: `ptxas` stderr: ptxas fatal   : Value 'sm_110a' is not defined for option 'gpu-name'"
    failing(monkeypatch, type("PTXASError", (Exception,), {})(said), FORWARD)
    with pytest.raises(NotImplementedError, match=r"sm_110a.*take a newer Triton"):
        vk.patch_embed(**call, backend="triton")


@pytest.mark.parametrize("name", OTHER)
def test_any_other_error_is_one(name, monkeypatch, device):
    call = arguments(B=2, H=32, W=32, P=8, D=16, device=device)
    failing(monkeypatch, OTHER[name], FORWARD)
    for _ in range(2):
        with pytest.raises(type(OTHER[name])):
            vk.patch_embed(**call, backend="triton")
