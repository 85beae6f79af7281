"""What is timed: our backends, the baselines, and what the device can do at all, each as steps without arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import dispatch
from ..backends.reference import products
from ..functional import explain, patch_embed
from ..problem import PatchProblem
from .baselines import PEERS, conv
from .cases import Call
from .timing import Step

LEARNT = ("weight", "bias", "pos_embed", "prefix")
GRADIENTS = {"forward": (), "backward": LEARNT, "both": LEARNT, "images": ("images",)}  # mode -> of which inputs
MODES = tuple(GRADIENTS)


def problem(call: Call) -> PatchProblem:
    return explain(**call).problem


OURS = ("auto", *dispatch.MODULES)
CEILINGS = ("copy", "gemm", "empty")


def default_impls(call: Call, *, compiled: bool | None = None) -> list[str]:
    """auto, the other backends that would run, the peers, the ceilings. `compiled`: by default on a GPU only, as it
    takes up to a minute a case."""
    why = explain(**call)
    gpu = call["images"].is_cuda
    always = {name for name, _ in why.auto.values()}  # by `auto`, if it is one
    others = [name for name, reasons in why.items() if not reasons and {name} != always and name != "reference"]
    peers = [
        name
        for name in PEERS
        if not name.startswith("compile") or ((gpu if compiled is None else compiled) and (gpu or name[-3:] != "max"))
    ]
    if not gpu and call["weight"].ndim == 5 and call["weight"].dtype.itemsize == 2:
        peers = [name for name in peers if "conv" not in name]  # conv3d of halves writes past its buffers on a CPU
    return ["auto", *(others if gpu else ()), *peers, *CEILINGS]


def gradients_of(call: Call, mode: str) -> list[str]:
    """The inputs that are there and whose gradients a mode takes."""
    return [name for name in GRADIENTS[mode] if call.get(name) is not None]


def steps(
    impl: str | Callable, calls: Sequence[Call], mode: str = "forward"
) -> list[tuple[Step, list[torch.Tensor]]]:  # fmt: skip
    """Per call: images in, tokens out, ready to be timed; and the inputs whose gradients the mode takes.

    `impl` is a backend, one of PEERS, or a function with patch_embed's arguments.
    """
    wanted = gradients_of(calls[0], mode)
    calls = [call | {name: call[name].detach().requires_grad_() for name in wanted} for call in calls]
    leaves = [[call[name] for name in wanted] for call in calls]
    if impl not in PEERS:
        embed = impl if callable(impl) else partial(patch_embed, backend=impl)
        return [(partial(embed, **call), own) for call, own in zip(calls, leaves, strict=True)]
    function = PEERS[impl]()
    result: list[tuple[Step, list[torch.Tensor]]] = []
    for call, own in zip(calls, leaves, strict=True):
        p = problem(call)
        a = b = None
        if p.normalised or p.scale != 1:  # folded: y = a·x + b
            a, b = (
                torch.tensor(v, dtype=p.compute_dtype, device=p.device).view(-1, *(1,) * (call["images"].ndim - 2))
                for v in p.affine
            )
        tensors: dict[str, Any] = {name: call.get(name) for name in LEARNT}
        if impl == "conv_channels_last":  # the weight as model.to(memory_format=...) leaves it
            memory_format = torch.channels_last_3d if p.video else torch.channels_last
            lying = tensors["weight"].detach().contiguous(memory_format=memory_format)
            tensors["weight"] = lying.requires_grad_("weight" in wanted)
            own = [tensors.get(name, call[name]) for name in wanted]
            function = partial(conv, memory_format=memory_format)
        step = partial(function, call["images"], *tensors.values(), call.get("keep"), a, b)
        result.append((step, own))
    return result


def ceiling_steps(impl: str, calls: Sequence[Call], mode: str) -> list[Step]:
    """copy: the bytes of `cost_model.work`, half read, half written; gemm: the bare product, or that of the gradients;
    empty: a tiny launch."""
    p = problem(calls[0])
    times = 2 if mode == "both" else 1
    new = partial(torch.empty, device=p.device)
    result: list[Step] = []
    for _ in calls:
        if impl == "copy":
            half = new(times * p.bytes // 2, dtype=torch.uint8).fill_(7)
            result.append(partial(torch.empty_like(half).copy_, half))
        elif impl == "gemm":
            x, w, y = (
                new(shape, dtype=p.compute_dtype).normal_()
                for shape in ((p.B * p.rows, p.K), (p.D, p.K), (p.B * p.rows, p.D))
            )
            forward: Step = partial(torch.mm, x, w.t(), out=y)
            multiply: Callable[..., torch.Tensor] = torch.mm
            if p.on_cpu and products.mkl_is_slow(p.compute_dtype):  # a ceiling is of the fastest library
                multiply = partial(products.product, dtype=p.compute_dtype)
                forward = partial(multiply, x, w.t())
            backward: Step = partial(multiply, y.t(), x)
            images: Step = partial(multiply, y, w)
            only = {"forward": forward, "backward": backward, "images": images}
            result.append(only.get(mode) or partial(_each, forward, backward))
        else:
            result.append(new(1).zero_)
    return result


def _each(*steps: Step) -> None:
    for step in steps:
        step()
