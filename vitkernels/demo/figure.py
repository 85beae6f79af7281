"""The demonstration's picture: what a patch embedding does to a photograph, and where its time goes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .run import Demonstration

INK, GREY, ACCENT = "#1f2430", "#667080", "#e4572e"
STEP_COLOURS = ("#c9d8e8", "#93b1d1", "#3f6797", "#8479b5", "#bdb5db")


def draw(shown: Demonstration, where: str, path: Path) -> None:
    """Draw to `path`; `where` names the machine that was timed."""
    figure = Figure(figsize=(16, 8.2), dpi=100, facecolor="white")
    _, height, width, _ = shown.images.shape
    _, rows, channels = shown.tokens.shape
    grid = (height // shown.patch[0], width // shown.patch[1])
    T = rows - grid[0] * grid[1]

    figure.text(0.03, 0.93, "Pixels in, tokens out", fontsize=23, weight="bold", color=INK)
    figure.text(
        0.03, 0.884,
        f"{shown.model}: a photograph of {height} × {width} uint8 pixels, read where the decoder left it, "
        f"becomes {rows} tokens of {channels} channels in one call",
        fontsize=13, color=GREY,
    )  # fmt: skip
    left, panels = 0.48, []  # inches, as all panels are as high as the square ones
    for inches in (3.27, 4.37, 3.27, 3.27):
        panels.append(figure.add_axes((left / 16, 2.98 / 8.2, inches / 16, 3.27 / 8.2), anchor="NW"))
        left += inches + 0.36
    patches, matrix, colours, positions = panels

    _title(patches, "Patches", f"{grid[0]} × {grid[1]} of them, {shown.patch[0]} × {shown.patch[1]} pixels each")
    P_h, P_w = shown.patch
    pixels = shown.images[0, : grid[0] * P_h, : grid[1] * P_w].reshape(grid[0], P_h, grid[1], P_w, 3).swapaxes(1, 2)
    patches.imshow(_mosaic(pixels / 255, gap=max(2, P_h // 5)), interpolation="antialiased")

    _title(matrix, "Tokens", "a row each")
    _matrix(matrix, shown.tokens[0], T, shown.prefix)

    _title(colours, "Tokens on the grid", "their principal components as colours")
    components = _components(shown.tokens[:, T:] - shown.pos_embed)[0].reshape(*grid, 1, 1, 3)
    colours.imshow(_mosaic(np.repeat(np.repeat(components, P_h, 2), P_w, 3), gap=max(2, P_h // 5)))

    _title(positions, "Positions", "cosine similarity; a 2-D sin-cos table")
    positions.imshow(_similarities(shown.pos_embed, grid), cmap="magma", interpolation="nearest")

    for axes in (patches, colours, positions):
        axes.set_axis_off()
    _times(figure.add_axes((0.125, 0.138, 0.86, 0.135)), shown)
    figure.text(0.03, 0.291, "Where the front end's time goes", fontsize=14, weight="bold", color=INK)
    foot = (
        f"Medians; a batch of {len(shown.images)}, {shown.dtype}, backend {shown.backend}, on {where}.\n"
        f"The weights are random. The front end is {shown.share:.2%} of the model's operations. "
        f"Photograph: {shown.credits[0]}."
    )
    figure.text(0.03, 0.022, foot, fontsize=10.5, color=GREY, linespacing=1.5)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette: less than half the bytes, which counts in a README."""
    memory = BytesIO()
    figure.savefig(memory)
    image = Image.open(memory).convert("RGB")
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=14, weight="bold", color=INK, pad=26)
    _above(axes, 0, below, color=GREY)


def _above(axes: Axes, x: float, text: str, **options: Any) -> None:
    axes.annotate(text, (x, 1), (0, 7), "axes fraction", "offset points", fontsize=10.5, va="bottom", **options)


def _mosaic(tiles: np.ndarray, gap: int) -> np.ndarray:
    """[rows, columns, h, w, ...] -> one image, tiles apart by `gap` pixels of white (NaN where there is no colour)."""
    rows, columns, h, w, *colour = tiles.shape
    canvas = np.full((rows, h + gap, columns, w + gap, *colour), 1.0 if colour else np.nan)
    canvas[:, :h, :, :w] = tiles.swapaxes(1, 2)
    return canvas.reshape(rows * (h + gap), columns * (w + gap), *colour)[:-gap, :-gap]


def _matrix(axes: Axes, tokens: np.ndarray, T: int, prefix: str) -> None:
    limit = np.percentile(np.abs(tokens), 99)
    axes.imshow(tokens, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([0, tokens.shape[1] - 1], ["channel 0", str(tokens.shape[1] - 1)], fontsize=10, color=GREY)
    axes.tick_params(length=0)
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    if T:
        axes.add_patch(Rectangle((-0.5, -0.5), tokens.shape[1], T, fill=False, ec=ACCENT, lw=1.5, clip_on=False))
        _above(axes, 1, f"{prefix} ▾", color=ACCENT, ha="right")


def _components(tokens: np.ndarray) -> np.ndarray:
    """Tokens [B, N, D] -> their three principal components over all photographs, spread over 0…1."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    parts = flat @ vectors[:, -3:]
    low, high = np.percentile(parts, (2, 98), axis=0)
    return np.clip((parts - low) / (high - low), 0, 1).reshape(*tokens.shape[:2], 3)


def _similarities(pos_embed: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Every other patch's similarity with all, as one mosaic: the figure 7 of https://arxiv.org/abs/2010.11929."""
    unit = pos_embed / np.linalg.norm(pos_embed, axis=1, keepdims=True)
    similarity = (unit @ unit.T).reshape(*grid, *grid)
    some = [np.linspace(0, G - 1, min(G, 7)).round().astype(int) for G in grid]
    return _mosaic(similarity[np.ix_(*some)], gap=2)


def _times(axes: Axes, shown: Demonstration) -> None:
    before, after = shown.front_end
    total = sum(shown.chain.values())
    start = 0.0
    for (name, time), colour in zip(shown.chain.items(), STEP_COLOURS, strict=True):
        label = f"{name} {time:.2f}"
        axes.barh(1, time, left=start, height=0.72, color=colour, edgecolor="white", linewidth=1.5, label=label)
        start += time
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.005, 1.06), ncols=len(shown.chain), frameon=False, fontsize=11,
        labelcolor=INK, handlelength=0.9, handleheight=0.9, handletextpad=0.5, columnspacing=1.8, borderpad=0,
    )  # fmt: skip
    axes.barh(0, after.median, height=0.72, color=ACCENT)
    for y, spread, end in ((1, before, total), (0, after, after.median)):
        axes.text(end, y, f"  {spread.median:.2f} ms", va="center", fontsize=12, weight="bold", color=INK)
    axes.set_yticks([1, 0], ["eager chain", "one call"], fontsize=12.5, color=INK)
    axes.set_xlim(0, 1.09 * max(total, after.median))
    axes.set_ylim(-0.45, 1.45)
    axes.set_xlabel("milliseconds, uint8 pixels → tokens", fontsize=10.5, color=GREY)
    axes.tick_params(length=0, labelcolor=GREY, axis="x")
    axes.tick_params(length=0, axis="y")
    axes.spines[:].set_visible(False)
