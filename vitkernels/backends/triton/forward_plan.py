"""How a problem becomes a launch: the kernel, its tile, and every argument but the data.

Pure arithmetic on a problem and a GPU's figures: the launch (forward_launch.py) and the offline compiler
(profiling/compile_triton.py) read the same plan, so what is inspected without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

from ...gpu import Gpu
from ...problem import PatchProblem
from ..patch_layout import PatchLayout, blocks_in, blocks_of, layout_of, no_copy_engine, product_of, scaling
from . import config_cache, configs
from .configs import Config

REPACK_ROWS = 4096  # patches of a call from which narrow loads of the weight cost more than one copy of it: a guess
PREFIX_ROWS = 16  # of a program that writes prefix tokens; forward_kernels.py's _prefix_tile


class Order(NamedTuple):
    """The order in which a kernel meets the elements of a patch, other than the weight's own (c, t, y, x)."""

    channels_last: bool  # (t, y, x, c)
    steps: tuple[int, int, int, int, int] | None  # C, P_h, P_w cut into blocks of RK rows × XK pixels


class Plan(NamedTuple):
    kernel: str  # "gather" or "descriptor"
    config: Config
    grid: int
    scalars: dict[str, int | float]
    constants: dict[str, object]  # dtypes as torch's
    descriptors: dict[str, tuple[list[int], list[int], list[int]]]  # name -> shape, strides, block
    order: Order
    weight_columns: int  # of the weight's rows; K: it may be read where it lies
    padded_K: int


def vector_of(p: PatchProblem, v: PatchLayout) -> tuple[int, tuple[int, int, int, int, int]]:
    """How many pixels are certain to begin at a multiple of as many, and the strides in units of that, the pixels' own
    excepted: so the compiler sees that addresses are aligned."""
    vec = 1
    if v.strides[4] == 1:
        vec = gcd(16, *(s for s, n in zip(v.strides[:4], (p.B, v.C, p.F, p.H), strict=True) if n > 1))
    b, c, f, h, w = v.strides
    return vec, (b // vec, c // vec, f // vec, h // vec, w)


def by_axis(**values: Sequence[int]) -> dict[str, int]:
    """P=(1, 16, 16) -> P_t, P_h, P_w"""
    return {f"{name}_{axis}": n for name, sizes in values.items() for axis, n in zip("thw", sizes, strict=True)}


def settles(gpu: Gpu, product: str, in_registers: bool) -> bool:
    """Whether each step has to wait for its own product (primitives.product says why): a left operand that is
    converted, normalised or rearranged on its way from shared memory passes through registers."""
    return in_registers and gpu.arch == 90 and product in ("half", "tf32")


def no_descriptor(p: PatchProblem, gpu: Gpu, product: str, aligned: bool) -> list[str]:
    """Why the copy engine can't cut this image into patches; none: it can."""
    layout = layout_of(p)
    size, out = p.image_dtype.itemsize, p.out_dtype.itemsize
    reasons = [
        (not configs.rows(gpu.arch, "descriptor", product), f"no descriptor kernel for {product} on sm_{gpu.arch}"),
        *((True, reason) for reason in no_copy_engine(p, layout, 0 if aligned else 8)),
        (p.D * out % 16 != 0, f"a token has {p.D * out} bytes, no multiple of 16"),
        (
            _steps(p, layout) is None,
            f"patch rows of {layout.P[2] * size} bytes do not split into blocks of 16 bytes or more",
        ),
    ]
    return [text for wrong, text in reasons if wrong]


def kernels_of(p: PatchProblem, gpu: Gpu, product: str, aligned: bool) -> tuple[str, ...]:
    """The kernels that can take the forward, the one to take first.

    Pixels that pass through registers anyway are brought by the copy engine for less (from uint8 158 against 190 µs on
    an H200, at b74a4aa, when neither waited for its products); those that don't are gathered, with products in flight
    (157 µs, where the copy engine's would wait, for some 150 by an estimate that was not measured).
    """
    if no_descriptor(p, gpu, product, aligned):
        return ("gather",)
    return ("descriptor", "gather") if _in_registers(p, product) else ("gather", "descriptor")


def _in_registers(p: PatchProblem, product: str) -> bool:
    return scaling(p, product)[0] or p.image_dtype != p.compute_dtype


def _steps(p: PatchProblem, v: PatchLayout) -> tuple[int, int] | None:
    """(RK, XK): a step takes RK rows of XK pixels of each patch, 128 bytes of the product's operands."""
    BK = 128 // p.compute_dtype.itemsize
    XK = min(gcd(v.P[2], BK), BK)
    RK = min(gcd(v.P[1], BK), BK // XK)
    return (RK, XK) if XK * p.image_dtype.itemsize >= 16 and RK * XK >= 16 else None


@config_cache.planned
def make_plan(
    p: PatchProblem, gpu: Gpu, aligned: bool, tf32: bool, interpreted: bool = False,
    choice: tuple[str, Config] | None = None,
) -> Plan:  # fmt: skip
    """The launch of this problem; `choice` names a kernel and a tile instead of the tables."""
    product = product_of(p, tf32)
    if choice is None:
        kernels = kernels_of(p, gpu, product, aligned)
        choice = config_cache.remembered(
            gpu,
            config_cache.key(p, product, "descriptor" in kernels),
            kernels,
            lambda c: configs.fitted(p, c, gpu) == c,
        ) or (kernels[0], configs.default(p, kernels[0], product, gpu))
    kernel, c = choice
    normalised, scaled = scaling(p, product)
    constants: dict[str, object] = {
        "NORMALISED": normalised,
        "SCALED": scaled,
        # Bias and position start the sum, as loaded after it they would need registers beside it; but where tokens keep
        # more than 16 bits, a sum that starts at them loses what is small beside them.
        "BASE_FIRST": p.compute_dtype.itemsize == 2,
        "HAS_BIAS": p.has_bias,
        "HAS_POS": p.pos_rows > 0,
        "POS_PREFIX": p.pos_rows > p.N,
        "HAS_PREFIX": p.T > 0,
        "COMPUTE": p.compute_dtype,
        "INTERPRETED": interpreted,
        "SUM": p.sum_dtype,
        "PRECISION": "tf32" if product == "tf32" else "ieee",
        "SETTLE": settles(gpu, product, kernel == "descriptor" or _in_registers(p, product)),
        "BN": c.BN,
    }
    prefixes = -(-p.B * p.T // PREFIX_ROWS) * -(-p.D // c.BN)
    scalars: dict[str, int | float] = {"B": p.B, "T": p.T, "D": p.D, "scale": p.scale}
    return (_descriptor if kernel == "descriptor" else _gather)(p, c, prefixes, scalars, constants)


def _descriptor(
    p: PatchProblem, c: Config, prefixes: int, scalars: dict[str, int | float], constants: dict[str, object]
) -> Plan:
    """Patches are cut by the copy engine."""
    v = layout_of(p)
    RK, XK = _steps(p, v)  # type: ignore[misc]
    block = blocks_of(p, c.BM)
    _, gh, gw = p.G
    b, _c, _f, h, _w = v.strides
    columns = v.C * v.P[1] * v.P[2]
    row = p.T + p.N
    return Plan(
        "descriptor", c,
        grid=blocks_in(p, block) * -(-p.D // c.BN) + prefixes,
        scalars={**scalars, "H": p.H, "G_h": gh, "G_w": gw},
        constants={
            **constants, "C": v.C, "P_h": v.P[1], "P_w": v.P[2],
            "BB": block[0], "BY": block[1], "BX": block[2], "RK": RK, "XK": XK,
        },
        descriptors={
            "image_desc": ([p.B, gh, gw, v.C * p.H, v.P[2]],
                           [b if p.B > 1 else gh * v.S[1] * h, v.S[1] * h, v.S[2], h, 1],  # one image has no next
                           [*block, RK, XK]),
            "weight_desc": ([p.D, columns], [columns, 1], [c.BN, RK * XK]),
            "out_desc": ([p.B, gh, gw, p.D], [row * p.D, gw * p.D, p.D, 1], [*block, c.BN]),
        },
        order=Order(v.channels_last, None if XK == v.P[2] else (v.C, v.P[1], v.P[2], RK, XK)),
        weight_columns=columns, padded_K=columns,
    )  # fmt: skip


def _gather(
    p: PatchProblem, c: Config, prefixes: int, scalars: dict[str, int | float], constants: dict[str, object]
) -> Plan:
    """Pixels are loaded one by one, or as many as lie side by side."""
    v = layout_of(p)
    vec, (b, ch, f, h, w) = vector_of(p, v)
    padded_K = -(-p.K // c.BK) * c.BK
    # Rows of the weight that are no multiple of 16 bytes (P = 14: 1176) are repacked with zeros behind them, so that
    # they are loaded 16 bytes at a time; below this much work the copy would cost more than narrow loads.
    repack = p.K * p.compute_dtype.itemsize % 16 != 0 and p.B * p.rows >= REPACK_ROWS
    return Plan(
        "gather", c,
        grid=-(-p.B * p.rows // c.BM) * -(-p.D // c.BN) + prefixes,
        scalars={
            **scalars, "rows": p.rows, "F": p.F, "H": p.H, "W": v.W, "G_t": p.G[0], "G_h": p.G[1], "G_w": p.G[2],
            "image_b": b, "image_c": ch, "image_f": f, "image_h": h, "image_w": w, "k_stop": padded_K,
        },
        constants={
            **constants, "HAS_KEEP": p.n_keep is not None, "K": p.K, "K_PAD": padded_K, "VEC": vec,
            "WROW": padded_K if repack else p.K, "BM": c.BM, "BK": c.BK,
            **by_axis(P=v.P, S=v.S, pad=v.pad),
        },
        descriptors={}, order=Order(v.channels_last, None),
        weight_columns=padded_K if repack else p.K, padded_K=padded_K,
    )  # fmt: skip
