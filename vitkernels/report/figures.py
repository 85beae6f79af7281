"""The report's figures, as PNG and SVG: bars beside the peers, rooflines, whole models before and after."""

from __future__ import annotations

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from PIL import Image
except ImportError as error:
    raise ImportError("figures need matplotlib: pip install matplotlib, or leave them out by --no-figures") from error

from .labels import MODES, TIMINGS, case_words, dtype_words, how_words, impl_words, small_print
from .results import Entry, Results, Row, times
from .summary import order, rank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, ACCENT = "#1f2430", "#667080", "#e4572e"  # as in demo/figure.py, whose imports a table need not have
OURS_TOO, BEST, PEER, LINE = "#f2a48f", "#3f6797", "#93b1d1", "#c9d8e8"
MARKERS = "sD^vP<>Xphd*"
WIDTH, SMALL, PANELS = 11.0, 9, 12  # inches; points; cases of a figure
SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: small, searched, and read aloud
    "svg.hashsalt": "vitkernels",  # the same results give the same file
    "text.parse_math": False,  # a $ in a command is a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": SMALL,
}


def draw(results: Results, folder: Path, progress: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Write all figures: [{"title", "files": [png, svg], "svg": its text}]."""
    drawn, names = [], set[str]()
    for name, title, make in _figures(results):
        progress(title)
        while name in names:
            name += "-"
        names.add(name)
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a foreign script, in a name
            figure = make()
            files = [folder / f"{name}.png", folder / f"{name}.svg"]
            pixels = BytesIO()
            figure.savefig(pixels, dpi=110)
            # A palette: a quarter of the bytes, which counts in a repository.
            Image.open(pixels).convert("RGB").quantize(128).save(files[0], optimize=True)
            text = StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
        files[1].write_text(text.getvalue(), encoding="utf-8")
        drawn.append({"title": title, "files": [str(file) for file in files], "svg": text.getvalue()})
    return drawn


def _figures(results: Results) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Name, title and maker of each figure: per device, bars of each mode and timing, then a roofline of each mode."""
    entries = sorted((e for e in results.entries if e.ours), key=lambda e: (e.model, rank(e.mode), e.timing, order(e)))
    devices = list(dict.fromkeys(row["device"] for row in results.rows))
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        place = f"-{devices.index(entry.device) + 1}" if len(devices) > 1 else ""
        if any(row["images_per_s"] for row in entry.rows.values()):
            how = how_words(entry.mode, entry.timing)
            title = f"Whole models, {how[0].lower()}{how[1:]}" if entry.model else how
            name = f"{'models' if entry.model else 'throughput'}{place}-{entry.mode}-{entry.timing}"
            groups.setdefault((name, f"{title}: images a second", bars), []).append(entry)
    for entry in entries:
        place = f"-{devices.index(entry.device) + 1}" if len(devices) > 1 else ""
        if _points(entry):
            mode = MODES.get(entry.mode, entry.mode)
            groups.setdefault((f"roofline{place}-{entry.mode}", f"Roofline: {mode}", roofline), []).append(entry)
    for (name, title, make), group in groups.items():
        size = len(group)
        if make is bars:  # figures of like size, of an even number of panels
            size = -(-size // -(-size // PANELS))
            size += size % 2
        cuts = [group[i : i + size] for i in range(0, len(group), size)]
        for i, part in enumerate(cuts, 1):
            number, of = (f"-{i}", f" ({i} of {len(cuts)})") if len(cuts) > 1 else ("", "")
            yield _slug(name + number), title + of, partial(make, part, title + of, results)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80]


def _frame(inches: float, title: str, below: str, entries: Sequence[Entry], results: Results) -> tuple[Figure, float]:
    """A figure with room for `inches` of panels between its title and its small print; and where these begin, from the
    top, in inches."""
    facts, commands = small_print([results.runs[i] for i in sorted({entry.run for entry in entries})])
    lines = textwrap.wrap(facts, 140) + textwrap.wrap(commands, 140, max_lines=4, placeholder=" …")
    foot, head = 0.17 * len(lines) + 0.25, 1.32
    figure = Figure(figsize=(WIDTH, head + inches + foot), facecolor="white")
    height = head + inches + foot
    figure.text(0.3 / WIDTH, 1 - 0.42 / height, title, fontsize=15, weight="bold", color=INK)
    figure.text(0.3 / WIDTH, 1 - 0.7 / height, below, fontsize=10, color=GREY)
    figure.text(0.3 / WIDTH, 0.13 / height, "\n".join(lines), fontsize=SMALL, color=GREY, linespacing=1.35)
    return figure, head


def _legend(figure: Figure, handles: list, columns: int) -> None:
    top = 1 - 0.8 / figure.get_figheight()
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.3 / WIDTH, top), ncols=columns, frameon=False, fontsize=10,
        labelcolor=INK, borderpad=0, borderaxespad=0, handlelength=1.2, handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


def _panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at inches from the figure's left and top."""
    full = figure.get_figheight()
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / full, width / WIDTH, height / full))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=GREY, labelsize=SMALL)
    axes.set_facecolor("none")
    return axes


def _title(figure: Figure, left: float, top: float, title: str) -> None:
    """A panel's title, its lower edge at `top` inches."""
    words = textwrap.shorten(title, 66, placeholder=" …")
    y = 1 - top / figure.get_figheight()
    figure.text(left / WIDTH, y, words, fontsize=10, weight="bold", color=INK, va="bottom")


# --- Bars.


def bars(entries: Sequence[Entry], title: str, results: Results) -> Figure:
    """A panel a case, a bar an implementation, from zero; each panel has its own scale."""
    label, bar, gap, row = 1.62, 3.45, 0.3, 0.2  # inches
    shown = [_timed(entry) for entry in entries]
    pairs = [max(len(rows) for rows in shown[i : i + 2]) for i in range(0, len(shown), 2)]
    model = entries[0].model
    below = "Each case on its own scale, from zero. Right of a bar: images a second, and "
    below += "times as many as before." if model else "how many times the best peer's."
    figure, top = _frame(sum(n * row + 0.52 for n in pairs), title, below, entries, results)
    names = ("ours", "before") if model else ("ours", "the best peer")
    handles: list = [Patch(color=c, label=n) for c, n in zip((ACCENT, BEST), names, strict=True)]
    roles = {r["role"] for rows in shown for r in rows}
    if not model and any(len(entry.peers) > 1 for entry in entries):
        handles.append(Patch(color=PEER, label="other peers"))
    if "version" in roles or any(sum(r["role"] == "ours" for r in rows) > 1 for rows in shown):
        handles.append(Patch(color=OURS_TOO, label="another of ours"))
    handles.append(Line2D([], [], color=INK, lw=1.2, label="20th to 80th percentile"))
    _legend(figure, handles, len(handles))
    for i, (entry, rows) in enumerate(zip(entries, shown, strict=True)):
        left = 0.3 + (label + bar + gap) * (i % 2)
        _title(figure, left, top + 0.18, entry.title)
        axes = _panel(figure, left + label, top + 0.25, bar, len(rows) * row)
        _bars(axes, entry, rows, room=1.45 / bar)
        if i % 2:
            top += pairs[i // 2] * row + 0.52
    return figure


def _timed(entry: Entry) -> list[Row]:
    """Ours, then the others in the order of the words; what has no time too."""
    rows = [row for row in entry.rows.values() if row["role"] != "ceiling"]
    return sorted(rows, key=lambda row: (row is not entry.ours, row["role"] != "ours", row["role"] != "version"))


def _bars(axes: Axes, entry: Entry, rows: list[Row], room: float) -> None:
    ends = [_rate(row, "p20") for row in rows if row["ms"] and row["images_per_s"]]
    limit = max(ends, default=1.0) / (1 - room)
    best = entry.best
    for y, row in enumerate(rows):
        if not (row["ms"] and row["images_per_s"]):
            axes.text(0, y, "no time", va="center", fontsize=SMALL, color=GREY, style="italic")
            continue
        own = row["role"] in ("ours", "version")
        colour = ACCENT if row is entry.ours else OURS_TOO if own else BEST if best and row is best[0] else PEER
        low, high = _rate(row, "p80"), _rate(row, "p20")
        axes.barh(y, row["images_per_s"], height=0.72, color=colour)
        axes.plot([low, high], [y, y], color=INK, lw=1.2, solid_capstyle="butt")
        words = f"{row['images_per_s']:,.0f}" if row["images_per_s"] >= 100 else f"{row['images_per_s']:.3g}"
        if best and entry.ours:
            words += f"\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}{best[1] / times(row, entry.ours)[0]:.2f} ×"
        strong = "bold" if row is entry.ours else "normal"
        axes.annotate(words, (max(high, row["images_per_s"]), y), (5, 0), textcoords="offset points", va="center",
                      fontsize=SMALL, color=INK, weight=strong)  # fmt: skip
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    names = [_name(row, entry) for row in rows]
    axes.set_yticks(range(len(rows)), [textwrap.shorten(name, 24, placeholder="…") for name in names], color=INK)


def _rate(row: Row, quantile: str) -> float:
    return row["images_per_s"] * row["ms"]["median"] / row["ms"].get(quantile, row["ms"]["median"])


def _name(row: Row, entry: Entry) -> str:
    if row is entry.ours and not entry.model:
        return f"ours ({row['backend'] or row['impl']})"
    return impl_words(row["impl"])


# --- Roofline.


def _points(entry: Entry) -> list[Row]:
    rows = (row for row in entry.rows.values() if row["role"] != "ceiling" and row["ms"])
    return [row for row in rows if row["flops"] and row["bytes"]]


def roofline(entries: Sequence[Entry], title: str, results: Results) -> Figure:
    """A panel per dtype and timing: TFLOP/s over FLOP per compulsory byte, a point per case and implementation."""
    panels: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (order(e)[1], e.timing)):  # a dtype's timings beside each other
        panels.setdefault((entry.first["dtype"], entry.timing), []).append(entry)
    impls = list(dict.fromkeys(row["impl"] for entry in entries for row in _points(entry) if row is not entry.ours))
    styles = {name: (MARKERS[i % len(MARKERS)], PEER if i % 2 else BEST) for i, name in enumerate(impls)}
    for row in (row for entry in entries for row in _points(entry) if row["role"] in ("ours", "version")):
        if row["impl"] in styles:
            styles[row["impl"]] = styles[row["impl"]][0], OURS_TOO
    lines = -(-(len(impls) + 1) // 5)  # of the legend
    step = 4.8
    below = "Arithmetic over the bytes that must move, against what was reached."
    if any(ceilings(group) != (None, None) for group in panels.values()):
        below += " The lines: a copy and a bare product, measured beside it."
    figure, top = _frame(-(-len(panels) // 2) * step + 0.2 * lines - 0.2, title, below, entries, results)
    handles = [Line2D([], [], ls="", marker="o", ms=8, color=ACCENT, label="ours")]
    for name, (marker, colour) in styles.items():
        handles.append(Line2D([], [], ls="", marker=marker, ms=6, mfc="none", mec=colour, label=impl_words(name)))
    _legend(figure, handles, 5)
    for i, ((dtype, timing), group) in enumerate(panels.items()):
        left, at = 0.95 + 5.35 * (i % 2), top - 0.2 + 0.2 * lines + step * (i // 2)
        _title(figure, left, at + 0.18, f"{dtype}, {TIMINGS.get(timing, timing)}")
        _roof(_panel(figure, left, at + 1.1, 4.35, 3.1), group, styles)
    return figure


def ceilings(entries: Sequence[Entry]) -> tuple[float | None, float | None]:
    """GB/s and TFLOP/s measured in the same processes: the rows' own peaks, else the fastest copy and product."""
    rows = [row for entry in entries for row in entry.rows.values()]

    def most(peak: str, impl: str, rate: str) -> float | None:
        given = [row[peak] for row in rows if row[peak]]
        return max(given or [row[rate] for row in rows if row["impl"] == impl and row[rate]], default=None)

    return most("peak_gb_per_s", "copy", "gb_per_s"), most("peak_tflops", "gemm", "tflops")


def _roof(axes: Axes, entries: Sequence[Entry], styles: dict[str, tuple[str, str]]) -> None:
    points = [(row["flops"] / row["bytes"], row["tflops"], row, entry) for entry in entries for row in _points(entry)]
    copy, product = ceilings(entries)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    ridge = [product / copy * 1e3] if copy and product else []
    left, right = min(xs + ridge) / 1.9, max(xs + ridge) * 1.9
    low, high = min(ys) / 1.8, max([*ys, product or 0]) * 1.9
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(color=LINE, lw=0.5, zorder=0)
    axes.set_xlabel("FLOP per byte", fontsize=SMALL, color=GREY, loc="left")
    axes.set_ylabel("TFLOP/s", fontsize=SMALL, color=GREY)
    if copy:
        end = min(right, product / copy * 1e3) if product else right
        axes.plot([left, end], [left * copy / 1e3, end * copy / 1e3], color=INK, lw=1.4, zorder=2)
    if product:
        axes.plot([product / copy * 1e3 if copy else left, right], [product] * 2, color=INK, lw=1.4, zorder=2)
    roofs = [f"copy {copy:,.0f} GB/s"] if copy else []
    roofs += [f"product {product:,.{'0f' if product >= 1000 else '3g'}} TFLOP/s"] if product else []
    said = " · ".join(roofs) or "no ceilings were measured"
    axes.text(1, -0.095, said, transform=axes.transAxes, ha="right", va="top", fontsize=SMALL, color=INK)
    for x, y, row, entry in points:
        if row is entry.ours:
            axes.plot(x, y, ls="", marker="o", ms=7, color=ACCENT, mec="white", mew=0.7, zorder=5)
        else:
            marker, colour = styles[row["impl"]]
            axes.plot(x, y, ls="", marker=marker, ms=4.5, mfc="none", mec=colour, mew=0.9, zorder=3)
    _shapes(axes, [(x, entry) for x, _, row, entry in points if row is entry.ours], math.log(right / left) / 4.35)


def _shapes(axes: Axes, points: list[tuple[float, Entry]], inch: float) -> None:
    """The shapes' names above the panel, one where several would stand on each other. `inch`: ln x of one."""
    clusters: list[list[tuple[float, str]]] = []
    for x, entry in sorted(points, key=lambda point: point[0]):
        pixels, arrow, _ = dtype_words(entry.first).partition(" → ")
        shape = case_words(entry.case).partition(" · ")[0].removeprefix("ViT-")
        name = f"{shape} B {entry.first['batch']}" + f" {pixels}" * bool(arrow)
        if clusters and math.log(x / clusters[-1][0][0]) < 0.27 * inch:
            clusters[-1].append((x, name))
        else:
            clusters.append([(x, name)])
    for cluster in clusters:
        names = list(dict.fromkeys(name for _, name in cluster))
        said = textwrap.shorten(names[0], 16, placeholder="…") + f" +{len(names) - 1}" * (len(names) > 1)
        axes.text(
            cluster[0][0], 1.02, said, transform=axes.get_xaxis_transform(), rotation=35, rotation_mode="anchor",
            ha="left", va="bottom", fontsize=SMALL, color=GREY,
        )  # fmt: skip
