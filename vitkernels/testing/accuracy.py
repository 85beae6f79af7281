"""The rule of accuracy, which tests, `verify` and the benchmarks' gate share: an error of at most twice eager's, plus
a floor of rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..eager import compute_dtype, eager, normalise
from ..functional import patch_embed
from .oracle import LEARNT, Arguments, oracle


def floor_of(
    exact: torch.Tensor, terms: torch.Tensor, rounding: list[torch.dtype], sum_dtype: torch.dtype, length: int
) -> float:
    """The error that is nobody's fault, beside two times eager's.

    One rounding of the largest result to the coarsest of the dtypes it goes through: what is rounded once, the best
    there is, errs by that, and eager may be right by luck. And one unit, in the dtype of the sum, of the largest sum
    of absolute `terms`: another order of summation errs by that, whatever cancels. In fp64 eager is the oracle itself
    and shows no error to double: there a random walk over the sum's `length` is granted.
    """
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().item()
    once = max(max(largest, info.tiny) * info.eps / 2 for info in map(torch.finfo, rounding))
    walk = math.sqrt(length) if sum_dtype == torch.float64 else 1
    return once + terms.max().item() * torch.finfo(sum_dtype).eps * walk


def error_of(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute error of an element; infinite where the result is not finite."""
    difference = (result.double() - exact).abs()
    return difference.nan_to_num(nan=math.inf).max().item() if difference.numel() else 0.0


def compare(arguments: Arguments, backend: str, gradients: bool = False) -> list[dict[str, Any]]:
    """`judge` of a backend, whose tokens have to be contiguous and whose gradients lie as what is learnt."""
    ours = evaluate(partial(patch_embed, backend=backend), arguments, gradients)
    rows = judge(arguments, ours)
    for row in rows:
        what, result = row["what"], ours[row["what"]]
        wanted = result.new_empty(result.shape) if what == "tokens" else torch.empty_like(arguments[what])
        if result.stride() != wanted.stride():
            how = "contiguous" if what == "tokens" else "laid out as what it is the gradient of"
            row.update(ok=False, reason=f"not {how}: {list(result.shape)} with strides {result.stride()}")
    return rows


def judge(arguments: Arguments, ours: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One row for each of our results, as `evaluate` names them: error, eager's error, the bound, whether it holds, and
    if not, a reason."""
    dtype, gradients = compute_dtype(arguments["images"], arguments["weight"]), len(ours) > 1
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with _fp32_is_fp32():
        references = [
            evaluate(eager, arguments, gradients),
            evaluate(oracle, _doubled(arguments), gradients),
            evaluate(oracle, _absolute(arguments, sum_dtype), gradients, absolute=True),
        ]
    length = max(ours["tokens"].shape[:2].numel(), arguments["weight"][0].numel(), len(arguments["weight"]))
    rows = []
    for what, result in ours.items():
        theirs, exact, terms = (r[what] for r in references)
        eager_error, same = error_of(theirs, exact), result.shape == theirs.shape and result.dtype == theirs.dtype
        error = error_of(result, exact) if same else math.inf
        bound = 2 * eager_error + floor_of(exact, terms, [dtype, theirs.dtype], sum_dtype, length)
        row = dict(what=what, error=error, eager_error=eager_error, bound=bound, ok=error <= bound < math.inf)
        if not row["ok"]:
            unlike = f"{list(result.shape)} {result.dtype} instead of {list(theirs.shape)} {theirs.dtype}"
            row["reason"] = f"error {error:.3g} above {bound:.3g}" if same else unlike
        rows.append(row)
    return rows


def evaluate(
    call: Callable[..., torch.Tensor], arguments: Arguments, gradients: bool = True, absolute: bool = False
) -> dict[str, torch.Tensor]:
    """The tokens and, where asked, the gradient of everything learnt, for the tokens' gradient `weighting`."""
    arguments = dict(arguments)
    learnt = [n for n in LEARNT if gradients and (t := arguments.get(n)) is not None and t.is_floating_point()]
    for name in learnt:
        arguments[name] = arguments[name].detach().requires_grad_()
    with torch.set_grad_enabled(gradients):
        tokens = call(**arguments)
        if not gradients:
            return {"tokens": tokens}
        grad = weighting(tokens.shape).to(tokens)
        found = torch.autograd.grad(tokens, [arguments[n] for n in learnt], grad.abs() if absolute else grad)
    return {"tokens": tokens.detach(), **dict(zip(learnt, found, strict=True))}


def weighting(shape: Sequence[int]) -> torch.Tensor:
    """A fixed random gradient of tokens, in values that every dtype has, so that all start from the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(torch.bfloat16)


def _doubled(arguments: Arguments) -> Arguments:
    learnt = {n: v.double() for n, v in arguments.items() if n in LEARNT and v is not None and v.dtype != torch.uint8}
    return {**arguments, **learnt}


def _absolute(arguments: Arguments, sum_dtype: torch.dtype) -> Arguments:
    """Arguments for which the chain sums the absolute terms of the sum."""
    absolute = {n: v.double().abs() if n in LEARNT and v is not None else v for n, v in arguments.items()}
    images, std = arguments["images"], arguments.get("std")
    scale = arguments.get("scale") or (1 / 255 if images.dtype == torch.uint8 else 1)
    mean = arguments.get("mean")
    if sum_dtype == torch.float64:  # the oracle normalises no better than we do: what cancels there counts too
        mean = None if mean is None else -torch.as_tensor(mean, dtype=torch.float64).abs()
        x = normalise(absolute["images"], torch.float64, mean, std, abs(scale))
    else:
        x = normalise(images, torch.float64, mean, std, scale).abs()
    return {**absolute, "images": x / normalise(torch.ones_like(x), torch.float64, None, std, abs(scale)),
            "mean": None, "scale": abs(scale)}  # fmt: skip


class _fp32_is_fp32:
    """cuDNN takes TF32 unless told otherwise, and eager's error would then excuse ours."""

    def __enter__(self):
        self.before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32

    def __exit__(self, *_):
        torch.backends.cudnn.allow_tf32 = self.before
