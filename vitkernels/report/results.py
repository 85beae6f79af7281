"""Results files into rows and entries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .labels import case_words, parts, scalars

Row = dict[str, Any]
Run = dict[str, Any]  # {"file", "header"}

OURS = ("auto", "triton", "cuda", "reference", "fused", "uint8")  # the first that is there speaks for us
BEFORE = ("before", "float")  # what a fused model, and uint8 pixels into one, are held against
CEILINGS = ("copy", "gemm", "empty")
NUMBERS = (
    "images_per_s", "gb_per_s", "tflops", "bytes", "flops", "roofline_share", "peak_gb_per_s", "peak_tflops", "peak_mb",
    "batch",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One case, mode and timing of one run: rows by implementation. An implementation that was sampled again replaces
    its earlier row; a ratio stays that of its own rounds."""

    run: int
    device: str
    case: str
    mode: str
    timing: str
    rows: dict[str, Row] = field(default_factory=dict)
    note: str = ""  # what tells it from another run's entry of the same case

    @property
    def key(self) -> tuple[str, ...]:
        return self.device, self.case, self.mode, self.timing

    @property
    def model(self) -> bool:
        return any(row["role"] != "ceiling" and row["model"] for row in self.rows.values())

    @cached_property
    def first(self) -> Row:
        return next(iter(self.rows.values()))

    @cached_property
    def ours(self) -> Row | None:
        """`auto`, or what else of ours was timed: whether it has a time or an error."""
        return next((self.rows[name] for name in OURS if name in self.rows), None)

    @cached_property
    def peers(self) -> list[Row]:
        return [row for row in self.rows.values() if row["role"] == "peer"]

    @cached_property
    def best(self) -> tuple[Row, float, float] | None:
        """The fastest peer, its time over ours, and the half spread of that as a logarithm; None where a time lacks."""
        timed = [(row, *times(row, self.ours)) for row in self.peers if self.ours and self.ours["ms"] and row["ms"]]
        return min(timed, key=lambda found: found[1], default=None)

    @property
    def title(self) -> str:
        words = case_words(self.case, self.first["dtype"], self.first["batch"])
        return f"{words} ({self.note})" if self.note else words


@dataclass(frozen=True)
class Results:
    runs: list[Run]
    rows: list[Row]  # as in the file, numbers checked; with "run" (index of `runs`), "role", "pixels" and "device"
    skipped: list[tuple[str, str]]  # file, why

    def add(self, file: str, header: dict[str, Any], rows: list[Row], left: int = 0) -> None:
        if left:
            self.skipped.append((file, f"{left} of its rows are of another kind"))
        device = str(header.get("gpu") or header.get("cpu") or "unknown device")
        if environment := scalars(header.get("environment")):
            device += f", {environment}"
        for row in rows:
            row |= {"run": len(self.runs), "device": device}
        self.runs.append({"file": file, "header": header})
        self.rows.extend(rows)

    @cached_property
    def entries(self) -> list[Entry]:
        found: dict[tuple, Entry] = {}
        for row in self.rows:
            key = row["run"], row["device"], row["case"], row["mode"], row["timing"]
            found.setdefault(key, Entry(*key)).rows[row["impl"]] = row
        alike: dict[tuple, int] = {}
        for entry in found.values():
            alike[entry.key] = alike.get(entry.key, 0) + 1
        notes = [Path(run["file"]).stem for run in self.runs]
        notes = [note if notes.count(note) == 1 else run["file"] for note, run in zip(notes, self.runs, strict=True)]
        return [replace(e, note=notes[e.run]) if alike[e.key] > 1 else e for e in found.values()]


# --- Reading.


def load(paths: Iterable[str | Path], progress: Callable[[str], None] = lambda text: None) -> Results:
    """All rows of results files, and of those in and below folders. ValueError: a named file that is none, or no rows.

    A results file is `{"header": {...}, "rows": [...]}` or pytest-benchmark's JSON with a row in each `extra_info`.
    """
    results = Results([], [], [])
    seen = set()
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            progress(str(file))
            try:
                header, rows, left = _parse(_clean(json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if not path.is_dir():
                    raise ValueError(f"{file} is no results file: {error}") from error
                results.skipped.append((str(file), str(error)))
                continue
            results.add(str(file), header, rows, left)
    if not results.rows:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}: {len(results.skipped)} files were skipped")
    return results


def read(data: Any, file: str = "this run") -> Results:
    """What a results file holds, of a run that is still in memory."""
    results = Results([], [], [])
    results.add(file, *_parse(_clean(data)))
    return results


def _parse(data: Any) -> tuple[dict[str, Any], list[Row], int]:
    """Header, rows, and how many rows are not of the schema. ValueError where it is no results file."""
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    if isinstance(benchmarks := data.get("benchmarks"), list) and "machine_info" in data:
        header: Any = data["machine_info"].get("vitkernels", {})
        raw: Any = [b["extra_info"]["row"] for b in benchmarks if "row" in (b.get("extra_info") or {})]
        if benchmarks and not raw:
            raise ValueError("pytest-benchmark's, of other benchmarks")
    else:
        header, raw = data.get("header"), data.get("rows")
    if not isinstance(header, dict) or not isinstance(raw, list):
        raise ValueError('no "header" and "rows"')
    rows = [row for row in map(_row, raw) if row]
    return header, rows, len(raw) - len(rows)


def _row(raw: Any) -> Row | None:
    if not isinstance(raw, dict) or not all(isinstance(raw.get(k), str) for k in ("case", "mode", "impl", "timing")):
        return None
    ms = _quantiles(raw.get("ms"))
    if "ms" not in raw or (ms is None and raw["ms"] is not None):
        return None
    named, impl = parts(raw["case"]), raw["impl"]
    row = raw | {name: _number(raw.get(name)) for name in NUMBERS}
    row["ms"] = ms
    row["dtype"] = str(raw.get("dtype", named.get("dtype", "?")))
    row["backend"] = str(raw.get("backend") or "")
    row["pixels"] = named.get("pixels", row["dtype"])
    row["batch"] = row["batch"] or named.get("batch")
    row["model"] = impl in (*BEFORE, "fused", "normalise_on_device", "uint8")
    others = {"auto@": "version", **dict.fromkeys(OURS, "ours"), **dict.fromkeys(CEILINGS, "ceiling")}
    row["role"] = others.get("auto@" if impl.startswith("auto@") else impl, "peer")
    row["error"] = None if ms else str(raw.get("error") or "no reason given")
    row["ratio"] = _quantiles(raw.get("ratio"))
    work = {"gb_per_s": ("bytes", 1e-6), "tflops": ("flops", 1e-9), "images_per_s": ("batch", 1e3)}
    does = {"copy": ["gb_per_s"], "gemm": ["tflops"], "empty": []}.get(impl, work)  # a ceiling does one thing
    for rate, (amount, unit) in work.items():
        given = row[rate] or (row[amount] and ms and row[amount] / ms["median"] * unit)
        row[rate] = given if ms and rate in does else None
    return row


def _clean(value: Any) -> Any:
    """Without control characters, which neither SVG nor a terminal should get from a file."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, list) else value


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return value if good else None


def _quantiles(value: Any) -> dict[str, float] | None:
    """{"median", "p20", "p80"}; the median alone where a plain number is given, as older files have ratios."""
    if not isinstance(value, dict):
        return {"median": float(value)} if _number(value) else None
    good = {name: float(value[name]) for name in ("median", "p20", "p80") if _number(value.get(name))}
    return good if "median" in good else None


def times(row: Row, ours: Row) -> tuple[float, float]:
    """How many times as long `row` takes as `ours`, and half the spread of that from p20 to p80, as a logarithm.

    Paired within rounds where both have a `ratio`; the medians' quotient, and both spreads together, where not.
    """
    a, b = row["ratio"], ours["ratio"]
    if not (a and b):
        return row["ms"]["median"] / ours["ms"]["median"], math.hypot(half_spread(row["ms"]), half_spread(ours["ms"]))
    value = a["median"] / b["median"]
    if "p20" not in a or "p80" not in a:
        return value, math.hypot(half_spread(row["ms"]), half_spread(ours["ms"]))
    return value, math.hypot(half_spread(a), half_spread(b))


def half_spread(quantiles: dict[str, float]) -> float:
    """ln(p80/p20)/2; 0 where they are not known."""
    if "p20" not in quantiles or "p80" not in quantiles:
        return 0.0
    return abs(math.log(quantiles["p80"] / quantiles["p20"])) / 2
