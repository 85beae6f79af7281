"""What got slower: against an older run by what was timed beside it, or against another version in the same rounds.

Milliseconds of two runs can't be compared on a machine that others use, or whose clock moves. What can is ours over the
yardsticks of the same rounds: the peers, the device copy and the bare product. With r the yardstick's time over ours,

    change = geometric mean over the yardsticks present in both runs of r_old / r_new       1.1: 10 % slower than it was
    band   = the greater of the floor and √(h_old² + h_new² + e²)                           all as logarithms

where h is half the spread of r from p20 to p80, the mean over the yardsticks, and e the standard error of the mean of
ln(r_old / r_new): where the yardsticks disagree on what happened, one of them may have changed, and not ours. An empty
launch is no yardstick: its microsecond says nothing about the shape.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .results import Entry, Results, Row, times

FLOOR = 0.05
FAILED = ("slower", "lost")


def compare(new: Results, old: Results, floor: float = FLOOR) -> list[dict[str, Any]]:
    """A row per row of ours in `new`, then per row of ours that only `old` has: "case", "mode", "timing", "impl",
    "verdict" (slower, lost, faster, same, new, missing, no yardstick), "change", "band" (0.05: 5 %), "yardsticks".

    Rows are matched by device, case, mode, timing and implementation; of several, in the file of the same name, else
    the last. Slower and lost (a time then, an error now) are regressions. ValueError: nothing to match.
    """
    floor = _checked(floor)
    before: dict[tuple, list[tuple[str, Entry, Row]]] = {}
    for file, entry, row in _ours(old):
        before.setdefault((*entry.key, row["impl"]), []).append((file, entry, row))
    found, met = [], set()
    for file, entry, row in _ours(new):
        key = *entry.key, row["impl"]
        line = _line(entry, row)
        if key in before:
            there = [each for each in before[key] if each[0] == file] or before[key]
            line |= _judged(entry, row, *there[-1][1:], floor)
            met.add(key)
        elif row["ms"]:
            line["verdict"] = "new"
        else:
            continue  # an error that has no past is no change
        found.append(line)
    if not met:
        devices = " and ".join(sorted({row["device"] for row in (*new.rows, *old.rows)}))
        raise ValueError(f"no row of ours is in both: {len(new.rows)} and {len(old.rows)} rows, of {devices}")
    for key in before.keys() - met:
        _, entry, row = before[key][-1]
        found.append(_line(entry, row) | {"verdict": "missing", "ms": None, "old_ms": _median(row)})
    return sorted(found, key=_severity)


def regressions(rows: list[Row], floor: float = FLOOR) -> list[dict[str, Any]]:
    """`auto` against each "auto@NAME" of the same rounds: rows as `compare` gives them, with "against" the name.

    The change is the paired ratio itself; the band the greater of `floor` and half its spread.
    """
    floor = _checked(floor)
    found = []
    for entry in Results([{"file": ""}] * (1 + max((r["run"] for r in rows), default=0)), rows, []).entries:
        ours = entry.rows.get("auto")
        for name, theirs in entry.rows.items():
            if not (ours and name.startswith("auto@") and (theirs["ms"] or ours["ms"])):
                continue
            line = _line(entry, ours) | {"against": name[5:], "old_ms": _median(theirs), "yardsticks": [name]}
            if not ours["ms"]:
                line |= {"verdict": "lost", "error": ours["error"]}
            elif not theirs["ms"]:
                line["verdict"] = "new"
            else:
                ratio, spread = times(theirs, ours)
                line |= _verdict(-math.log(ratio), max(math.log1p(floor), spread))
            found.append(line)
    return sorted(found, key=_severity)


def _checked(floor: float) -> float:
    if not (math.isfinite(floor) and floor >= 0):
        raise ValueError(f"the floor of the noise band must be a share of at least 0, as 0.05 for 5 %; got {floor}")
    return floor


def _ours(results: Results) -> Iterator[tuple[str, Entry, Row]]:
    for entry in results.entries:
        for row in entry.rows.values():
            if row["role"] == "ours":
                yield Path(results.runs[entry.run]["file"]).name, entry, row


def _median(row: Row) -> float | None:
    return row["ms"] and row["ms"]["median"]


def _line(entry: Entry, row: Row) -> dict[str, Any]:
    names = {name: getattr(entry, name) for name in ("device", "case", "mode", "timing", "title")}
    blank: Row = {"old_ms": None, "change": None, "band": None, "yardsticks": []}
    return names | {"impl": row["impl"], "ms": _median(row)} | blank


def _judged(entry: Entry, row: Row, old_entry: Entry, old_row: Row, floor: float) -> dict[str, Any]:
    line: dict[str, Any] = {"old_ms": _median(old_row)}
    if not row["ms"]:
        return line | ({"verdict": "lost", "error": row["error"]} if old_row["ms"] else {"verdict": "same"})
    if not old_row["ms"]:
        return line | {"verdict": "new"}
    names = [
        name
        for name, yard in entry.rows.items()
        if yard["role"] in ("peer", "ceiling") and name != "empty" and yard["ms"]
        if (was := old_entry.rows.get(name)) and was["ms"]
    ]
    if not names:
        return line | {"verdict": "no yardstick"}
    now = [times(entry.rows[name], row) for name in names]
    then = [times(old_entry.rows[name], old_row) for name in names]
    changes = [math.log(b[0] / a[0]) for a, b in zip(now, then, strict=True)]
    doubt = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
    spreads = (statistics.fmean(half for _, half in side) for side in (now, then))
    band = max(math.log1p(floor), math.hypot(*spreads, doubt))
    return line | {"yardsticks": names} | _verdict(statistics.fmean(changes), band)


def _verdict(change: float, band: float) -> dict[str, Any]:
    verdict = "slower" if change > band else "faster" if change < -band else "same"
    return {"verdict": verdict, "change": math.exp(change), "band": math.expm1(band)}


def _severity(line: dict[str, Any]) -> tuple:
    ranks = ("lost", "slower", "no yardstick", "missing", "same", "faster", "new")
    return ranks.index(line["verdict"]), -(line["change"] or 0), line["case"], line["mode"], line["timing"]
