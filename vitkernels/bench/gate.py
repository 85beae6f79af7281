"""The gate before every time: an implementation whose result breaks the rule of accuracy gets none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..problem import PatchProblem
from ..testing import accuracy
from .cases import Call
from .implementations import gradients_of, problem, steps


def gate(impl: str | Callable, call: Call, mode: str = "forward") -> str | None:
    """Run once on the whole problem; why the result (or a gradient) can't be accepted by verify's rule, or None."""
    p, grad = problem(call), mode != "forward"
    with torch.set_grad_enabled(grad):
        torch.full(p.out_shape, torch.nan, dtype=p.out_dtype, device=p.device)  # poison: the next output lies here
        [(step, leaves)] = steps(impl, [call], mode)
        out = step()
        grads = torch.autograd.grad(out, leaves, probe(p)) if grad else ()
    return judged(call, out, dict(zip(gradients_of(call, mode), grads, strict=True)))


def _looked_at(p: PatchProblem) -> list[int]:
    return sorted({0, p.B // 2, p.B - 1})


def probe(p: PatchProblem) -> torch.Tensor:
    """The tokens' gradient of a loss of the images that are looked at alone, [B, T+N, D]."""
    index = torch.tensor(_looked_at(p), device=p.device)
    whole = torch.zeros(p.out_shape, dtype=p.out_dtype, device=p.device)
    return whole.index_copy_(0, index, accuracy.weighting((len(index), *p.out_shape[1:])).to(whole))


def judged(call: Call, out: torch.Tensor, grads: dict[str, torch.Tensor]) -> str | None:
    """Why tokens, and gradients of `probe` by the inputs' names, break the rule; what is compared are three images of
    the batch."""
    p = problem(call)
    if out.shape != p.out_shape or out.dtype != p.out_dtype:
        return f"result is {list(out.shape)} {out.dtype}, wanted {list(p.out_shape)} {p.out_dtype}"
    if not out.isfinite().all():
        return "result is not finite"
    index = _looked_at(p)
    part = call | {name: call[name][index] for name in ("images", "keep") if call.get(name) is not None}
    results = {"tokens": out[index], **{n: g[index] if n == "images" else g for n, g in grads.items()}}
    broken = (row for row in accuracy.judge(part, results) if not row["ok"])
    return next((f"{'gradient of ' * (row['what'] in grads)}{row['what']}: {row['reason']}" for row in broken), None)
