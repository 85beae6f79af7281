"""What each way to embed patches really moves, pass by pass: arithmetic on a problem, nothing is run or allocated.

The rule of memory: a pass reads each of its tensors from the GPU's memory once, and writes each of its results there
once. What the L2 cache keeps from one pass to the next is not subtracted; what a pass must read twice, as it does not
fit, is not added. A gather reads what it takes, or the whole table where that is less.

Of our own kernels a pass says too what its programs request of the L2 cache: every tile of tokens reads its patches and
its rows of the weight again. Elements that a mask or a descriptor leaves out are not counted.

A problem does not know every dtype: bias, position table and prefix count as the weight's, `keep` as int64, and the
prefix as one for all images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

from ..problem import PatchProblem
from .data_sheets import DataSheet

INDEX = 8  # bytes of an int64


class Pass(NamedTuple):
    """One operator or kernel: bytes, and FLOP of its product (2 a multiply-add), none of what is element by element."""

    name: str
    read: int
    written: int
    flops: int = 0
    launches: int = 1
    requested: dict[str, int] | None = None  # tensor -> bytes that programs load or store
    inside: str = ""  # the operator that does it on a GPU, unseen by a count of operators
    product: str = ""  # the arithmetic units that do it, where they are others than the problem's

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Algorithm:
    """The passes of one way, in order. `kept`: bytes saved for the backward that are neither inputs nor parameters."""

    passes: tuple[Pass, ...]
    kept: int = 0
    note: str = ""

    @property
    def read(self) -> int:
        return sum(p.read for p in self.passes)

    @property
    def written(self) -> int:
        return sum(p.written for p in self.passes)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.passes)

    @property
    def launches(self) -> int:
        return sum(p.launches for p in self.passes)

    @property
    def requested(self) -> int | None:
        """Bytes that the programs of all passes ask of the L2 cache; None where nobody knows (others' kernels)."""
        asked = [sum(p.requested.values()) for p in self.passes if p.requested is not None]
        return sum(asked) if asked else None

    def ms(self, sheet: DataSheet, product: str) -> float:
        """The least time: of each pass the longer of its memory and its arithmetic, one after the other."""
        return 1e3 * sum(max(p.bytes / sheet.bytes, p.flops / sheet.flops(p.product or product)) for p in self.passes)

    def __add__(self, other: Algorithm) -> Algorithm:
        note = "; ".join(dict.fromkeys(filter(None, (self.note, other.note))))
        return Algorithm(self.passes + other.passes, max(self.kept, other.kept), note)

    def as_dict(self) -> dict[str, Any]:
        return {
            "passes": [p._asdict() for p in self.passes],
            **{name: getattr(self, name) for name in ("read", "written", "bytes", "flops", "launches", "requested")},
            "kept": self.kept, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Bytes of a problem's tensors, as far as they are needed at all."""

    images: int  # pixels that some patch sees; of the kept patches at most theirs
    weight: int
    bias: int
    position: int
    prefix: int
    keep: int
    tokens: int

    @classmethod
    def of(cls, p: PatchProblem) -> Sizes:
        w = p.weight_dtype.itemsize
        first = p.pos_rows - p.N if p.pos_rows else 0
        table = p.pos_rows if p.n_keep is None else min(p.pos_rows, first + p.rows * (1 if p.pos_per_image else p.B))
        return cls(
            images=min(needed(p), p.B * p.rows * p.K) * p.image_dtype.itemsize,
            weight=p.D * p.K * w,
            bias=p.D * w * p.has_bias,
            position=table * p.D * w * (p.B if p.pos_per_image else 1) if p.pos_rows else 0,
            prefix=p.T * p.D * w,
            keep=0 if p.n_keep is None else p.B * p.rows * INDEX,
            tokens=prod(p.out_shape) * p.out_dtype.itemsize,
        )

    def as_dict(self) -> dict[str, int]:
        return {name: size for name, size in asdict(self).items() if size}


def needed(p: PatchProblem) -> int:
    """Pixels of the batch that a patch of the grid sees."""
    sides = zip((p.F, p.H, p.W), p.P, p.S, p.pad, p.G, strict=True)
    return p.B * p.C * prod(len(_covered(*side)) for side in sides)


def _covered(n: int, P: int, S: int, pad: int, G: int) -> range | set[int]:
    if S <= P:
        return range(max(0, -pad), min(n, (G - 1) * S + P - pad))
    return {i for g in range(G) for i in range(max(0, g * S - pad), min(n, g * S - pad + P))}


def gathered(p: PatchProblem, rows: int) -> int:
    """Elements that `rows` patches load, in the order of the grid; rows past the end repeat the last patch. Of a keep
    list, whose patches nobody knows, the mean."""
    if not any(p.pad):
        return rows * p.K
    sides = list(zip((p.F, p.H, p.W), p.P, p.S, p.pad, p.G, strict=True))
    seen = [[max(0, min(n, g * S - pad + P) - max(0, g * S - pad)) for g in range(G)] for n, P, S, pad, G in sides]
    whole, last = p.C * prod(map(sum, seen)), p.C * prod(axis[-1] for axis in seen)
    if p.n_keep is not None:
        return round(rows * whole / p.N)
    return p.B * whole + (rows - p.B * p.N) * last
