"""What is worth trying when a kernel is tuned: neighbours of the table's tiles, by promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

from ..backends.patch_layout import product_of
from ..backends.triton import config_cache, configs
from ..backends.triton.backward_plan import cells_of, dense, operands, split_of, weight_choices, weight_kernels
from ..backends.triton.configs import Choice, Config
from ..backends.triton.forward_plan import kernels_of
from ..gpu import Gpu, tf32
from ..problem import PatchProblem

# Guess, not measured: multiply-adds that one multiprocessor takes while the L2 brings a byte (H100: some 5.5 TB/s).
PER_BYTE = {"half": 0.7, "tf32": 0.35, "fp32": 0.05, "fp64": 0.05}


def estimate(M: int, columns: int, depth: int, c: Config, gpu: Gpu, product: str, left: int, right: int) -> float:
    """What a product [M, depth] × [depth, columns] costs in these tiles, in multiply-adds of one multiprocessor: its
    waves, and the operands (`left`, `right` bytes an element) that all programs together read."""
    programs = -(-M // c.BM) * -(-columns // c.BN)
    traffic = programs * depth * (c.BM * left + c.BN * right)
    return configs.waves(M, columns, c, gpu) * depth + PER_BYTE[product] * traffic


def variants(c: Config) -> Iterator[Config]:
    """This tile, then its neighbours in height, stages and warps whose sums fit the registers."""
    yield c
    for BM in sorted({c.BM, c.BM // 2, c.BM * 2} & {32, 64, 128}, key=lambda BM: BM != c.BM):
        for stages in (3, 4, 2, 5):
            for warps in dict.fromkeys((c.warps, 4, 8)):
                if BM * c.BN // warps <= 128 * 256 // 8:
                    yield c._replace(BM=BM, stages=stages, warps=warps)


def ranked(default: Choice, found: Sequence[Choice], cost: Callable[[Choice], float]) -> list[Choice]:
    """The default, then the cheapest by the model: of every tile one, then its other stages and warps. What should cost
    three times the cheapest is left out."""
    costs = {choice: cost(choice) for choice in dict.fromkeys((default, *found))}
    first: dict[tuple[Any, ...], Choice] = {}
    for kernel, c in costs:
        first.setdefault((kernel, *c[:3]), (kernel, c))
    limit = 3 * min(costs.values())
    others = [choice for choice in costs if choice != default and costs[choice] <= limit]
    others.sort(key=lambda choice: (choice not in first.values(), costs[choice]))
    return [default, *others]


def tuning_key(p: PatchProblem, gpu: Gpu, aligned: bool, direction: str = "forward") -> str:
    product = product_of(p, tf32())
    kernels: dict[str, Any] = {}
    if direction == "forward":
        kernels = dict.fromkeys(kernels_of(p, gpu, product, aligned))
    elif direction == "weight":
        kernels = weight_kernels(p, gpu, product, dense(p)._replace(aligned=aligned))
    return config_cache.key(p, product, bool({"descriptor", "weight_descriptor"} & set(kernels)), direction)


def candidates_of(p: PatchProblem, gpu: Gpu, aligned: bool, direction: str = "forward") -> list[tuple[str, Config]]:
    """(kernel, tile) to try for a direction, "forward", "weight" or "images": the default first, then by promise."""
    product = product_of(p, tf32())
    if direction != "forward":
        return gradient_candidates(p, gpu, product, direction, aligned)
    kernels = kernels_of(p, gpu, product, aligned)
    found = [
        (kernel, c)
        for kernel in kernels
        for row in configs.rows(gpu.arch, kernel, product)
        for c in variants(configs.fitted(p, row, gpu))
        if configs.fitted(p, c, gpu) == c
    ]
    sizes = p.image_dtype.itemsize, p.compute_dtype.itemsize
    return ranked(
        (kernels[0], configs.default(p, kernels[0], product, gpu)), found,
        lambda choice: estimate(p.B * p.rows, p.D, p.K, choice[1], gpu, product, *sizes),
    )  # fmt: skip


def gradient_candidates(p: PatchProblem, gpu: Gpu, product: str, direction: str, aligned: bool) -> list[Choice]:
    """(kernel, tile) to try for "weight" or "images": the one that the table picks first, then by promise."""
    sizes = operands(p, p.out_dtype, direction)
    if direction == "weight":
        grad = dense(p)._replace(aligned=aligned)
        kernels = weight_kernels(p, gpu, product, grad)
        default = next(iter(weight_choices(p, gpu, product, grad).items()))
        cost = lambda choice: split_of(p, choice[0], choice[1], gpu).cost  # noqa: E731
    else:
        kernels = {"images": configs.rows(gpu.arch, "images", product)}
        M, columns = p.B * cells_of(p), p.C * prod(p.S)
        depth = p.D * prod(-(-P // S) for P, S in zip(p.P, p.S, strict=True))
        tiles = [configs.staged(c, gpu, *sizes) for c in kernels["images"]]
        default = "images", min(tiles, key=lambda c: configs.waves(M, columns, c, gpu))
        cost = lambda choice: estimate(M, columns, depth, choice[1], gpu, product, *sizes)  # noqa: E731
    near = [
        (kernel, c)
        for kernel, tiles in kernels.items()
        for tile in tiles
        for c in variants(configs.staged(tile, gpu, *sizes))
        if configs.staged(c, gpu, *sizes) == c
    ]
    return ranked(default, near, cost)
