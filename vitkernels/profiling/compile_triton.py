"""Kernels compiled for a GPU that need not be there, and what their machine code says: registers, spills, shared
memory, tensor-core and copy-engine instructions, width of the image loads, hazards.

The SASS is read by `sass` and `hazards`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..backends.patch_layout import product_of
from ..backends.triton import configs, primitives
from ..backends.triton.backward_plan import (
    Launch,
    Wanted,
    dense,
    image_launch,
    reduction,
    weight_choices,
    weight_kernels,
)
from ..backends.triton.configs import Config, rows
from ..backends.triton.forward_plan import Plan, kernels_of, make_plan
from ..backends.triton.toolchain import unknown_gpu
from ..gpu import NOMINAL, Gpu
from ..problem import Arguments, Meta, PatchProblem, build
from . import sass
from .hazards import hazards

# Kernels of the backward: dW and sums in one launch, dW by the copy engine, sums alone, sums where patches are kept,
# second pass; dX.
GRADIENTS = ("weight", "weight_descriptor", "sums", "kept", "finish", "images")
ARCHS = (80, 90, 100)
PATCHES = (14, 16, 32)
DTYPES = {  # name -> pixels, weights, TF32 asked for
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp16": (torch.float16, torch.float16, False),
    "uint8->bf16": (torch.uint8, torch.bfloat16, False),
    "fp32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
    "autocast": (torch.float32, torch.float32, False),  # to bf16; the tokens are added up in fp32, as models do
}
NAMES = {
    torch.uint8: "u8", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip
# Widths and batches that people run: a tile is a default where the table picks it for one of them.
WIDTHS = (192, 384, 768, 1024, 1280)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def problem(patch: int, dtype: str, *, B: int = 256, D: int = 768, keep: bool = False) -> PatchProblem:
    """A ViT of 224×224 pixels with a class token, position table and, for uint8 pixels, a normalisation."""
    pixels, weights, _ = DTYPES[dtype]
    compute = torch.bfloat16 if dtype == "autocast" else weights
    side = 224 // patch
    cpu = torch.device("cpu")  # only the plan looks at it, and it asks the GPU's figures instead

    def meta(dtype: torch.dtype, *shape: int) -> Meta:
        return Meta(shape, torch.empty(shape, device="meta").stride(), dtype, cpu)

    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if pixels == torch.uint8 else (None, None)
    return build(
        meta(pixels, B, 3, 224, 224), meta(weights, D, 3, patch, patch), meta(weights, D),
        meta(weights, 1 + side * side, D), meta(weights, 1, D),
        meta(torch.int64, B, side * side // 4) if keep else None,
        Arguments((patch, patch), (0, 0), mean, std, 1 / 255 if pixels == torch.uint8 else 1.0, compute, weights),
    )  # fmt: skip


def shipped(arch: int, patch: int, dtype: str) -> list[tuple[PatchProblem, str, Config, bool]]:
    """Every (problem, kernel, tile, default) of the tables for this patch and dtype on this architecture."""
    gpu, tf32 = NOMINAL[arch], DTYPES[dtype][2]
    found: dict[tuple[str, Config, bool], tuple[PatchProblem, bool]] = {}
    for keep, D, B in product((False, True), WIDTHS, BATCHES):
        p = problem(patch, dtype, B=B, D=D, keep=keep)
        for kernel, picked, others in _kernels(p, gpu, tf32):
            apart = keep and kernel in ("weight", "sums")  # there it is a kernel of its own
            if picked is not None:
                found[kernel, picked, apart] = p, True
            for c in others:
                found.setdefault((kernel, c, apart), (p, False))
    return [(p, kernel, c, default) for (kernel, c, _), (p, default) in found.items()]


def _kernels(p: PatchProblem, gpu: Gpu, tf32: bool) -> Iterator[tuple[str, Config | None, list[Config]]]:
    """(kernel, the tile that its table picks, all its tiles) of forward and backward. Of the forward's second kernel no
    tile is picked: it is there to be tuned."""
    kind = product_of(p, tf32)
    first, *others = kernels_of(p, gpu, kind, True)
    yield first, configs.default(p, first, kind, gpu), []
    for kernel in (first, *others):
        yield kernel, None, [configs.fitted(p, c, gpu) for c in rows(gpu.arch, kernel, kind)]
    tiles = {**weight_kernels(p, gpu, kind, dense(p)), "sums": (), "kept" if p.n_keep else "finish": ()}
    if p.image_dtype.is_floating_point and p.n_keep is None:
        tiles["images"] = rows(gpu.arch, "images", kind)
    for kernel, some in tiles.items():
        yield kernel, _gradient(p, gpu, tf32, kernel).config, [_gradient(p, gpu, tf32, kernel, c).config for c in some]


def measure(p: PatchProblem, gpu: Gpu, tf32: bool, choice: tuple[str, Config] | None = None) -> dict[str, Any]:
    """Compile a kernel of this problem for `gpu` and count what is in its machine code.

    The forward's, unless `choice` names a kernel of the backward.

    Returns:
        {"kernel", "registers", "spill_bytes" (stack), "shared_bytes", "wgmma", "mma" (mma.sync and tcgen05), "tma",
        "load_bytes" (of one image load; of one row of a copy-engine block; 0 where no image is read), "hazards" (how
        many instructions break the rules of hazards.py), "first_hazard"}.
    """
    name, compiled, load = compile_kernel(p, gpu, tf32, choice)
    usage, text = sass.read(compiled.asm["cubin"])
    count, found = sass.counts(text), hazards(text, compiled.metadata.num_warps)
    return {
        "kernel": name, "registers": usage.registers, "spill_bytes": usage.stack,
        "shared_bytes": compiled.metadata.shared, "wgmma": count["wgmma"], "mma": count["mma"],
        "tma": count["tma_loads"] + count["tma_stores"], "load_bytes": _load_bytes(text) if load is None else load,
        "hazards": len(found), "first_hazard": next(iter(found), ""),
    }  # fmt: skip


def compile_kernel(p: PatchProblem, gpu: Gpu, tf32: bool, choice: tuple[str, Config | None] | None = None):
    """Its name, what Triton makes of it, and the bytes of a row of the copy engine's blocks, where it has them."""
    if choice and choice[0] in GRADIENTS:
        launch = _gradient(p, gpu, tf32, *choice)
        return choice[0], _compile_gradient(p, gpu, launch), _row_bytes(p, launch.constants)
    plan = make_plan(p, gpu, True, tf32, False, choice)  # type: ignore[arg-type]
    return plan.kernel, compile_plan(p, plan, gpu.arch), _row_bytes(p, plan.constants)


def _row_bytes(p: PatchProblem, constants: dict[str, Any]) -> int | None:
    return constants["XK"] * p.image_dtype.itemsize if "XK" in constants else None


def compile_plan(p: PatchProblem, plan: Plan, arch: int):
    """The forward's kernel as Triton compiles it for sm_`arch`."""
    weights, images = NAMES[p.weight_dtype], NAMES[p.image_dtype]
    types: dict[str, str] = {
        "images": f"*{images}", "weight": f"*{NAMES[p.compute_dtype]}", "centred": f"*{NAMES[plan.constants['SUM']]}",
        "bias": f"*{weights}", "pos": f"*{weights}", "prefix": f"*{weights}", "keep": "*i64",
        "out": f"*{NAMES[p.out_dtype]}",
    }  # fmt: skip
    block_types = {"image_desc": images, "weight_desc": NAMES[p.compute_dtype], "out_desc": NAMES[p.out_dtype]}
    types |= _descriptors(plan, block_types)
    absent = [name for name, there in (
        ("keep", p.n_keep is not None), ("centred", plan.constants["NORMALISED"]), ("bias", p.has_bias),
        ("pos", p.pos_rows), ("prefix", p.T),
    ) if not there]  # fmt: skip
    scalars = {**plan.scalars, "pos_b": 0, "pos_n": p.D, "prefix_b": 0, "prefix_t": p.D}
    return _compile(f"{plan.kernel}_kernel", plan.config, scalars, plan.constants, types, absent, arch)


def _descriptors(plan: Plan | Launch, of: dict[str, str]) -> dict[str, str]:
    sizes = {name: block for name, (_shape, _strides, block) in (plan.descriptors or {}).items()}
    return {name: f"tensordesc<{of[name]}{block}>".replace(" ", "") for name, block in sizes.items()}


def _gradient(p: PatchProblem, gpu: Gpu, tf32: bool, kernel: str, config: Config | None = None) -> Launch:
    """The launch of one kernel of the backward, every gradient asked for and dY in the tokens' dtype."""
    if kernel == "images":
        return image_launch(p, p.image_strides, gpu, p.out_dtype, tf32, choice=config)[0]
    wanted = Wanted(kernel != "sums", p.has_bias, p.pos_rows > 0 and not p.pos_per_image, p.T > 0)
    choice = None
    if kernel in ("weight", "weight_descriptor"):
        choice = kernel, config or weight_choices(p, gpu, product_of(p, tf32), dense(p))[kernel]
    plan = reduction(p, gpu, dense(p), wanted, tf32, choice=choice)
    found = {"weight_descriptor": plan.weight, "kept": plan.kept, "finish": plan.finish}.get(kernel, plan.reduce)
    assert found is not None
    return found


def _compile_gradient(p: PatchProblem, gpu: Gpu, launch: Launch):
    """A kernel of the backward as Triton compiles it, dY contiguous."""
    constants = launch.constants
    weights, images, total = NAMES[p.weight_dtype], NAMES[p.image_dtype], NAMES[constants["SUM"]]
    types = {
        "images": images, "grad": NAMES[p.out_dtype], "centred": total, "keep": "i64", "factor": total,
        "weight": NAMES[p.compute_dtype], **dict.fromkeys(("weight_parts", "table_parts", "bias_parts"), total),
        "d_images": images, **dict.fromkeys(("d_weight", "d_bias", "d_pos", "d_prefix"), weights),
    }  # fmt: skip
    normalised = constants.get("NORMALISED", False)
    absent = [name for name, there in (
        ("keep", p.n_keep is not None), ("centred", normalised), ("factor", normalised), ("d_bias", p.has_bias),
        ("bias_parts", p.has_bias), ("d_pos", p.pos_rows), ("d_prefix", p.T), ("table_parts", p.pos_rows or p.T),
        ("weight_parts", constants.get("WEIGHT", True)), ("images", constants.get("WEIGHT", False)),
    ) if not there]  # fmt: skip
    element = [p.K, p.K // p.C, p.P[1] * p.P[2], p.P[2], 1]
    scalars = {
        "T": p.T, **launch.scalars, "grad_b": (p.T + p.rows) * p.D, "grad_n": p.D, "grad_d": 1,
        **{f"weight_{axis}": step for axis, step in zip("dcthw", element, strict=True)},
        "pos_r": p.D, "pos_d": 1, "prefix_r": p.D, "prefix_d": 1, "bias_d": 1,
    }  # fmt: skip
    types = {name: f"*{dtype}" for name, dtype in types.items()}
    types |= _descriptors(launch, {"image_desc": images, "grad_desc": NAMES[p.out_dtype]})
    return _compile(launch.kernel, launch.config, scalars, constants, types, absent, gpu.arch)


def _compile(name: str, config: Config, scalars, constants, types, absent: list[str], arch: int):
    """A kernel, its arguments specialised as the launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..backends.triton.launch import constants_of, kernel_of, options

    kernel = kernel_of(name)
    if not hasattr(kernel, "cache_key"):
        raise RuntimeError("these kernels were made for Triton's interpreter: compile without TRITON_INTERPRET")
    constants = constants_of(constants) | {n: None for n in absent if n in kernel.arg_names}
    constants |= {
        n: 1 for n, value in scalars.items() if value == 1 and isinstance(value, int) and n in kernel.arg_names
    }
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        value = scalars.get(argument, 0)  # a pointer is aligned, too
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in scalars:
            signature[argument] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        else:
            signature[argument] = types[argument]
        if signature[argument] != "fp32" and "desc" not in argument and value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(config))
    except Exception as error:
        if unknown_gpu(error):
            raise NotImplementedError(f"Triton {triton.__version__} does not know sm_{arch}: it is older") from error
        raise


def _load_bytes(code: str) -> int:
    """Bytes of the narrowest load on the source line that reads pixels; 0 where none is."""
    lines = Path(inspect.getsourcefile(primitives)).read_text().splitlines()  # type: ignore[arg-type]
    pixel_lines = {i for i, text in enumerate(lines, 1) if "tl.load(pixel" in text}
    widths: set[int] = set()
    here = False
    for text in code.splitlines():
        if at := re.search(r'File ".*?(\w+\.py)", line (\d+)', text):
            here = at[1] == "primitives.py" and int(at[2]) in pixel_lines
        elif here:
            widths |= sass.widths(text, r"(?:LDG|LDGSTS)")
    return min(widths, default=0)
