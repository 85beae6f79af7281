"""What `fuse` did, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from weakref import ref

from torch import nn

from .swapping import CALLS

WIDTH = 100


@dataclass(frozen=True)
class FrontEnd:
    name: str  # in the module tree; "" is the model itself
    cls: str
    fused: bool
    note: str  # what was fused, or why it was left alone

    def __str__(self) -> str:
        verdict = "fused     " if self.fused else "left alone"
        note = self.note if len(self.note) <= 64 else f"{self.note[:63]}…"
        where = f"{self.name or '(model)'} {self.cls.rpartition('.')[2]}"
        room = WIDTH - len(f"{verdict}  {note}  ")
        return f"{verdict}  {note}  {where if len(where) <= room else '…' + where[1 - room :]}"


class Report(list[FrontEnd]):
    """Every front end found in a model; prints as a line for each."""

    _model: Callable[[], nn.Module | None] = staticmethod(lambda: None)

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = ref(model)

    def __getstate__(self) -> None:
        """Copies and pickles are without the model."""

    @property
    def fused(self) -> list[FrontEnd]:
        return [entry for entry in self if entry.fused]

    @property
    def skipped(self) -> list[FrontEnd]:
        return [entry for entry in self if not entry.fused]

    def calls(self) -> dict[str, dict[str, int]]:
        """How often, since `fuse`, each fused module's front end was "one call", and how often the library's own code
        ran, by its reason: what is replaced or hooked, or the images' shape and dtype. By the modules' names. Compiled
        calls are not counted.

        Raises:
            ReferenceError: the model is gone.
        """
        if (model := self._model()) is None:
            raise ReferenceError("the model is gone")
        return {name: dict(CALLS[module]) for name, module in model.named_modules() if module in CALLS}

    def to_dicts(self) -> list[dict[str, str | bool]]:
        return [asdict(entry) for entry in self]

    def to_json(self) -> str:
        return json.dumps(self.to_dicts())

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no front end found"

    __repr__ = __str__
