"""What a problem costs: its least time on a GPU by the GPU's data sheet, and what each algorithm moves.
Rates that were measured: bench/peaks.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..backends.patch_layout import product_of
from ..dispatch import Explanation
from ..gpu import tf32
from ..problem import PatchProblem
from . import baselines, cuda, reference, triton
from .data_sheets import DataSheet, named
from .traffic import Algorithm, Sizes

MODES = ("forward", "backward", "both", "images")


class Work(NamedTuple):
    """One launch's worth of a mode: what has to be multiplied, and which tensors have to be moved once."""

    name: str
    flops: int
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Attainable(NamedTuple):
    """The least time on a GPU by its data sheet: whichever of memory and arithmetic takes longer, of each `Work`."""

    ms: float
    bound: str  # "memory" or "arithmetic"
    ridge: float  # FLOP a byte of this GPU: above it arithmetic bounds
    memory_ms: float
    arithmetic_ms: float


@dataclass(frozen=True)
class Roofline:
    """What `roofline` found. `str` of it is a table; `as_dict` goes into JSON. Times are arithmetic, not measured."""

    problem: PatchProblem
    mode: str
    product: str  # half, tf32, fp32 or fp64: the arithmetic units that do it
    works: tuple[Work, ...]
    sheets: dict[str, DataSheet]
    gpus: dict[str, Attainable]
    roads: dict[str, dict[str, Algorithm]]  # GPU -> algorithm -> what it moves; the name that 0.1.0 gave it
    refused: dict[str, dict[str, str]]  # GPU -> algorithm -> why it can't

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.works)

    @property
    def bytes(self) -> int:
        """Compulsory: every tensor once for each of forward and backward."""
        return sum(work.total for work in self.works)

    @property
    def intensity(self) -> float:
        """FLOP a compulsory byte."""
        return self.flops / max(1, self.bytes)

    def road_ms(self, gpu: str, road: str) -> float | None:
        """The least time of an algorithm on a GPU; None for the reference, which is the CPU's."""
        if road.startswith("reference"):
            return None
        return self.roads[gpu][road].ms(self.sheets[gpu], self.product)

    def as_dict(self) -> dict[str, Any]:
        return {
            "problem": str(self.problem), "mode": self.mode, "product": self.product, "flops": self.flops,
            "bytes": self.bytes, "intensity": self.intensity,
            "work": {work.name: {"flops": work.flops, "bytes": dict(work.bytes)} for work in self.works},
            "gpus": {
                name: {
                    **attainable._asdict(),
                    "source": self.sheets[name].source,
                    "roads": {
                        road: {"ms": self.road_ms(name, road), **moved.as_dict()}
                        for road, moved in self.roads[name].items()
                    },
                    "refused": self.refused[name],
                }
                for name, attainable in self.gpus.items()
            },
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.problem}, {self.mode}: {self.flops / 1e9:.4g} GFLOP ({self.product})"]
        for work in self.works:
            parts = ", ".join(f"{name} {size / 1e6:.4g}" for name, size in work.bytes.items())
            lines.append(f"  {work.name}: {work.flops / 1e9:.4g} GFLOP, {work.total / 1e6:.4g} MB ({parts})")
        lines += [f"  {self.intensity:.4g} FLOP a byte", "", "Arithmetic on data-sheet rates, not measured:"]
        lines.append(f"  {'':<16}{'attainable µs':>14}{'bound by':>12}{'ridge':>8}")
        for name, a in self.gpus.items():
            lines.append(f"  {name:<16}{a.ms * 1e3:>14.4g}{a.bound:>12}{a.ridge:>8.0f}")
        for name, roads in self.roads.items():
            heads = f"{'MB read':>10}{'written':>9}{'requested':>11}{'passes':>8}{'launches':>10}{'µs':>9}"
            lines += ["", f"{name:<24}{heads}"]
            for road, moved in roads.items():
                asked = "" if moved.requested is None else f"{moved.requested / 1e6:.4g}"
                ms = self.road_ms(name, road)
                time = "" if ms is None else f"{ms * 1e3:.4g}"
                lines.append(
                    f"  {road:<24}{moved.read / 1e6:>8.4g}{moved.written / 1e6:>9.4g}{asked:>11}"
                    f"{len(moved.passes):>8}{moved.launches:>10}{time:>9}  {moved.note}".rstrip()
                )
            lines += [f"  {road:<24}no: {reason}" for road, reason in self.refused[name].items()]
        return "\n".join(lines)


def roofline(
    problem: PatchProblem | Explanation, mode: str = "forward", gpus: str | Sequence[str] | None = None
) -> Roofline:
    """Bytes, FLOP and the least time of a problem on named GPUs, and what each way to do it really moves.

    Nothing is run or allocated: ``vk.roofline(vk.explain(images, weight, ...))`` takes tensors on ``device="meta"``.

    Args:
        problem: ``vk.explain(...)`` or its ``.problem``.
        mode: "forward"; "backward", the gradients of all that is learnt; "both"; or "images", the gradient of the
            images alone.
        gpus: names of data sheets ("A100 SXM 80GB", "H100 SXM", "H200", "B200", "L4", "RTX 4090"); None for all.

    Returns:
        A `Roofline`: ``flops``, compulsory ``bytes`` (by tensor in ``works``), ``intensity`` in FLOP a byte, ``gpus``
        with the attainable milliseconds, and ``roads``, GPU -> algorithm -> passes in bytes. The rule by which memory
        is counted, and what is left out: cost_model/traffic.py. Peak rates: data_sheets.py; TF32 where PyTorch's flags
        allow it. The roofline is that of Williams et al. (2009), https://doi.org/10.1145/1498765.1498785.

    Raises:
        TypeError: `problem` is neither.
        ValueError: no such mode, or no data sheet of such a GPU.
    """
    p = problem.problem if isinstance(problem, Explanation) else problem
    if not isinstance(p, PatchProblem):
        raise TypeError(f"problem must be a PatchProblem or what explain returns, got {type(problem).__name__}")
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r}; there are {', '.join(MODES)}")
    if mode == "images" and not p.image_dtype.is_floating_point:
        raise ValueError(f"pixels of {p.image_dtype} have no gradient")
    sheets = {sheet.name: sheet for sheet in named(gpus)}
    product, works = product_of(p, tf32()), works_of(p, mode)
    found = {name: _algorithms(p, mode, sheet) for name, sheet in sheets.items()}
    return Roofline(
        p, mode, product, works, sheets,
        gpus={name: attainable(works, sheet, product) for name, sheet in sheets.items()},
        roads={name: roads for name, (roads, _) in found.items()},
        refused={name: refused for name, (_, refused) in found.items()},
    )  # fmt: skip


def works_of(p: PatchProblem, mode: str) -> tuple[Work, ...]:
    """What a mode has to do. Position and prefix gradients are as large as their tables; `dY` has the tokens' dtype."""
    sizes = Sizes.of(p)
    moved = sizes.as_dict()
    images, tokens, kept = moved.get("images", 0), moved.get("tokens", 0), moved.get("keep", 0)
    keep = {"keep": kept} if kept else {}
    table = p.pos_rows * p.D * p.weight_dtype.itemsize * (p.B if p.pos_per_image else 1)
    gradients = {"weight": sizes.weight, "bias": sizes.bias, "position": table, "prefix": sizes.prefix}
    forward = Work("forward", p.flops, moved)
    learnt = {f"d{name}": size for name, size in gradients.items() if size}
    backward = Work("weight gradient", p.flops, {"dY": tokens, "images": images, **keep, **learnt})
    whole = p.B * p.C * p.F * p.H * p.W * p.image_dtype.itemsize
    dY = p.B * p.rows * p.D * p.out_dtype.itemsize
    of_images = Work("image gradient", p.flops, {"dY": dY, "weight": sizes.weight, **keep, "dimages": whole})
    return {
        "forward": (forward,), "backward": (backward,), "both": (forward, backward), "images": (of_images,),
    }[mode]  # fmt: skip


def attainable(works: Sequence[Work], sheet: DataSheet, product: str) -> Attainable:
    memory = [1e3 * work.total / sheet.bytes for work in works]
    arithmetic = [1e3 * work.flops / sheet.flops(product) for work in works]
    bound = "memory" if sum(memory) > sum(arithmetic) else "arithmetic"
    ms = sum(map(max, memory, arithmetic))
    return Attainable(ms, bound, sheet.ridge(product), sum(memory), sum(arithmetic))


def _algorithms(p: PatchProblem, mode: str, sheet: DataSheet) -> tuple[dict[str, Algorithm], dict[str, str]]:
    """Every algorithm on this GPU, ours first; those that can't, with reasons. "both" is one after the other."""
    if mode == "both":
        (forward, no), (backward, nor) = (_algorithms(p, part, sheet) for part in ("forward", "backward"))
        both = {
            name: one + backward[after]
            for name, one in forward.items()
            if (after := name if name in backward else name.partition(" ")[0]) in backward
        }
        return both, {**no, **{name: reason for name, reason in nor.items() if name not in both}}
    gpu, rounded = sheet.planned, tf32()
    found: dict[str, Algorithm] = {}
    refused: dict[str, str] = {}
    for more, reasons in (
        triton.algorithms(p, mode, gpu, rounded),
        cuda.algorithms(p, mode, gpu, rounded),
        ({"reference (CPU)": reference.forward(p)} if mode == "forward" else {}, {}),
        baselines.algorithms(p, mode),
    ):
        found |= more
        refused |= reasons
    return found, refused


def work(p: PatchProblem, mode: str) -> tuple[int, int]:
    """FLOP and compulsory bytes of a mode. The weight gradient multiplies as much as the forward, and reads the pixels
    and the tokens' gradient once, as the forward reads the pixels and writes the tokens."""
    times = 2 if mode == "both" else 1
    return times * p.flops, times * p.bytes
