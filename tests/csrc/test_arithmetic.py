"""The C++ extension's arithmetic without data (csrc/common/patch_layout.h, tensor maps), compiled for the CPU."""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from host import build
from problems import dense, drawn, drawn_patches

from vitkernels.backends import cuda
from vitkernels.backends.cuda import extension, forward_loaders, forward_plan, images_plan
from vitkernels.backends.cuda.backward_operands import Grad
from vitkernels.backends.patch_layout import layout_of
from vitkernels.gpu import NOMINAL

U8, HALF, F32 = torch.uint8, torch.float16, torch.float32
ADDRESS = 1 << 20  # of tensors that have no data


@pytest.fixture(scope="module")
def csrc():
    return build.arithmetic()


def of(monkeypatch, p, tf32=False) -> dict:
    """A problem as C++ gets it."""
    with monkeypatch.context() as patch:
        patch.setattr(extension, "load", lambda: SimpleNamespace(Problem=dict))
        return cuda._problem.__wrapped__(p, tf32)


# Offsets


class Exact:
    """Where everything lies, in Python's integers."""

    def __init__(self, p):
        self.p = p

    def element(self, k: int) -> tuple[int, int, int, int]:
        """(c, t, y, x) of element k of a patch: c varies slowest, or fastest where pixels lie channels last."""
        C, (P_t, P_h, P_w) = self.p.C, self.p.P
        if layout_of(self.p).channels_last:
            return k % C, k // (C * P_w * P_h), k // (C * P_w) % P_h, k // C % P_w
        return k // (P_t * P_h * P_w), k // (P_h * P_w) % P_t, k // P_w % P_h, k % P_w

    def place(self, n: int, k: int) -> list[int]:
        """(f, h, w) in the image of element k of patch n, in the padding outside of it."""
        (_, G_h, G_w), (_, *within) = self.p.G, self.element(k)
        cell = n // (G_h * G_w), n // G_w % G_h, n % G_w
        return [g * s - p + e for g, s, p, e in zip(cell, self.p.S, self.p.pad, within, strict=True)]

    def offset(self, b: int, n: int, k: int) -> int:
        c, index = self.element(k)[0], self.place(n, k)
        return sum(i * s for i, s in zip((b, c, *index), self.p.image_strides, strict=True))

    def inside(self, n: int, k: int) -> bool:
        sizes = (self.p.F, self.p.H, self.p.W)
        return all(0 <= i < size for i, size in zip(self.place(n, k), sizes, strict=True))


@pytest.mark.parametrize("large", [False, True])
def test_offsets(csrc, monkeypatch, large):
    rng = random.Random(large)
    farthest, skipped = [], 0
    for _ in range(600):
        p = drawn(rng, large)
        if cuda.too_large(p):
            skipped += 1
            continue
        layout, exact = csrc.PatchLayout(of(monkeypatch, p)), Exact(p)
        assert layout.channels_last == layout_of(p).channels_last
        weights = dense(64, p.C, *p.P), (2**40, 1, 2**33 + 1, 5, 2**31 - 1), (7, 0, 0, 2**35, -3)
        for _ in range(20):
            b, n, k = (rng.choice((rng.randrange(size), size - 1)) for size in (p.B, p.N, p.K))
            (from_, f, h, w), (offset, t, y, x) = layout.corner(b, n), layout.element(k)
            c, *element = exact.element(k)
            assert from_ + offset == exact.offset(b, n, k), (p, b, n, k)
            if not layout.channels_last:
                assert [f + t, h + y, w + x] == exact.place(n, k), (p, n, k)
            assert layout.inside(b, n, k) == exact.inside(n, k), (p, n, k)
            assert layout.channel(k) == c
            for strides in weights:
                assert layout.weight_offset(k, strides) == sum(
                    i * s for i, s in zip((c, *element), strides[1:], strict=True)
                )
            farthest.append(exact.offset(b, n, k))
    assert skipped < 200
    for power in (31, 32, 40) if large else ():
        assert sum(offset > 2**power for offset in farthest) > 500


def test_divisors(csrc):
    rng = random.Random(0)
    divisors = [*range(1, 600), 2**16, 2**30, 2**31 - 1, *(rng.randrange(1, 2**31) for _ in range(400))]
    for divisor in divisors:
        whole = rng.randrange(2**31 // divisor) * divisor if divisor < 2**31 - 1 else 0
        for n in (0, 1, divisor - 1, divisor, whole, whole + 1, max(whole, 1) - 1, 2**31 - 1, rng.randrange(2**31)):
            if n < 2**31:
                assert csrc.divided(divisor, n) == divmod(n, divisor), (n, divisor)


# Tensor maps


@pytest.mark.parametrize("image", [U8, HALF, F32])
def test_maps(csrc, monkeypatch, image):
    """The driver takes the maps, and what a step's copies bring is what its barrier was told, to the byte."""
    rng, found = random.Random(image.itemsize), 0
    for _ in range(600):
        p = drawn_patches(rng, image)
        for f in forward_plan.candidates(p, NOMINAL[90], rng.random() < 0.5)[0]:
            if f.wgmma:
                check_maps(csrc, of(monkeypatch, p), p, f)
                found += f.loader == "engine"
    assert found > 10


@pytest.mark.parametrize("image", [HALF, F32])
def test_maps_of_the_images_gradient(csrc, monkeypatch, image):
    rng, found = random.Random(image.itemsize), 0
    for _ in range(600):
        p = drawn_patches(rng, image)
        p = replace(p, S=p.P, D=rng.randint(1, 40) * 8, H=p.G[1] * p.P[1], W=p.G[2] * p.P[2])
        strides = Grad(0, dense(p.B, p.T + p.rows, p.D))
        if images_plan.no_wgmma_images(p, NOMINAL[90], p.image_strides, 0, strides):
            continue
        found += 1
        f, v = images_plan.wgmma_images_plan(p, NOMINAL[90], p.image_strides), layout_of(p)
        for place in range(f.group):
            d = of(monkeypatch, p)
            pixels, grads = csrc.maps_of_images(d, f._asdict(), (d["image"], *p.image_strides), place)
            for m in (pixels, grads):
                assert m["refused"] == "" and all(1 <= n <= 256 for n in m["block"])
                assert m["swizzle"] == m["block"][0] * m["itemsize"]
            assert math.prod(grads["block"]) == 128 * 64 and math.prod(pixels["block"]) == 16 * 16
            assert pixels["sizes"] == [place * v.S[2] + v.P[2], p.G[2] // f.group, p.G[1], p.B, v.C * p.H]
            within = list(zip(pixels["block"][1:4], (f.block[2] // f.group, *f.block[1::-1]), strict=True))
            assert all(n == size or all(m == 1 for m, _ in within[i + 1 :]) for i, (n, size) in enumerate(within))
    assert found > 10


def check_maps(csrc, d: dict, p, f) -> None:
    fields = f._asdict() | {"loader": list(forward_loaders.LOADERS).index(f.loader)}
    weight = csrc.weight_map(d, fields, ADDRESS)  # a packed weight lies where PyTorch's allocator puts scratch
    pair = f.cluster // f.splits
    copies = 1 if pair == 1 else f.step_k // weight["block"][0]
    assert math.prod(weight["block"]) * pair * copies == f.BN * f.step_k
    assert weight["block"][0] * weight["block"][2] * copies == f.step_k and weight["sizes"][1] == p.D
    assert math.prod(weight["block"]) * weight["itemsize"] % (8 * weight["swizzle"]) == 0
    assert -(-p.K // 16) * 16 <= weight["sizes"][0] * weight["sizes"][2] == f.weight_row
    assert weight["block"][0] * weight["itemsize"] == weight["swizzle"] in (32, 128)
    maps = [weight]
    size, v = p.image_dtype.itemsize, layout_of(p)
    if f.loader == "engine":
        for place in range(f.group):
            image = csrc.image_map(d, fields, ADDRESS, (d["image"], *p.image_strides), place)
            rows, copies = image["block"][-1], -(-v.P[2] // 16) * 16 // image["box"]
            assert rows == (f.stage_rows if f.group == 1 else 1)
            assert f.group * f.stage_rows // rows * copies * math.prod(image["block"]) == f.BM * f.step_k
            # The patch's own pixels are the last that the map has
            assert image["sizes"] == [place * v.S[2] + v.P[2], p.G[2] // f.group, p.G[1], p.B, v.C * p.H]
            assert image["strides"][1] == f.group * v.S[2] * size
            # Each copy's place: the copy engine writes to multiples of 128 bytes, swizzled to eight rows' span.
            assert math.prod(image["block"]) * size % max(128, 8 * image["swizzle"]) == 0
            maps.append(image)
    if f.loader in forward_loaders.STORING:
        tokens = csrc.token_map(d, fields, ADDRESS)
        lines, columns = (p.G[0] * p.G[1], p.G[2]) if p.n_keep is None else (1, p.rows)
        assert tokens["sizes"] == [p.D, columns // f.group, lines, p.B, f.group]
        assert math.prod(tokens["block"]) * tokens["itemsize"] == 16 * 64
        # A warp's rows are a block of the tile's: whole lines of it, of whole images, or parts of one line; of one map
        within = list(zip(tokens["block"][1:4], (f.block[2] // f.group, *f.block[1::-1]), strict=True))
        assert all(n == size or all(m == 1 for m, _ in within[i + 1 :]) for i, (n, size) in enumerate(within))
        assert all(size % n == 0 for n, size in within)
        maps.append(tokens)
    for m in maps:
        assert m["refused"] == ""
        assert all(1 <= n <= 256 for n in m["block"])
        assert all(0 < s < 2**40 and s % 16 == 0 for s in m["strides"][1:])
        assert m["swizzle"] in (0, m["block"][0] * m["itemsize"])
