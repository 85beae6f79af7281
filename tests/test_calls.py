"""Calls that are found again: what differs in anything that matters is another call."""

import pytest
import torch
from test_direct import Functions, Loud, Ops, call, negative
from torch.profiler import ProfilerActivity, profile

import vitkernels as vk
from vitkernels import calls, ops


@pytest.fixture
def looked_at(monkeypatch):
    """The problems that were looked at anew."""
    found, true = [], calls.problem_of
    monkeypatch.setattr(calls, "problem_of", lambda *a: found.append(true(*a)) or found[-1])
    return found


@pytest.fixture
def asked(monkeypatch):
    """How often PyTorch's dispatcher is asked."""
    times, true = [], ops._call
    monkeypatch.setattr(ops, "_call", lambda *a: times.append(1) or true(*a))
    return times


@pytest.fixture
def known():
    """A call that was made before."""
    made = call()
    vk.patch_embed(**made)
    return made


def fresh(made: dict) -> torch.Tensor:
    """By tensors that nobody knows."""
    copies = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in made.items()}
    return vk.patch_embed(**copies)


def test_a_call_is_found_again(known, looked_at):
    expected = vk.patch_embed(**known)
    known["images"] = known["images"] + 1
    assert not vk.patch_embed(**known).equal(expected)
    assert looked_at == []


def test_so_is_one_of_other_tensors_behind_the_same_address(known, looked_at, monkeypatch):
    """An address may be another tensor's by now: it says where to look, no more."""
    monkeypatch.setattr(calls, "id", lambda t: 0, raising=False)
    for made in (call(), call(), call(images=torch.rand(2, 3, 20, 16), pos_embed=None)):
        assert vk.patch_embed(**made).equal(vk.patch_embed(**made, backend="reference"))
    assert len(looked_at) == 2  # of three, each twice


CHANGES = {
    "batch": lambda m: {"images": torch.rand(3, 3, 16, 16)},
    "size": lambda m: {"images": torch.rand(2, 3, 20, 16), "pos_embed": None},
    "strides": lambda m: {"images": m["images"].contiguous(memory_format=torch.channels_last)},
    "expanded": lambda m: {"images": m["images"][:, :1].expand(2, 3, 16, 16)},
    "dtype": lambda m: {"images": m["images"].double()},
    "pixels": lambda m: {"images": (m["images"] * 255).byte()},
    "no bias": lambda m: {"bias": None},
    "no prefix": lambda m: {"prefix": None, "pos_embed": None},
    "table": lambda m: {"pos_embed": torch.rand(2, 17, 8)},
    "table of other rows": lambda m: {"pos_embed": torch.rand(16, 8)},
    "table apart": lambda m: {"pos_embed": torch.rand(17, 16)[:, ::2]},
    "bias apart": lambda m: {"bias": torch.rand(16)[::2]},
    "prefix's dtype": lambda m: {"prefix": m["prefix"].double()},
    "keep": lambda m: {"keep": torch.tensor([[0, 3], [5, 1]]), "pos_embed": None},
    "stride": lambda m: {"stride": 2, "pos_embed": None},
    "padding": lambda m: {"padding": 2, "pos_embed": None},
    "mean": lambda m: {"mean": 0.5},
    "std": lambda m: {"std": (0.1, 0.2, 0.3)},
    "scale": lambda m: {"scale": 2.0},
    "out_dtype": lambda m: {"out_dtype": torch.float64},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_another_call(name, known, looked_at):
    made = known | CHANGES[name](known)
    first, second = vk.patch_embed(**made), vk.patch_embed(**made)
    assert len(looked_at) == 1
    assert first.equal(second) and first.equal(fresh(made))
    assert vk.patch_embed(**known).equal(fresh(known))


def test_the_weight_may_change_all_but_its_name(known):
    for weight in (torch.rand(8, 3, 4, 4).double(), torch.rand(8, 3, 4, 8)[..., ::2], torch.rand(8, 3, 4, 8)):
        known["weight"].data = weight
        known["pos_embed"] = None
        assert vk.patch_embed(**known).equal(fresh(known))


@pytest.mark.parametrize(("arguments", "error"), [
    ({"scale": True}, TypeError), ({"stride": 4.0}, TypeError), ({"stride": (4.0, 4.0)}, TypeError),
    ({"padding": 0.0}, TypeError), ({"mean": "1"}, TypeError), ({"std": 0.0}, ValueError), ({"scale": 0.0}, ValueError),
    ({"images": torch.rand(2, 3, 16, 16).numpy()}, TypeError), ({"images": torch.rand(2, 3, 16, 16).int()}, TypeError),
    ({"images": torch.rand(2, 4, 16, 16)}, ValueError), ({"bias": [0.0] * 8}, TypeError),
    ({"images": torch.rand(2, 3, 16, 16).to_sparse()}, TypeError), ({"bias": torch.rand(9)}, ValueError),
    ({"images": torch.rand(2, 3, 16, 16).to_mkldnn()}, TypeError), ({"weight": None}, TypeError),
    ({"backend": "cudnn"}, ValueError), ({"out_dtype": torch.int32}, TypeError),
])  # fmt: skip
def test_wrong_inputs_stay_wrong(known, arguments, error):
    vk.patch_embed(**known | {"scale": 1, "stride": 4, "padding": 0, "mean": 1, "std": 1})
    vk.patch_embed(**known | {"scale": 1, "stride": (4, 4)})
    for _ in range(2):
        with pytest.raises(error):
            vk.patch_embed(**known | arguments)


def test_options_that_can_change_are_not_remembered(known):
    mean, std = [0.5, 0.5, 0.5], torch.ones(3)
    first = vk.patch_embed(**known, mean=mean, std=std)
    mean[0] = 0.0
    assert not vk.patch_embed(**known, mean=mean, std=std).equal(first)
    mean[0] = 0.5
    assert vk.patch_embed(**known, mean=mean, std=std).equal(first)
    std.fill_(0.5)
    assert not vk.patch_embed(**known, mean=mean, std=std).equal(first)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", [Ops, Functions])
def test_a_mode_sees_a_known_call(known, asked, mode, grad):
    known["weight"].requires_grad_(grad)
    vk.patch_embed(**known)
    with mode() as found:
        vk.patch_embed(**known)
    assert len(asked) == 1 and any("vitkernels.patch_embed" in name for name in found.seen)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        vk.patch_embed(**known)
    assert "vitkernels::patch_embed" in {event.key for event in profiled.key_averages()}
    vk.patch_embed(**known)
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["images", "weight", "bias", "pos_embed", "prefix"])
def test_a_known_tensor_is_what_it_looks_like(known, asked, name):
    bit, zero = negative(known[name]), torch._efficientzerotensor(known[name].shape)
    assert vk.patch_embed(**known | {name: bit}).equal(vk.patch_embed(**known, backend="reference"))
    assert vk.patch_embed(**known | {name: zero}).equal(vk.patch_embed(**known | {name: torch.zeros_like(known[name])}))
    vk.patch_embed(**known | {name: known[name].as_subclass(Loud)})
    assert len(asked) == 3


def test_transforms_of_a_known_call(known):
    def tokens(weight):
        return vk.patch_embed(**known | {"weight": weight})

    tangent = torch.rand_like(known["weight"])
    expected = vk.patch_embed(known["images"], tangent)
    _, change = torch.func.jvp(tokens, (known["weight"],), (tangent,))
    torch.testing.assert_close(change[:, 1:], expected)
    assert not change[:, 0].any()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(known["weight"], tangent)
        made = torch.autograd.forward_ad.unpack_dual(tokens(dual)).tangent
    torch.testing.assert_close(made[:, 1:], expected)
    stacked = torch.func.vmap(tokens)(torch.stack([known["weight"], tangent]))
    torch.testing.assert_close(stacked[0], tokens(known["weight"]))
    torch.testing.assert_close(stacked[1], tokens(tangent))


def test_gradients_where_they_are_asked_for(known):
    assert not vk.patch_embed(**known).requires_grad
    known["bias"].requires_grad_()
    for _ in range(2):
        assert vk.patch_embed(**known).requires_grad
        with torch.no_grad():
            assert not vk.patch_embed(**known).requires_grad
        with torch.inference_mode():
            assert vk.patch_embed(**known).is_inference()
    vk.patch_embed(**known).sum().backward()
    assert known["bias"].grad.eq(32).all()
    known["bias"].requires_grad_(False)
    assert not vk.patch_embed(**known).requires_grad
    with torch.inference_mode():
        pixels = torch.rand(2, 3, 16, 16)
        vk.patch_embed(**known | {"images": pixels})
    known["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="nference tensor"):
        vk.patch_embed(**known | {"images": pixels})


def test_pixels_of_inference_mode_in_a_known_call(known):
    """They can't be saved, as those that came first were."""
    known["weight"].requires_grad_()
    known["images"] = (known["images"] * 255).byte()
    with torch.inference_mode():
        inferred = known["images"].clone()
    for images in (known["images"], inferred, known["images"], inferred):
        made = torch.autograd.grad(vk.patch_embed(**known | {"images": images}).sum(), known["weight"])
        torch.testing.assert_close(made, torch.autograd.grad(fresh(known).sum(), known["weight"], allow_unused=True))


def test_autocast_of_a_known_call(known):
    known["weight"].requires_grad_()
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                tokens = vk.patch_embed(**known)
                assert tokens.dtype == dtype
                with torch.autocast("cpu", enabled=False):
                    assert vk.patch_embed(**known).dtype == torch.float32
            with torch.autocast("cuda", dtype):
                assert vk.patch_embed(**known).dtype == torch.float32
        assert vk.patch_embed(**known).dtype == torch.float32


def test_what_is_remembered_has_an_end(known, monkeypatch):
    monkeypatch.setattr(calls, "MOST_WEIGHTS", 3)
    for side in range(4, 24):
        vk.patch_embed(**known | {"images": torch.rand(1, 3, side, side), "pos_embed": None})
    assert max(len(few) for few in calls._known.values()) == calls.MOST_OF_A_WEIGHT
    for _ in range(10):
        vk.patch_embed(**call())
    assert len(calls._known) <= 3


def test_without_guards_every_call_is_looked_at(known, looked_at, monkeypatch):
    monkeypatch.setattr(calls, "_Guards", None)
    monkeypatch.setattr(calls, "_known", {})
    assert vk.patch_embed(**known).equal(vk.patch_embed(**known))
    assert len(looked_at) == 2
