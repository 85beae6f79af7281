"""What `bound` launches without Triton's own look at the arguments is what Triton would launch."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vitkernels.backends.triton import launch
from vitkernels.backends.triton.configs import Config
from vitkernels.backends.triton.launch import Descriptor, bound

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


@pytest.fixture
def launched(monkeypatch):
    """Triton's own way to a launch, as for an H100, up to the driver: (what it compiled, grid, arguments) of each."""
    done: list[tuple[object, ...]] = []
    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )

    class Compiled:
        function = packed_metadata = None
        launch_metadata = staticmethod(lambda *_: None)

        def __init__(self, key):
            self.key = key

        def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            done.append((self.key, (x, y, z), arguments))

        def __getitem__(self, grid):
            return lambda *arguments: done.append((self.key, grid, arguments))

    def compiled(self, key, signature, device, *_):
        return self.device_caches[device][0].setdefault(key, Compiled(key))

    monkeypatch.setattr(driver, "_active", hopper, raising=False)
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    return done


@pytest.fixture
def kernel(launched, monkeypatch):
    """`reduce_kernel` for a GPU, whether or not this session interprets; how often Triton looked at its arguments."""
    jit = JITFunction(launch.kernel_of("reduce_kernel").fn)
    jit.looks = 0
    run = jit.run

    def looked(*arguments, **options):
        jit.looks += 1
        return run(*arguments, **options)

    monkeypatch.setattr(jit, "run", looked)
    monkeypatch.setattr(launch, "kernel_of", lambda name: jit)
    return jit


def others(jit):
    names = [name for name in jit.arg_names if name not in TENSORS]
    constants = {param.name for param in jit.params if param.is_constexpr}
    dice = random.Random(0)
    values = {name: dice.choice((0, 1, 2, 3, 16, 48, 2**31 + 16)) for name in names}
    return {n: v for n, v in values.items() if n not in constants}, {n: v for n, v in values.items() if n in constants}


TENSORS = ("images", "grad", "centred", "keep", "weight_parts", "table_parts", "bias_parts")


def drawn(dice):
    """Tensors of a launch: some absent, some a few elements into their memory, some of another dtype."""
    aligned = dice.random() < 0.5
    tensors = []
    for _ in TENSORS:
        at = 0 if aligned else dice.choice((0, 0, 1, 4, 16))
        tensors.append(None if dice.random() < 0.2 else torch.zeros(64, dtype=dice.choice(DTYPES))[at:])
    return tensors


def same(one, two):
    return one is two if isinstance(one, torch.Tensor) else one == two


def test_a_launch_is_the_one_that_triton_would_make(kernel, launched):
    scalars, constants = others(kernel)
    config = Config(64, 64, 16, 4, 3)
    run = bound("reduce_kernel", config, 7, scalars, constants)
    dice = random.Random(1)
    sets = [drawn(dice) for _ in range(60)]
    direct = 0
    for tensors in [dice.choice(sets) for _ in range(300)]:
        before = kernel.looks
        run(*tensors)
        direct += kernel.looks == before
        everything = dict(zip(TENSORS, tensors, strict=True)) | scalars | constants
        kernel[(7,)](**everything, **launch.options(config))
        (key, grid, got), (expected_key, expected_grid, expected) = launched[-2:]
        assert key == expected_key and grid == expected_grid
        assert len(got) == len(expected) and all(map(same, got, expected))
    assert 100 < direct < 250 and len({key for key, *_ in launched}) > 40


def test_triton_looks_at_aligned_tensors_of_some_dtypes_once(kernel, launched):
    run = bound("reduce_kernel", Config(64, 64, 16, 4, 3), 7, *others(kernel))
    tensors = [torch.zeros(64) for _ in TENSORS]
    for _ in range(2):  # what is not on 16 bytes, always
        run(tensors[0][1:], *tensors[1:])
    assert kernel.looks == 2
    for _ in range(5):
        run(*tensors)
    assert kernel.looks == 3 and len(launched) == 7
    run(tensors[0].half(), *tensors[1:])
    assert kernel.looks == 4


def test_descriptors(kernel, launched):
    run = bound("reduce_kernel", Config(64, 64, 16, 4, 3), 7, *others(kernel))
    descriptor = Descriptor([4, 16], [16, 1], [4, 16])
    rest = [torch.zeros(64) for _ in TENSORS[1:]]
    bases = [torch.zeros(4, 16) for _ in range(3)]
    for base in bases:
        run(descriptor(base), *rest)
    assert kernel.looks == 1
    assert [arguments[0].base is base for (_, _, arguments), base in zip(launched, bases, strict=True)] == [True] * 3


WATCHES = {
    "hooks": lambda patch, jit: patch.setattr(jit, "pre_run_hooks", [lambda *_, **__: None]),
    "instrumentation": lambda patch, jit: patch.setattr(knobs.compilation, "instrumentation_mode", "fpsan"),
    "stages": lambda patch, jit: patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("a", "b")),
}


@pytest.mark.parametrize("watch", WATCHES)
def test_while_somebody_watches_triton_looks_and_nothing_is_kept(kernel, monkeypatch, watch):
    run = bound("reduce_kernel", Config(64, 64, 16, 4, 3), 7, *others(kernel))
    tensors = [torch.zeros(64) for _ in TENSORS]
    looks = []
    for watched in (True, False, True, False):
        with monkeypatch.context() as patch:
            if watched:
                WATCHES[watch](patch, kernel)
            for _ in range(2):
                run(*tensors)
        looks.append(kernel.looks)
    assert looks == [2, 3, 5, 5]
