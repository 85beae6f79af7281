"""A plain call goes past PyTorch's dispatcher, unless somebody would see the operation there, or tensors change."""

from threading import Thread
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vitkernels as vk
from vitkernels import ops


def call(grad=False, **change):
    g = torch.Generator().manual_seed(0)
    made = {
        "images": torch.rand(2, 3, 16, 16, generator=g), "weight": torch.rand(8, 3, 4, 4, generator=g),
        "bias": torch.rand(8, generator=g), "pos_embed": torch.rand(17, 8, generator=g),
        "prefix": torch.rand(1, 8, generator=g),
    }  # fmt: skip
    return {n: t.requires_grad_() if grad and n != "images" else t for n, t in made.items()} | change


@pytest.fixture
def asked(monkeypatch):
    """How often the dispatcher is asked, forward and backward."""
    times = []
    for name in ("_call", "_autograd_backward"):
        true = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, true=true, name=name: times.append(name) or true(*a))
    return times


def test_a_plain_call_is_direct(asked):
    expected = vk.patch_embed(**call(), backend="reference")
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            assert vk.patch_embed(**call()).equal(expected)
    leaves = call(grad=True)
    leaves["weight"] = torch.nn.Parameter(leaves["weight"].detach())
    tokens = vk.patch_embed(**leaves)
    tokens.sum().backward()
    assert asked == []
    assert tokens.equal(expected)
    assert all(leaves[name].grad is not None for name in ("weight", "bias", "pos_embed", "prefix"))
    vk.patch_embed(**call(grad=True)).pow(2).sum()
    tokens = vk.patch_embed(**call(grad=True, weight=leaves["weight"]))
    (first,) = torch.autograd.grad(tokens.pow(2).sum(), leaves["weight"], create_graph=True)
    assert asked == ["_autograd_backward"]  # which is recorded
    assert torch.autograd.grad(first.sum(), leaves["weight"])[0].isfinite().all()


class Seen:
    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Ops(Seen, TorchDispatchMode):
    __torch_dispatch__ = Seen.note


class Functions(Seen, TorchFunctionMode):
    __torch_function__ = Seen.note


@pytest.mark.parametrize("mode", [Ops, Functions])
@pytest.mark.parametrize("grad", [False, True])
def test_a_mode_sees_the_operation(mode, grad, asked):
    with mode() as found:
        vk.patch_embed(**call(grad=grad))
    assert asked == ["_call"]
    assert any("vitkernels.patch_embed" in name for name in found.seen)


def test_a_mode_around_the_backward_sees_it():
    tokens = vk.patch_embed(**call(grad=True))
    with Ops() as found:
        tokens.sum().backward()
    assert any("vitkernels.patch_embed_backward" in name for name in found.seen)


def test_flops_and_profiles_name_the_operation():
    with FlopCounterMode(display=False) as counter:
        vk.patch_embed(**call())
    assert counter.get_total_flops() == 2 * 2 * 16 * 48 * 8
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        vk.patch_embed(**call(grad=True)).sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert {"vitkernels::patch_embed", "vitkernels::patch_embed_backward"} <= names


def negative(t):
    """The same values, held as their negatives behind a bit that kernels do not see."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


@pytest.mark.parametrize("name", ["images", "weight", "bias", "pos_embed", "prefix"])
def test_tensors_that_are_not_what_they_look_like(name, asked):
    plain = call()
    bit = negative(plain[name])
    assert bit.is_neg() and bit.equal(plain[name])
    assert vk.patch_embed(**plain | {name: bit}).equal(vk.patch_embed(**plain, backend="reference"))
    zero = torch._efficientzerotensor(plain[name].shape)
    expected = vk.patch_embed(**plain | {name: torch.zeros_like(plain[name])})
    assert vk.patch_embed(**plain | {name: zero}).equal(expected)
    assert asked == ["_call", "_call"]


class Loud(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_is_asked():
    Loud.seen.clear()
    vk.patch_embed(**call(images=call()["images"].as_subclass(Loud)))
    assert any("vitkernels.patch_embed" in name for name in Loud.seen)


def test_hooks_may_give_the_backward_other_strides():
    def unpack(t):
        return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t

    expected = call(grad=True)
    vk.patch_embed(**expected).pow(2).sum().backward()
    found = call(grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        vk.patch_embed(**found).pow(2).sum().backward()
    torch.testing.assert_close(found["weight"].grad, expected["weight"].grad)


def test_writes_are_seen_whichever_way_they_are_made():
    plain = call(grad=True)
    first = vk.patch_embed(**plain)
    with torch.no_grad():
        plain["weight"].mul_(2)
    plain["bias"].data.zero_()
    plain["pos_embed"].data = torch.zeros(17, 8)
    assert not vk.patch_embed(**plain).equal(first)
    assert vk.patch_embed(**plain).equal(vk.patch_embed(**{n: t.detach().clone() for n, t in plain.items()}))
    read = vk.patch_embed(**call(images=call()["images"].requires_grad_(), weight=plain["weight"]))
    with torch.no_grad():
        plain["weight"].mul_(2)  # which the images' gradient is made of
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


def test_threads_call_at_once():
    expected = vk.patch_embed(**call())
    found = []

    def run():
        for _ in range(50):
            leaves = call(grad=True)
            tokens = vk.patch_embed(**leaves)
            tokens.sum().backward()
            found.append(tokens.equal(expected) and leaves["bias"].grad.eq(32).all().item())

    threads = [Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(found)


def test_keep_is_checked_on_the_way():
    with pytest.raises(ValueError, match=r"patch indices 0\.\.15, got 0\.\.16"):
        vk.patch_embed(**call(keep=torch.tensor([[0, 16], [1, 2]])))
