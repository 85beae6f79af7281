"""What `fuse` did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class FrontEnd:
    name: str  # in the module tree; "" is the model itself
    cls: str
    fused: bool
    note: str  # what was fused, or why it was left alone


class Report(list[FrontEnd]):
    """Every front end found in a model; prints as a table."""

    @property
    def fused(self) -> list[FrontEnd]:
        return [entry for entry in self if entry.fused]

    @property
    def skipped(self) -> list[FrontEnd]:
        return [entry for entry in self if not entry.fused]

    def to_dicts(self) -> list[dict[str, str | bool]]:
        return [asdict(entry) for entry in self]

    def to_json(self) -> str:
        return json.dumps(self.to_dicts())

    def __str__(self) -> str:
        rows = [(e.name or "(model)", e.cls, "fused" if e.fused else "left alone", e.note) for e in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines) or "no front end found"

    __repr__ = __str__
