"""The proof: every backend on random problems against fp64, beside what eager PyTorch loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import dispatch
from ..functional import explain, patch_embed
from ..problem import FLOAT_DTYPES
from . import races
from .accuracy import compare, evaluate
from .oracle import Arguments
from .random_problems import cases


def run(
    device: str = "auto",
    backend: str = "all",
    count: int = 16,
    seed: int = 0,
    gradients: bool = False,
    tick: Callable[[int, int], None] = lambda done, of: None,
    repeat: int = 1,
) -> dict[str, Any]:
    """Every backend × dtype × case, as `{"ok", "device", "rows": [...]}`.

    A backend that declines a problem is listed with its reasons and has not failed, unless nothing ran at all. With
    `repeat`, each is run so many times beside other work, and a row "same bits" says whether all were the first's.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this PyTorch finds no GPU")
    if backend != "all":
        dispatch.check_name(backend)
    names = [n for n in dispatch.MODULES if backend in ("all", n)] or [backend]
    rows = []
    for i, drawn in enumerate(cases(seed, count)):
        for j, dtype in enumerate(FLOAT_DTYPES):
            one = replace(drawn, weight_dtype=dtype)
            arguments = one.tensors(device)
            reasons = explain(**arguments)
            for name in names:
                row: dict[str, Any] = dict(
                    case=str(one), backend=name, dtype=str(dtype).removeprefix("torch."), repeat=repeat
                )
                nothing = dict(row, error=None, eager_error=None, bound=None)
                if why := reasons.get(name):
                    rows.append({**nothing, "ok": None, "reason": "; ".join(why)})
                    continue
                try:
                    rows += [{**row, **found} for found in compare(arguments, name, gradients)]
                    if repeat > 1:
                        rows.append(nothing | _repeated(arguments, name, gradients, repeat))
                except Exception as error:  # a backend that breaks is a row that fails, and the others still run
                    rows.append({**nothing, "ok": False, "reason": f"{type(error).__name__}: {error}"})
            tick(i * len(FLOAT_DTYPES) + j + 1, count * len(FLOAT_DTYPES))
    for row in rows:  # JSON has no infinity
        row.update({n: None for n in ("error", "eager_error", "bound") if row[n] in (math.inf, None)})
    ran = [row["ok"] for row in rows if row["ok"] is not None]
    return {"ok": bool(ran) and all(ran), "device": device, "rows": rows}


def _repeated(arguments: Arguments, backend: str, gradients: bool, repeat: int) -> dict[str, Any]:
    def once() -> races.Results:
        results = evaluate(partial(patch_embed, backend=backend), arguments, gradients)
        return [(what if what == "tokens" else f"gradient of {what}", t) for what, t in results.items()]

    difference = races.hunt(once, repeat)
    how = dispatch.backend(backend).how(explain(**arguments).problem) if backend != "auto" else "auto"
    found: dict[str, Any] = {"what": "same bits", "ok": not difference}
    return found | ({"reason": f"{how}: {difference}"} if difference else {})
