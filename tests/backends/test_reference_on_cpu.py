"""How the reference evaluates on a CPU: pieces of every size, their memory, where products land, by makers' rules."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import arguments, images_of
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels.backends import reference
from vitkernels.backends.common import canonical
from vitkernels.backends.reference import gradients, products, unfold
from vitkernels.bench.cases import Case
from vitkernels.bench.memory import peak_bytes
from vitkernels.testing import accuracy, oracle, random_problems


@pytest.mark.parametrize("piece_rows", [1, 3, 20, 150])
@pytest.mark.parametrize("seed", range(1000, 1040))
def test_pieces_of_any_size(seed, piece_rows, maker, poisoned, monkeypatch):
    """With rows behind all, and the weight packed in every other, where the processor gains by that; gradients summed
    image by image."""
    monkeypatch.setattr(unfold, "_piece_rows", lambda *_: piece_rows)
    monkeypatch.setattr(gradients, "SUMMED_AT_ONCE", 1)
    for module in (unfold, gradients):
        monkeypatch.setattr(module, "padded_rows", lambda n: -(-n // 8) * 8)
    monkeypatch.setattr(unfold, "gains_by_packing", lambda p, _: p.B * p.rows > 0 and seed % 2 == 1)
    for row in accuracy.compare(random_problems.case(seed).tensors(), "reference", gradients=True):
        assert row["ok"], row


@pytest.mark.parametrize("at_once", [0, 1 << 20], ids=["in pieces", "at once"])
@pytest.mark.parametrize("D", [8, 40])
@pytest.mark.parametrize("P", [14, 16])
def test_gradients_of_pieces_that_cancel(P, D, at_once, maker, poisoned, monkeypatch):
    """In bf16 two images may contribute the same but for its sign: rounded apart, the sum would be rounding alone."""
    monkeypatch.setattr(unfold, "_piece_rows", lambda *_: 3)
    monkeypatch.setattr(gradients, "AT_ONCE_BYTES", at_once)
    images = images_of(1, 3, P, 3 * P, dtype=torch.bfloat16).repeat(2, 1, 1, 1)
    images[1, :, 0] *= 1.5
    weight = images_of(D, 3, P, P, dtype=torch.bfloat16, seed=1)
    dy = images_of(1, 3, D, dtype=torch.bfloat16, seed=2)
    dy = torch.cat([dy, -dy])
    tensors = canonical(images, weight, None, None, None)
    found = torch.empty_like(weight)
    p = vk.explain(images, weight).problem
    reference.backward(p, dy, *tensors, grads=(None, found, None, None, None))
    patches = images.double().unfold(3, P, P).permute(0, 3, 1, 2, 4).reshape(6, -1)
    exact = (dy.double().view(6, D).t() @ patches).view(weight.shape)
    assert exact[:, :, 1:].abs().max() < 1e-9
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


GRADIENTS = {  # of tokens [B, 8, 40], in the strides that autograd and models hand on
    "sum": lambda dy: dy[:1, :1, :1].expand_as(dy),
    "a row for all": lambda dy: dy[:1, :1].expand_as(dy),
    "channels outside": lambda dy: dy.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every second": lambda dy: torch.cat([dy, dy], 2)[:, :, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("how", GRADIENTS)
def test_gradients_of_tokens_in_any_strides(how, B, dtype, maker):
    images, weight = images_of(B, 3, 32, 16, dtype=dtype), images_of(40, 3, 8, 8, dtype=dtype, seed=1)
    learnt = images.requires_grad_(), weight.requires_grad_()
    tokens, dy = vk.patch_embed(*learnt), GRADIENTS[how](images_of(B, 8, 40, dtype=dtype, seed=2))
    found, wanted = (torch.autograd.grad(tokens, learnt, g, retain_graph=True) for g in (dy, dy.contiguous()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pos", [False, True])
def test_tokens_may_be_changed_in_place(pos, dtype, maker):
    """Models add to them. They are no view, though they may be a product's memory."""
    weight = images_of(40, 3, 8, 8, dtype=dtype, seed=1).requires_grad_()
    tokens = vk.patch_embed(
        images_of(2, 3, 32, 16, dtype=dtype), weight, pos_embed=images_of(8, 40, dtype=dtype) if pos else None
    )
    assert tokens._base is None and tokens.is_contiguous()
    tokens += 1
    tokens.sum().backward()
    assert weight.grad.isfinite().all()


INTERLEAVED = {
    "a picture": dict(images=(3, 3, 32, 48), weight=(8, 3, 8, 16)),
    "one image": dict(images=(1, 3, 64, 64), weight=(4, 3, 8, 8)),
    "normalised": dict(
        images=(3, 3, 32, 48), weight=(8, 3, 16, 16), mean=(0.3, 0.5, 0.1), std=(0.5, 0.2, 2.0), scale=0.25
    ),
    "mean alone": dict(images=(3, 4, 32, 48), weight=(8, 4, 16, 16), mean=(0.3, 0.5, 0.1, 0.7)),
    "std alone": dict(images=(3, 4, 32, 48), weight=(8, 4, 16, 16), std=(0.3, 0.5, 0.1, 0.7)),
    "video": dict(images=(2, 3, 4, 32, 48), weight=(8, 3, 2, 16, 16), mean=0.5),
    "overlap and padding": dict(images=(3, 3, 33, 45), weight=(8, 3, 7, 9), stride=(4, 5), padding=(2, 3), std=0.5),
    "kept": dict(images=(3, 3, 32, 48), weight=(4, 3, 8, 16), keep=((3, 3, 1, 0),) * 3, std=(0.5, 0.2, 2.0)),
}


@pytest.mark.parametrize("pixels", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lie", ["weight as it is", "weight channels-last"])
@pytest.mark.parametrize("name", INTERLEAVED)
def test_channels_side_by_side(name, lie, pixels, maker):
    """A pixel's channels lie together, as a decoder and channels-last models leave them."""
    call = dict(INTERLEAVED[name])
    images, weight = (images_of(*call.pop(n), dtype=torch.float32, seed=i) for i, n in enumerate(("images", "weight")))
    images = (images * 50).abs().to(pixels).movedim(1, -1).contiguous().movedim(-1, 1)
    if lie == "weight channels-last":
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    if "keep" in call:
        call["keep"] = torch.tensor(call["keep"])
    call |= {"images": images, "weight": weight, "bias": images_of(len(weight), dtype=torch.float32)}
    assert unfold.side_by_side(vk.explain(**call).problem) is not None
    for row in accuracy.compare(call, "reference", gradients=True):
        assert row["ok"], row


PLACES = {  # images, patch, rows of the table, pieces of so many patches
    "a piece": ((5, 3, 32, 48), 16, 2 + 6, 100),
    "the last piece is one image": ((5, 3, 32, 48), 16, 2 + 6, 12),
    "an image a piece": ((3, 3, 32, 48), 16, 2 + 6, 6),
    "lines of an image": ((3, 3, 32, 48), 16, 6, 3),
    "a row to pad": ((5, 3, 28, 42), 14, 2 + 6, 18),
    "no positions": ((5, 3, 28, 42), 14, None, 18),
    "positions of each image": ((5, 3, 32, 48), 16, (5, 2 + 6), 18),
    "kept": ((5, 3, 32, 48), 16, 2 + 6, 8),
}


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("n", "D", "columns"), [(64, 24, 16), (2111, 97, 51), (2500, 64, 64), (311, 263, 149), (1, 3200, 3200)]
)
def test_products_that_are_added_up(n, D, columns, slow, poisoned, monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda dtype: slow)
    dy, x, total = (images_of(*shape, dtype=torch.float32) for shape in ((n, D), (n, columns), (D, columns)))
    expected = total.double() + dy.double().t() @ x.double()
    products.add_product(total, dy, x)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * n)


@pytest.mark.parametrize(("weights", "tokens", "multiplied"), [
    (torch.bfloat16, None, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),  # more than a rounded product was asked for
    (torch.float32, None, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16),  # by autocast: with its rounding, and its speed
])  # fmt: skip
def test_what_a_cpu_with_instructions_for_bf16_multiplies_in(weights, tokens, multiplied, monkeypatch):
    monkeypatch.setattr(products, "_has_bf16", lambda: True)
    images, weight = images_of(2, 3, 32, 32), torch.zeros(8, 3, 16, 16, dtype=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        p = vk.explain(images, weight, out_dtype=tokens).problem
    assert products.product_dtype(p) == multiplied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 2])
@pytest.mark.parametrize("bias", [None, "in the table", "in the product"])
@pytest.mark.parametrize("name", PLACES)
def test_products_and_where_they_land(name, bias, T, dtype, maker, poisoned, monkeypatch):
    """The bias is rounded with the product in bf16, so it may cancel the product: others keep what is left, too."""
    monkeypatch.setattr(products, "_has_bf16", lambda: True)
    if bias == "in the product":
        monkeypatch.setattr(products, "TABLE_BYTES", 0)
    size, P, rows, piece_rows = PLACES[name]
    monkeypatch.setattr(unfold, "_piece_rows", lambda *_: piece_rows)
    images, weight = images_of(*size, dtype=dtype), images_of(48, 3, P, P, dtype=dtype, seed=1) / 8
    call = {"images": 1 + images / 16, "weight": weight.abs() + 0.1}
    call["bias"] = -call["weight"].flatten(1).sum(1) if bias else None
    if rows is not None:
        rows = (rows,) if isinstance(rows, int) else rows
        rows = (*rows[:-1], rows[-1] - 2 + T if rows[-1] > 6 else rows[-1])
        call["pos_embed"] = images_of(*rows, 48, dtype=dtype, seed=2)
    if T:
        call["prefix"] = images_of(T, 48, dtype=dtype, seed=3)
    if name == "kept":
        call["keep"] = torch.tensor([[5, 0, 0, 3], [1, 2, 3, 4], [0, 1, 2, 5], [5, 4, 3, 2], [2, 2, 2, 2]])
    for row in accuracy.compare(call, "reference", gradients=True):
        assert row["ok"], row


@pytest.mark.parametrize("piece_rows", [12, 8, 4, 2])
def test_frames_of_a_piece(piece_rows, maker, poisoned, monkeypatch):
    """Three, two, one of the five frames, or a line of one."""
    monkeypatch.setattr(unfold, "_piece_rows", lambda *_: piece_rows)
    images, weight = images_of(2, 3, 10, 16, 16), images_of(8, 3, 2, 8, 8, seed=1)
    torch.testing.assert_close(
        vk.patch_embed(images, weight), oracle.oracle(images=images, weight=weight), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("D", [384, 768, 1024])
def test_two_threads_both_multiply(D, monkeypatch):
    """Pieces of at least one image have no such number of rows as oneDNN gives to one thread of two."""
    monkeypatch.setattr(unfold.cpu, "instructions", lambda: ("amx_bf16",))
    call = Case(batch=1, dim=D, dtype="bf16").call("cpu")
    for B in range(1, 60):
        p = replace(vk.explain(**call).problem, B=B)
        least, most = products.by_one_thread(p, torch.bfloat16, 2)
        images, _ = unfold._cut(p, torch.bfloat16, 20 * p.N, 2)
        assert sum(b.stop - b.start for b in images) == B
        assert all(b.stop - b.start <= images[0].stop <= 20 for b in images)
        assert 0 < least < most
        assert not least <= images[0].stop * p.N < most
        assert products.by_one_thread(p, torch.bfloat16, 4) == (0, 0)


@pytest.mark.parametrize(
    ("dtype", "n"), [(torch.float32, 4), (torch.float32, 2), (torch.bfloat16, 8), (torch.float64, 1)]
)
@pytest.mark.parametrize("how", ["whole", "shifted", "odd rows", "every second", "to float64"])
def test_lines_are_copied_by_words(dtype, n, how):
    base = images_of(2, 3, 8, 8 * n + 1, dtype=dtype)
    base[0, 0, 0, 0] = float("nan")
    images = {"shifted": base[..., 1:], "odd rows": base[..., : 8 * n], "every second": base[..., ::2]}.get(how)
    images = base[..., : 8 * n].contiguous() if images is None else images
    grid = images.unflatten(-1, (-1, n)) if images.shape[-1] % n == 0 else images[..., : 4 * n].unflatten(-1, (-1, n))
    of = grid.permute(0, 2, 3, 1, 4)
    to = torch.full((2, 8, of.shape[2], 3, n), 7, dtype=torch.float64 if how == "to float64" else dtype)
    unfold.copy_lines(to, of)
    torch.testing.assert_close(to, of.to(to.dtype), rtol=0, atol=0, equal_nan=True)
    assert unfold._are_words(grid, n) == ((n == 1 and how != "every second") or how in ("whole", "to float64"))


KEPT = {  # images, patch, stride
    "plain": ((2, 3, 32, 48), (16, 8), (16, 8)),
    "lines apart": ((2, 3, 40, 48), (8, 16), (16, 16)),
    "lines overlap": ((2, 3, 40, 48), (16, 16), (8, 16)),
    "columns apart": ((2, 3, 32, 48), (8, 8), (8, 20)),
    "columns overlap": ((2, 3, 32, 48), (8, 16), (8, 4)),
    "one image": ((1, 3, 32, 48), (16, 16), (16, 16)),
    "pixels left over": ((2, 3, 37, 48), (16, 16), (16, 16)),
    "columns left over": ((2, 3, 32, 50), (16, 16), (16, 16)),
    "video, frames apart": ((2, 3, 9, 32, 32), (2, 16, 16), (3, 16, 16)),
    "video, frames overlap": ((2, 3, 5, 32, 32), (2, 16, 16), (1, 16, 16)),
}  # fmt: skip


@pytest.mark.parametrize("pixels", [torch.float32, torch.uint8])
@pytest.mark.parametrize("lie", [lambda x: x, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)])
@pytest.mark.parametrize("name", KEPT)
def test_kept_patches_are_those_of_all(name, lie, pixels):
    size, patch, stride = KEPT[name]
    g = torch.Generator().manual_seed(3)
    images = lie(torch.randint(256, size, generator=g).to(pixels))
    call = dict(images=images, weight=torch.randn(8, 3, *patch, generator=g), stride=stride, scale=1.0)
    every = vk.patch_embed(**call)
    keep = torch.randint(every.shape[1], (len(images), 5), generator=g)
    torch.testing.assert_close(
        vk.patch_embed(**call, keep=keep), every.gather(1, keep[:, :, None].expand(-1, -1, 8)), rtol=1e-4, atol=1e-2
    )


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements; a view of an input is not made."""

    def __init__(self, *inputs):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in inputs}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"pixels": "uint8"}, {"patch": 14, "dim": 1024}, {"dim": 192}, {"keep": 0.25}, {"image": 518, "patch": 14}],
)
def test_temporary_memory_does_not_grow_with_the_batch(shape, dtype, maker):
    step = partial(vk.patch_embed, **Case(batch=24 if "image" in shape else 48, dtype=dtype, **shape).call("cpu"))
    with torch.no_grad():
        step()
        assert peak_bytes(step) < 8e6 / 2 * max(2, torch.get_num_threads())


@pytest.mark.parametrize(
    ("dtype", "pixels", "summed", "shape", "expected"),
    [
        ("fp32", "fp32", None, {}, {"Intel": (1, False), "Zen 5": (1, False), "another": (2, True)}),
        ("fp32", "uint8", None, {}, {"Intel": (2, True), "Zen 5": (2, True), "another": (2, True)}),
        ("fp32", "fp32", torch.float32, {}, {"Intel": (1, False), "Zen 5": (2, True), "another": (2, True)}),
        ("fp32", "fp32", None, {"batch": 32}, {"Intel": (3, False), "Zen 5": (7, True), "another": (7, True)}),
        ("bf16", "bf16", None, {}, {"Intel": (1, False), "Zen 5": (1, True), "another": (2, True)}),
        ("bf16", "bf16", None, {"patch": 32}, {"Intel": (1, False), "Zen 5": (1, False), "another": (2, True)}),
    ],
    ids=["fp32", "uint8", "gradient", "fp32, large", "bf16", "bf16, long lines"],
)
def test_a_batch_in_as_few_pieces_as_were_measured_best(dtype, pixels, summed, shape, expected, maker):
    case = {"batch": 8, "dim": 192, **shape}
    p = vk.explain(**Case(dtype=dtype, pixels=pixels, **case).call("cpu")).problem
    way = unfold._way_of(p, summed, 2, True)
    assert (len(way.images), way.windows is None) == expected[maker]  # pieces, and whether images are copied first


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("table", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_image_and_a_table_of_another_dtype(table, bias, maker):
    """Few rows, in float32: the sum starts at the table, however large beside the products."""
    call = arguments(1, 3, 32, 48, 16, 40, pixels=torch.float32, weights=torch.float32)
    call["pos_embed"] = (1000 * call["pos_embed"]).to(table)
    call["bias"] = call["bias"] if bias else None
    for row in accuracy.compare(call, "reference"):
        assert row["ok"], row


VIEWS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "every second row": lambda x: torch.cat([x, x], 2)[:, :, ::2],
    "flipped axes": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1, :1].expand_as(x),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_images_are_not_copied(view, maker, monkeypatch):
    monkeypatch.setattr(unfold, "_piece_rows", lambda *_: 20)
    images, weight = view(images_of(8, 3, 64, 64, dtype=torch.float32)), torch.zeros(2, 3, 8, 8)
    problem = vk.explain(images, weight).problem
    with Allocations(images, weight) as made:
        reference.forward(problem, images.unsqueeze(2), weight.unsqueeze(2), None, None, None, None)
    assert 0 < made.largest <= images.numel() // 8


@pytest.mark.parametrize(("size", "P"), [((1, 3, 224, 16), 16), ((5, 3, 40, 8), 8)])
def test_one_column_without_a_bias(size, P, maker):
    """PyTorch's convolution in bfloat16 gives garbage or NaN there on a CPU with AMX (2.14.1), so it is no measure."""
    call = {"images": images_of(*size), "weight": images_of(64, 3, P, P, seed=1) / 16}
    exact = oracle.oracle(**call)
    tokens = vk.patch_embed(**{name: t.to(torch.bfloat16) for name, t in call.items()})
    torch.testing.assert_close(tokens.double(), exact.double(), rtol=0, atol=2**-6 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("shape", "gains"),
    [
        ({"batch": 8}, False),
        ({"batch": 32}, True),
        ({"batch": 32, "dim": 192}, False),
        ({"batch": 128, "dim": 192}, True),
        ({"batch": 32, "image": 32, "patch": 4, "dim": 192}, False),
    ],
    ids=str,
)
def test_a_weight_is_packed_where_its_products_gain_more(shape, gains, maker):
    p = vk.explain(**Case(**shape, dtype="fp32").call("cpu")).problem
    assert products.gains_by_packing(p, torch.float32) == (gains and maker == "Zen 5")


@pytest.mark.parametrize("T", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 12])
def test_rows_that_onednn_likes_and_a_weight_in_its_order(B, dtype, T, maker, poisoned, monkeypatch):
    """On Zen 5: 361 patches, in 368 rows, or 4,332 in pieces, which all take the packed weight."""
    monkeypatch.setattr(products, "PACKED_FROM", 100_000_000)
    call = arguments(B, 3, 304, 304, 16, 192, T, pixels=dtype, weights=dtype)
    p = vk.explain(**call).problem
    way = unfold.way_of(p)
    rows = [len(x) for *_, x in unfold.pieces(way, canonical(*list(call.values())[:5])[0], None)]
    zen5 = maker == "Zen 5"
    assert way.packs == products.gains_by_packing(p, way.dtype) == (zen5 and B > 1)
    assert all(n % 8 == 0 for n in rows) if zen5 else sum(rows) == B * (361 + way.room)
    for row in accuracy.compare(call, "reference"):
        assert row["ok"], row


def test_rows_of_the_images_gradient_that_onednn_likes(maker, monkeypatch):
    """On Zen 5: 722 patches, of two images, in 728 rows."""
    rows = []
    monkeypatch.setattr(gradients, "product", lambda a, *b: rows.append(len(a)) or products.product(a, *b))
    images = images_of(2, 3, 304, 304, dtype=torch.float32).requires_grad_()
    vk.patch_embed(images, images_of(8, 3, 16, 16, dtype=torch.float32)).sum().backward()
    assert rows == ([728] if maker == "Zen 5" else [722])


class InnerSizes(TorchDispatchMode):
    """Notes the dtype and the inner dimension of every product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() in ("aten::addmm", "aten::mm", "aten::mm.out", "aten::linear", "mkldnn::_linear_pointwise"):
            a = args[1] if op.name() == "aten::addmm" else args[0]
            self.seen.add((a.dtype, a.shape[-1]))
        return op(*args, **(kwargs or {}))


def test_rows_that_are_multiplied_in_bf16_are_padded(maker, monkeypatch):
    """To 32, where a CPU has AMX or does not tell: oneDNN's product with it takes the next row's NaN times zero (its
    issue 5717). In fp32 where PyTorch was told to round that to bf16, too."""
    monkeypatch.setattr(products, "_has_bf16", lambda: True)

    def multiplied(dtype):
        call = {"images": images_of(2, 3, 28, 28, dtype=dtype), "weight": images_of(40, 3, 14, 14, dtype=dtype)}
        p = vk.explain(**call).problem
        tensors = canonical(*call.values(), None, None, None, None)
        with InnerSizes() as sizes:
            tokens = reference.forward(p, *tensors)
            reference.backward(p, tokens, *tensors, grads=(torch.empty_like(tensors[0]), *[None] * 4))
        return sizes.seen

    # K = 588, and D = 40, which the images' gradient sums over
    K, D = (588, 40) if maker == "Zen 5" else (608, 64)
    assert multiplied(torch.bfloat16) == {(torch.bfloat16, K), (torch.bfloat16, D)}
    assert multiplied(torch.float32) == {(torch.float32, 588), (torch.float32, 40)}
    torch.set_float32_matmul_precision("medium")
    try:
        assert multiplied(torch.float32) == {(torch.float32, K), (torch.float32, D)}
    finally:
        torch.set_float32_matmul_precision("highest")
