"""What is said about results: ours against the best peer, the worst rows, tables for a page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .labels import DTYPES, MODES, WORDS, dtype_words, how_words, impl_words, parts, small_print
from .results import Entry, Results, Row, times


def order(entry: Entry) -> tuple:
    """Dtype and pixels, then size: how cases are listed and drawn."""
    named, row = parts(entry.case), entry.first
    at = [DTYPES.index(d) if d in DTYPES else -1 if d == "uint8" else 9 for d in (row["dtype"], row["pixels"])]
    shape = named.get("dim", 0), named.get("image", ""), named.get("patch", ""), row["batch"] or 0
    return entry.device, *at, "frames" in named, "keep" in named, *shape, entry.case, entry.run


def rank(mode: str) -> int:
    return list(MODES).index(mode) if mode in MODES else len(MODES)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))


def summary(results: Results) -> list[dict[str, Any]]:
    """The best peer's time over ours, a row per device, mode, timing, and dtype with pixels: the geometric mean over
    the cases in which both have a time, the least, the greatest, and in how many ours is faster."""
    groups: dict[tuple, list[float]] = {}
    for entry in sorted(results.entries, key=lambda e: (order(e)[0], rank(e.mode), e.timing, order(e))):
        if entry.best:
            key = entry.device, entry.mode, entry.timing, dtype_words(entry.first), entry.model
            groups.setdefault(key, []).append(entry.best[1])
    return [
        dict(zip(("device", "mode", "timing", "dtype", "model"), key, strict=True))
        | {"cases": len(v), "geometric_mean": geometric_mean(v), "least": min(v), "greatest": max(v),
           "faster": sum(x > 1 for x in v)}
        for key, v in groups.items()
    ]  # fmt: skip


def worst(results: Results, count: int = 10) -> list[Entry]:
    """The entries in which ours does worst against the best peer, the worst first."""
    return sorted((e for e in results.entries if e.best), key=lambda e: e.best[1] if e.best else 0)[:count]


def errors(results: Results) -> list[Row]:
    """Rows without a time; ours first."""
    return sorted((row for row in results.rows if row["error"]), key=lambda row: row["role"] != "ours")


def markdown(results: Results) -> str:
    """Tables, one per mode and timing: the case in words, our median in ms, and how many times as long each
    peer takes; below, where and by what they were measured."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in sorted(results.entries, key=lambda e: (order(e)[0], rank(e.mode), e.timing, order(e))):
        if entry.ours and entry.ours["ms"]:
            groups.setdefault((entry.device, entry.mode, entry.timing), []).append(entry)
    devices = {device for device, *_ in groups}
    blocks = []
    for (device, mode, timing), entries in groups.items():
        present = {row["impl"] for entry in entries for row in entry.peers}
        peers = [name for name in WORDS if name in present] + sorted(present - WORDS.keys())
        lines = [how_words(mode, timing) + f", {device}" * (len(devices) > 1) + ":", ""]
        lines += ["| | one call, ms | " + " | ".join(map(impl_words, peers)) + " |", "| --- " * (len(peers) + 2) + "|"]
        for entry in entries:
            assert entry.ours
            ms = entry.ours["ms"]["median"]
            cells = [entry.title, f"{ms:#.3g}" if ms < 100 else f"{ms:,.0f}"]
            for name in peers:
                row = entry.rows.get(name)
                cells.append(f"{times(row, entry.ours)[0]:.2f} ×" if row and row["ms"] else "–")
            lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
        blocks.append("\n".join(lines))
    pairs = ((row, e.ours) for e in results.entries if e.ours and e.ours["ms"] for row in e.peers if row["ms"])
    spreads = sorted(times(*pair)[1] for pair in pairs) or [0.0]
    spread = f" Ratios spread by ±{math.expm1(spreads[len(spreads) // 2]):.0%} (half of p20 to p80, the median row)."
    facts, commands = small_print(results.runs)
    return "\n\n".join([*blocks, f"{facts}; `{commands}`.{spread}"])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")
