"""The static check of Hopper's machine code: what it must find, and where it must not cry."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitkernels.profiling.hazards import hazards

ROOT = Path(__file__).parents[2]
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"
LEFT = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"  # reads R4 … R7, adds to R24 … R55
SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
LOAD = "LDSM.16.M88.4 R4, [R2]"
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
COPY = "LDGSTS.E.BYPASS.128 [R2], desc[UR16][R60.64]"


def listing(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends with a colon is a label."""
    text, address = [".text.kernel:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(text)


def looped(*body: str, after: tuple[str, ...] = (WAIT.format(0), "EXIT")) -> str:
    return listing("MOV R2, R1", ".L_x_1:", *body, "@P0 BRA `(.L_x_1)", *after)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        # What Triton 3.6 and 3.8 make of a loop whose left operand comes through registers (Triton issue 9433).
        (looped(LOAD, LEFT, WAIT.format(1)), "LDSM.16.M88.4 R4, [R2]: touches R4 … R7, operand"),
        (looped(LEFT, "FADD R7, R7, 1", WAIT.format(0)), "FADD R7, R7, 1: touches R7, operand"),
        (looped(LEFT, "STS.64 [R2], R54", WAIT.format(0)), "STS.64 [R2], R54: touches R54 … R55, accumulator"),
        (looped(LEFT, "IMAD.WIDE.U32 R2, R3, 0x4, R54", WAIT.format(0)), "IMAD.WIDE.U32"),
        (looped(LEFT, "LDG.E R9, desc[UR4][R6.64]", WAIT.format(0)), "LDG.E R9"),
        # the group is never committed: no wait covers it
        (looped(LEFT.replace(", gsb0", ""), WAIT.format(0), LOAD), "LDSM"),
        # a younger group alone is waited for
        (listing(LEFT, SHARED, WAIT.format(2), LOAD, WAIT.format(0), "EXIT"), "LDSM"),
        # a wait, or a commit, that may not happen
        (listing(LEFT, "@P1 " + WAIT.format(0), LOAD, "EXIT"), "LDSM"),
        (listing(LEFT, "@P1 " + SHARED, WAIT.format(1), LOAD, WAIT.format(0), "EXIT"), "LDSM"),
        # one of two paths that meet has no wait
        (listing(LEFT, "@P1 BRA `(.L_x_2)", WAIT.format(0), ".L_x_2:", LOAD, "EXIT"), "LDSM"),
        (listing(LEFT, "BSSY B0, `(.L_x_2)", "@P1 BRA `(.L_x_3)", WAIT.format(0), ".L_x_3:", "BSYNC B0", ".L_x_2:",
                 LOAD, "EXIT"), "LDSM"),
        # in a function that is called
        (listing("MOV R90, 0x30", LEFT, "CALL.REL.NOINC `(divide)", WAIT.format(0), "EXIT", "divide:", LOAD,
                 "RET.REL.NODEC R90 `(kernel)"), "LDSM"),
        # other sums over the operand, and sums of another shape over these sums
        (listing(LEFT, SHARED.replace("R24", "R0"), WAIT.format(0), "EXIT"), "HGMMA.64x64x16.F32.BF16 R0"),
        (listing(LEFT, SHARED.replace("64x64", "64x32"), WAIT.format(0), "EXIT"), "HGMMA.64x32x16"),
        (listing(LEFT, LEFT.replace("R4", "R26"), WAIT.format(0), "EXIT"), "HGMMA.64x64x16.F32.BF16 R24, R26"),
    ],
)  # fmt: skip
def test_what_touches_a_product_in_flight_is_found(text, first):
    found = hazards(text)
    assert found and first in found[0], found


@pytest.mark.parametrize(
    "text",
    [
        looped(LOAD, LEFT, WAIT.format(0)),
        # a barrier's parity is one register, 64 is its word
        looped("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R60+URZ], R23", LOAD, LEFT, WAIT.format(0)),
        looped(LEFT, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R60+URZ], R23", WAIT.format(0)),
        # two operands in turn, each waited for before it is written again
        looped(LOAD, LEFT, WAIT.format(1), LOAD.replace("R4", "R8"), LEFT.replace("R4", "R8"), WAIT.format(1)),
        # products over shared memory, one in flight over the back edge: the hardware orders sums of one shape
        looped(SHARED, WAIT.format(1)),
        looped(LOAD, LEFT.replace(", gsb0", ""), LEFT, WAIT.format(0)),  # two products of one operand, one group
        listing(LEFT, "@P1 BRA `(.L_x_2)", WAIT.format(0), "BRA `(.L_x_3)", ".L_x_2:", WAIT.format(0), ".L_x_3:", LOAD,
                "EXIT"),
        listing(LEFT, "@!PT STS [R2], R4", "IMAD.WIDE.U32 R2, R23, 0x4, R22", WAIT.format(0), "EXIT"),
        # called between products: it returns to where it was called
        listing("MOV R90, 0x20", "CALL.REL.NOINC `(divide)", LEFT, WAIT.format(0), "MOV R90, 0x60",
                "CALL.REL.NOINC `(divide)", "EXIT", "divide:", LOAD, "RET.REL.NODEC R90 `(kernel)"),
        # an empty group: RZ stands for sums that are none
        listing(LEFT, "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0", WAIT.format(1), LOAD, "EXIT"),
        listing('BRX R2 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)', ".L_x_1:", LEFT, WAIT.format(0), ".L_x_2:", LOAD,
                "EXIT"),
        listing("FFMA R24, R4, R5, R24", "EXIT"),  # no product at all
    ],
)  # fmt: skip
def test_what_waits_is_not(text):
    assert hazards(text, warps=8) == []


def test_a_barrier_must_follow_the_wait_before_a_buffer_is_written():
    """Triton issue 11047: a warpgroup waits for its own products only."""
    early = looped(BARRIER, SHARED, WAIT.format(1), COPY)
    assert "no barrier since the wait" in hazards(early, warps=8)[0] and "LDGSTS" in hazards(early, warps=8)[0]
    assert hazards(early, warps=4) == []  # there is no other warpgroup
    assert hazards(looped(BARRIER, SHARED, WAIT.format(1), BARRIER, COPY), warps=8) == []
    assert hazards(looped(SHARED, WAIT.format(0), COPY, BARRIER), warps=8) == []  # another buffer, or one is missing
    for some in ("@P2 " + BARRIER, BARRIER.replace("0x0", "0x1, 0x80")):  # not every thread comes to these
        assert hazards(looped(BARRIER, SHARED, WAIT.format(1), some, COPY), warps=8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (listing(SHARED, "BRA `(.L_x_9)"), "where that leads"),
        (listing(SHARED, "RET.REL.NODEC R2 `(kernel)"), "no call to return from"),
        (listing(SHARED, "CALL.REL.NOINC `(divide)", "EXIT", "divide:", "RET.REL.NODEC R2 `(k)"), "where that returns"),
        (listing(SHARED, "BRX R2 -0x10"), "where that leads"),
        (listing("HGMMA.SP.64x64 R24, gdesc[UR4], R24"), "not understood"),
    ],
)
def test_what_is_not_understood_is_said(text, words):
    with pytest.raises(ValueError, match=words):
        hazards(text)


PLANTED = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vitkernels.backends.triton.primitives import product
from vitkernels.profiling import sass
from vitkernels.profiling.hazards import hazards

@triton.jit
def planted(image_desc, weight_desc, out_desc, H, SETTLE: tl.constexpr):
    '''The forward by descriptors as it was up to b74a4aa: the block of patches is reshaped in registers.'''
    acc = tl.zeros((128, 256), tl.float32)
    for step in tl.range(0, 12):
        patches = image_desc.load([0, 0, 0, step // 4 * H + step % 4 * 4, 0]).reshape(128, 64)
        acc = product(patches, weight_desc.load([0, step * 64]).T, acc, "ieee", tl.float32, SETTLE, False)
    out_desc.store([0, 0], acc.to(tl.bfloat16))

for settle in (False, True):
    types = {"image_desc": "tensordesc<bf16[32,2,2,4,16]>", "weight_desc": "tensordesc<bf16[256,64]>",
             "out_desc": "tensordesc<bf16[128,256]>", "H": "i32", "SETTLE": "constexpr"}
    source = ASTSource(fn=planted, signature=types, constexprs={"SETTLE": settle}, attrs={})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    print(len(hazards(sass.read(kernel.asm["cubin"])[1], 8)))
"""


REVERTED = """
import torch
from dataclasses import replace
from vitkernels.backends.triton import config_cache, forward_plan
from vitkernels.backends.triton.configs import Config
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton
from vitkernels.tuning import tune

p = replace(compile_triton.problem(16, "uint8->bf16"), device=torch.device("cuda", 0))
tune.gpu_of = lambda device: NOMINAL[90]
settles = forward_plan.settles
for form in (lambda *_: False, settles):
    forward_plan.settles = form
    config_cache.forget_plans()
    choices = ("descriptor", Config(128, 256, 64, 8, 3)), ("gather", Config(128, 256, 32, 8, 4))
    print(sum(bool(tune.hazard_of(p, choice)) for choice in choices))
"""


@pytest.mark.parametrize("program", (PLANTED, REVERTED))
def test_the_hazard_is_found_where_it_is_planted(program, tmp_path):
    """That of Triton before 3.9, in a kernel as it shipped once and in ours when they do not wait; none as they ship.
    The tuner's eyes see it too."""
    triton = pytest.importorskip("triton")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    file = tmp_path / "planted.py"  # a file, as Triton reads the source
    file.write_text(program)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    planted, shipped = map(int, done.stdout.split())
    assert shipped == 0
    assert (planted > 0) == (version < (3, 9)), planted
