"""How patches come into shared memory (csrc/forward/loaders.cuh), and why a loader can't take a problem: arithmetic
alone, on the problem and where its tensors begin."""

from __future__ import annotations

from math import gcd

import torch

from ...problem import PatchProblem
from ..patch_layout import PatchLayout, group_of, no_copy_engine, padded_row, row_alignment, scaling

LOADERS = {
    "gather": "pixels gathered one by one",  # through registers: everything the contract allows
    "copy": "pixels copied asynchronously",  # 4 to 16 bytes at a time, a patch's elements side by side
    # Operands are put together from them when they are read: P = 14, where a patch's row begins at no multiple of 16
    # bytes.
    "rows": "image rows copied whole",
    # sm_90a. A tile is a block of the grid, and a patch's rows are padded to a multiple of 16 elements.
    "copied": "patches copied for wgmma",
    "stored": "patches copied for wgmma, tokens stored by the copy engine",
    "engine": "patches cut and tokens stored by the copy engine",
}
BY_BLOCKS, STORING = ("copied", "stored", "engine"), ("stored", "engine")


def product_step(product: str) -> int:
    """Elements of k in one step of the tensor cores; 0: without them."""
    return {"half": 16, "tf32": 8}.get(product, 0)


def _other_float(p: PatchProblem) -> bool:
    return p.image_dtype not in (p.compute_dtype, torch.uint8, torch.float32)


def no_copy(p: PatchProblem, layout: PatchLayout, product: str, images_at: int) -> tuple[str, int]:
    """Why pixels can't be copied 4 bytes or more at a time, a patch's elements side by side; and how many they can."""
    size, chunk = p.image_dtype.itemsize, row_alignment(p, layout, images_at)
    if product == "fp64" or _other_float(p):
        return "pixels are of another float type than the product", 0
    if layout.strides[4] != 1:
        return f"pixels of a row are {layout.strides[4]} apart", 0
    chunk = gcd(layout.P[2] * size, layout.S[2] * size, chunk)
    if any(p.pad):
        if scaling(p, product)[0]:
            return "padding, of normalised pixels", 0
        chunk = gcd(layout.pad[2] * size, layout.W * size, chunk)
    return (f"patches begin at multiples of {chunk} bytes, of 4 at least they must" if chunk < 4 else ""), chunk


def no_rows(p: PatchProblem, layout: PatchLayout, product: str, images_at: int) -> tuple[str, int]:
    """Why whole rows of the image can't be copied; and how many bytes at a time they can."""
    chunk = row_alignment(p, layout, images_at)
    reasons = (
        (not product_step(product), "no tensor cores in the product"),
        (_other_float(p), "pixels are of another float type than the product"),
        (layout.strides[4] != 1, f"pixels of a row are {layout.strides[4]} apart"),
        (p.n_keep is not None, "a keep list"),
        (any(p.pad), f"padding {p.pad[1:]}"),
        (layout.P[2] % 2 or layout.S[2] % 2, "patches of an odd number of pixels in a row, or an odd stride"),
        (chunk < 2, "rows begin at odd addresses"),
    )
    return next((text for wrong, text in reasons if wrong), ""), chunk


def no_operands(p: PatchProblem, product: str) -> str:
    """Why wgmma's operands can't be made of pixels."""
    if product == "fp64":
        return "the product is of 64 bits"
    return "pixels are of another float type than the product" * _other_float(p)


def no_patches(p: PatchProblem, layout: PatchLayout, product: str, images_at: int) -> str:
    """Why the copy engine can't cut the image into patches for wgmma."""
    engine = no_copy_engine(p, layout, images_at, group_of(p, layout))
    return next(filter(None, (no_operands(p, product), *engine, no_padded_rows(p, layout))), "")


def no_copied(p: PatchProblem, layout: PatchLayout, product: str, images_at: int) -> tuple[str, int]:
    """Why threads can't copy patches for wgmma; and how many bytes at a time they do, 16 or 4."""
    why, chunk = no_copy(p, layout, product, images_at)
    return no_operands(p, product) or why, 16 if chunk == 16 else 4


def no_padded_rows(p: PatchProblem, layout: PatchLayout) -> str:
    """Why elements of padded rows can't be normalised: theirs is the channel k % C."""
    row = padded_row(layout)
    if not layout.channels_last or row % p.C == 0 or not scaling(p, "half")[0]:
        return ""
    return f"normalised patch rows of {layout.P[2]} elements, padded to {row}, no multiple of {p.C} channels"


def no_stores(p: PatchProblem) -> str:
    """Why the copy engine can't store the tokens (csrc/forward/epilogue_sm90.cuh)."""
    reasons = (
        (
            p.out_dtype not in (p.compute_dtype, torch.float32),
            f"tokens are {p.out_dtype}, neither {p.compute_dtype} nor torch.float32",
        ),
        (p.D % 8 != 0, f"D = {p.D} is no multiple of 8"),
    )
    return next((text for wrong, text in reasons if wrong), "")


def shared_positions(p: PatchProblem) -> bool:
    """Whether there are positions, and patches of the same place in the grid have the same."""
    table = p.tensors[3]
    return table is not None and table.strides[0] == 0 and p.n_keep is None


def own_positions(p: PatchProblem) -> bool:
    """Whether there are others: those of kept patches, or a table of each image."""
    return p.pos_rows > 0 and not shared_positions(p)


def no_own_positions(p: PatchProblem, pos_at: int) -> str:
    """Why these can't be loaded two channels at a time."""
    table = p.tensors[3]
    assert table is not None
    image, row, channel = table.strides
    pairs = channel == 1 and image % 2 == row % 2 == 0 and pos_at % (2 * table.dtype.itemsize) == 0
    reasons = (
        (
            table.dtype not in (p.compute_dtype, torch.float32),
            f"each patch's positions are {table.dtype}, neither {p.compute_dtype} nor torch.float32",
        ),
        (not pairs, "each patch's positions can't be loaded two channels at a time"),
    )
    return next((text for wrong, text in reasons if wrong), "")
