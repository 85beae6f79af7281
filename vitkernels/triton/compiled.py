"""Kernels compiled for a GPU that need not be there, and what their machine code says: registers, spills, shared
memory, tensor-core and copy-engine instructions, width of the image loads.

Reads the SASS with the `cuobjdump` and `nvdisasm` that Triton's wheel carries.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from .. import tuning
from ..problem import Arguments, Meta, PatchProblem, build
from ..tuning import Config, Gpu
from .plan import Plan, make_plan, no_descriptor, product_of

ARCHS = (80, 90, 100)
PATCHES = (14, 16, 32)
DTYPES = {  # name -> pixels, weights, TF32 asked for
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp16": (torch.float16, torch.float16, False),
    "uint8->bf16": (torch.uint8, torch.bfloat16, False),
    "fp32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
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
    side = 224 // patch
    cpu = torch.device("cpu")  # only the plan looks at it, and it asks the GPU's figures instead

    def meta(dtype: torch.dtype, *shape: int) -> Meta:
        return Meta(shape, torch.empty(shape, device="meta").stride(), dtype, cpu)

    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if pixels == torch.uint8 else (None, None)
    return build(
        meta(pixels, B, 3, 224, 224), meta(weights, D, 3, patch, patch), meta(weights, D),
        meta(weights, 1 + side * side, D), meta(weights, 1, D),
        meta(torch.int64, B, side * side // 4) if keep else None,
        Arguments((patch, patch), (0, 0), mean, std, 1 / 255 if pixels == torch.uint8 else 1.0, weights, weights),
    )  # fmt: skip


def shipped(arch: int, patch: int, dtype: str) -> list[tuple[PatchProblem, str, Config, bool]]:
    """Every (problem, road, tile, default) of the tables for this patch and dtype on this architecture."""
    gpu, tf32 = tuning.NOMINAL[arch], DTYPES[dtype][2]
    found: dict[tuple[str, Config], tuple[PatchProblem, bool]] = {}
    for keep in (False, True):  # a keep list takes the gather road everywhere
        for D in WIDTHS:
            for B in BATCHES:
                p = problem(patch, dtype, B=B, D=D, keep=keep)
                product = product_of(p, tf32)
                road = "gather" if no_descriptor(p, gpu, product, True) else "descriptor"
                picked = tuning.default(p, road, product, gpu)
                found[road, picked] = p, True
                for c in tuning.rows(gpu.arch, road, product):
                    found.setdefault((road, tuning.fitted(p, c, gpu)), (p, False))
    return [(p, road, c, default) for (road, c), (p, default) in found.items()]


def measure(p: PatchProblem, gpu: Gpu, tf32: bool, choice: tuple[str, Config] | None = None) -> dict[str, Any]:
    """Compile the kernel of this problem for `gpu` and count what is in its machine code.

    Returns:
        {"kernel", "registers", "spill_bytes" (stack), "shared_bytes", "wgmma", "mma" (mma.sync and tcgen05), "tma",
        "load_bytes" (of one image load; of one row of a copy-engine block)}.
    """
    plan = make_plan(p, gpu, True, tf32, False, choice)
    kernel = compile_plan(p, plan, gpu.arch)
    usage, sass = _disassemble(kernel.asm["cubin"])
    registers, stack = (int(v) for v in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    count = {name: len(re.findall(rf"\b{pattern}\b", sass)) for name, pattern in (
        ("wgmma", r"[HQI]GMMA"), ("mma", r"(?:[HDIQ]MMA|UTC[A-Z]*MMA)"), ("tma", r"UTMA(?:LDG|STG)"),
    )}  # fmt: skip
    return {
        "kernel": plan.road, "registers": registers, "spill_bytes": stack, "shared_bytes": kernel.metadata.shared,
        **count, "load_bytes": _load_bytes(p, plan, sass),
    }  # fmt: skip


def compile_plan(p: PatchProblem, plan: Plan, arch: int):
    """The plan's kernel as Triton compiles it for sm_`arch`, its arguments specialised as the launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import kernel_of, options

    kernel, constants = kernel_of(plan)
    if not hasattr(kernel, "cache_key"):
        raise RuntimeError("these kernels were made for Triton's interpreter: compile without TRITON_INTERPRET")
    weights, images = NAMES[p.weight_dtype], NAMES[p.image_dtype]
    types: dict[str, str] = {
        "images": f"*{images}", "weight": f"*{NAMES[p.compute_dtype]}", "centred": f"*{NAMES[plan.constants['SUM']]}",
        "bias": f"*{weights}", "pos": f"*{weights}", "prefix": f"*{weights}", "keep": "*i64",
        "out": f"*{NAMES[p.out_dtype]}",
    }  # fmt: skip
    block_types = {"image_desc": images, "weight_desc": NAMES[p.compute_dtype], "out_desc": NAMES[p.out_dtype]}
    for name, (_shape, _strides, block) in plan.descriptors.items():
        types[name] = f"tensordesc<{block_types[name]}{block}>".replace(" ", "")
    absent = [name for name, there in (
        ("keep", p.n_keep is not None), ("centred", plan.constants["NORMALISED"]), ("bias", p.has_bias),
        ("pos", p.pos_rows), ("prefix", p.T),
    ) if not there and name in kernel.arg_names]  # fmt: skip
    scalars = {**plan.scalars, "pos_b": 0, "pos_n": p.D, "prefix_b": 0, "prefix_t": p.D}
    constants |= dict.fromkeys(absent)
    constants |= {name: 1 for name, value in scalars.items() if value == 1 and isinstance(value, int)}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in scalars:
            value = scalars[name]
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        else:
            signature[name] = types[name]
        divisible = scalars.get(name, 0)
        if signature[name] not in ("constexpr", "fp32") and "desc" not in name and divisible % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(plan))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        commands = ([str(tools / "cuobjdump"), "-res-usage", file], [str(tools / "nvdisasm"), "-g", "-c", file])
        usage, sass = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, sass


def _load_bytes(p: PatchProblem, plan: Plan, sass: str) -> int:
    """Bytes of the narrowest load on the source line that reads pixels."""
    if plan.road == "descriptor":
        return plan.constants["XK"] * p.image_dtype.itemsize
    from . import kernels

    lines = Path(inspect.getsourcefile(kernels)).read_text().splitlines()  # type: ignore[arg-type]
    pixel_lines = {i for i, text in enumerate(lines, 1) if "tl.load(pixel" in text}
    widths, here = set(), False
    for text in sass.splitlines():
        if at := re.search(r'File ".*?(\w+\.py)", line (\d+)', text):
            here = at[1] == "kernels.py" and int(at[2]) in pixel_lines
        elif here and (load := re.search(r"\b(?:LDG|LDGSTS)\.E([.\w]*)", text)):
            widths.add(next((n for mark, n in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)) if mark in load[1]), 4))
    return min(widths, default=0)
