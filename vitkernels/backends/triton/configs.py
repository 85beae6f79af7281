"""Which tile a Triton kernel uses: a table per GPU generation, every entry of it compiled by the tests.

What `vitkernels tune` measured comes before it: config_cache.py.
"""

from __future__ import annotations

from typing import NamedTuple

from ...gpu import Gpu
from ...problem import PatchProblem


class Config(NamedTuple):
    """A tile of BM patches × BN channels, BK of K at a step; the warps and pipeline stages of one program."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    # Of the arithmetic units' that such a tile reaches, beside the row's best; a guess where the table names no figures
    rate: float = 1.0


Choice = tuple[str, Config]  # a kernel, gather, descriptor, weight, weight_descriptor or images, and its tile
GENERATION = {86: 80, 87: 80, 89: 80, 120: 80, 121: 80}  # as small in shared memory, and without wgmma


# (generation, kernel, product) -> tiles, large to small. `vitkernels inspect` compiles every one of them; the tests
# assert that none spills, that each fits the shared memory and that the tensor cores do the product.
TABLE: dict[tuple[int, str, str], tuple[Config, ...]] = {
    (80, "gather", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 64, 4, 3, 0.6), Config(32, 64, 64, 4, 3, 0.4)),
    (80, "gather", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.8)),
    (80, "gather", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "gather", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    # Measured on an H200 at B = 256 (benchmarks/results/nvidia-h200/tune.txt): 157, 188 and 268 µs with P = 16, 285,
    # 302 and 655 with P = 14.
    (90, "gather", "half"): (
        Config(128, 256, 32, 8, 4), Config(128, 128, 32, 4, 3, 0.85), Config(64, 64, 64, 4, 3, 0.55),
    ),
    (90, "gather", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (90, "descriptor", "half"): (
        Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4, 0.85), Config(64, 128, 64, 4, 4, 0.7),
        Config(64, 64, 64, 4, 4, 0.5),
    ),
    (90, "descriptor", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4, 0.6)),
    # Of the backward: BM channels × BN elements of a patch, BK patches at a step ("weight"), and BM cells × BN pixels,
    # BK channels at a step ("images").
    (80, "weight", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 64, 8, 3, 0.6)),
    # Beside a keep list, pixels that are converted, or a wider dY that is rounded on its way (autocast, where tokens
    # stay fp32).
    (80, "weight", "crowded"): (Config(128, 64, 16, 8, 3), Config(64, 64, 32, 8, 3, 0.8)),
    (80, "weight", "tf32"): (Config(128, 64, 16, 8, 3), Config(64, 64, 16, 8, 3, 0.8)),
    (80, "weight", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "weight", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    (80, "images", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (80, "images", "tf32"): (Config(128, 64, 16, 8, 3), Config(64, 64, 16, 8, 3, 0.8)),
    (80, "images", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "images", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    # Measured there, too: 439 and 635 µs; those of 8 warps take 679 and more.
    (90, "weight", "half"): (Config(128, 128, 64, 4, 3), Config(64, 64, 64, 4, 4, 0.7)),
    # Halves whose pixels are read by less than 16 bytes at a time: more addresses to hold. 1,271 µs with P = 14, where
    # 128×128×64 takes 1,646.
    (90, "weight", "narrow"): (Config(64, 64, 64, 4, 4),),
    (90, "weight", "crowded"): (Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 4, 0.6)),
    # Both operands by the copy engine: 145 µs for the product with P = 16 (161 from uint8), measured as an experiment.
    (90, "weight_descriptor", "half"): (Config(128, 128, 64, 4, 4), Config(64, 128, 64, 4, 4, 0.7)),
    (90, "weight", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (90, "images", "half"): (Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 3, 0.5)),
    (90, "images", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 8, 3, 0.6)),
    (100, "weight", "crowded"): (Config(64, 64, 64, 8, 4),),
    (100, "weight", "half"): (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4, 0.5)),
}  # fmt: skip


def rows(arch: int, kernel: str, product: str) -> tuple[Config, ...]:
    """The table's row for a GPU; a generation without one of its own uses an older one's."""
    generation = GENERATION.get(arch, arch)
    older = [g for g, *key in TABLE if key == [kernel, product] and g <= generation]
    return TABLE[max(older), kernel, product] if older else ()


def default(p: PatchProblem, kernel: str, product: str, gpu: Gpu) -> Config:
    """The row's tile with the fewest waves × work of a program, with no more stages than fit."""

    best = min(rows(gpu.arch, kernel, product), key=lambda c: waves(p.B * p.rows, p.D, c, gpu))
    return fitted(p, best, gpu)


def waves(M: int, columns: int, c: Config, gpu: Gpu) -> float:
    """Waves of programs × work of one, for each of the product's depth: multiply-adds of one multiprocessor."""
    programs = -(-M // c.BM) * -(-columns // c.BN)
    return -(-programs // gpu.multiprocessors) * c.BM * c.BN / c.rate


def fitted(p: PatchProblem, c: Config, gpu: Gpu) -> Config:
    return staged(c, gpu, p.image_dtype.itemsize, p.compute_dtype.itemsize, c.BM * c.BN * p.out_dtype.itemsize)


def staged(c: Config, gpu: Gpu, left: int, right: int, beside: int = 0) -> Config:
    """With no more stages than fit: left, right are the bytes of an operand's element, `beside` is taken by others."""
    stage = c.BK * (c.BM * left + c.BN * right)
    return c._replace(stages=max(1, min(c.stages, (gpu.shared_bytes - beside - 4096) // stage)))
