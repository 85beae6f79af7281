"""The report as one HTML page: the summary, what is worst, what failed, the figures, and every row, to sort and filter.

It needs no network, and everything that comes from a file is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .compare import FAILED
from .labels import MODES, TIMINGS, case_words, dtype_words, impl_words, small_print
from .results import Results, Row, half_spread, times
from .summary import errors, order, rank, summary, worst

TEMPLATE = Path(__file__).with_suffix(".html")
COLOURS = {"#1f2430": "ink", "#667080": "grey", "#e4572e": "accent", "#f2a48f": "light", "#3f6797": "best",
           "#93b1d1": "peer", "#c9d8e8": "line", "#ffffff": "paper"}  # fmt: skip


class Number(NamedTuple):
    """A table's cell: how it is shown, and what it is sorted by."""

    text: str
    value: float | None


def page(
    results: Results,
    figures: Sequence[dict[str, Any]] = (),
    comparison: Sequence[dict[str, Any]] | None = None,
    paired: Sequence[dict[str, Any]] = (),
    old: Results | None = None,
    floor: float = 0.05,
) -> str:
    """The page's text. `comparison` and `paired` are of compare.py, `figures` of figures.py."""
    sections = [("summary", "Ours against the best peer", _summary(results))]
    if comparison is not None and old is not None:
        sections.append(("compared", "Compared with the older results", _compared(comparison, floor, old)))
    if paired:
        sections.append(("paired", "Compared with other versions, in the same rounds", _compared(paired, floor, None)))
    sections += [
        ("worst", "Where ours does worst", _worst(results)),
        ("errors", "Without a time", _errors(results)),
        ("figures", "Figures", _figures(figures)),
        ("all", "Every row", _rows(results)),
        ("made-of", "What this was made of", _made_of(results)),
    ]
    sections = [section for section in sections if section[2]]
    parts = {
        "title": "vitkernels: how fast, and beside what",
        "lead": _lead(results),
        "contents": " ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections),
        "main": "\n".join(
            f'<section id="{n}"><h2>{escape(title)}</h2>\n{body}</section>' for n, title, body in sections
        ),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))


def _lead(results: Results) -> str:
    beside = [entry for entry in results.entries if entry.best]
    faster = sum(entry.best[1] > 1 for entry in beside if entry.best)
    cases, files = len({row["case"] for row in results.rows}), len(results.runs)
    text = f"{len(results.rows)} rows of {cases} case{'s' * (cases != 1)}, from {files} file{'s' * (files != 1)}. "
    text += f"Ours is faster than the best peer in {faster} of {len(beside)} comparisons. " if beside else ""
    lost = len([row for row in errors(results) if row["role"] == "ours"])
    text += f"{lost} of our rows have no time." if lost else "Each of our rows has a time."
    facts, commands = small_print(results.runs)
    return f'<p>{text}</p>\n<p class="small">{escape(facts)}<br><code>{escape(commands)}</code></p>'


# --- Tables.


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]], name: str = "", marks: Sequence[str] = ()) -> str:
    """A sortable table: a head that begins with # is of numbers. A cell is text, a Number, or (text, class)."""
    top = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" * h.startswith("#")}><button type="button">'
        f"{escape(h.removeprefix('#'))}</button></th>"
        for h in heads
    )
    body: list[str] = []
    for i, row in enumerate(rows):
        cells = []
        for cell in row:
            if isinstance(cell, Number):
                value = "" if cell.value is None else f"{cell.value:.9g}"
                cells.append(f'<td class="number" data-value="{value}">{escape(cell.text)}</td>')
            elif isinstance(cell, tuple):
                cells.append(f'<td class="{cell[1]}">{escape(cell[0])}</td>')
            else:
                cells.append(f"<td>{escape(cell)}</td>")
        body.append(f"<tr{marks[i] if marks else ''}>{''.join(cells)}</tr>")
    label, tall = escape(name or heads[0]), " tall" * (len(body) > 30)
    return (
        f'<div class="table{tall}" role="region" tabindex="0" aria-label="{label}">'
        f"<table{f' id={name}' if name else ''}><thead><tr>{top}</tr></thead><tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>\n"
    )


def _number(value: float | None, form: str = ",.4g", after: str = "") -> Number:
    if value is None:
        return Number("", None)
    return Number(f"{value:,.0f}{after}" if abs(value) >= 1e4 and "g" in form else f"{value:{form}}{after}", value)


def _summary(results: Results) -> str:
    found = summary(results)
    several = len({group["device"] for group in found}) > 1
    rows = []
    for g in found:
        mode, timing = _how(g["mode"], g["timing"])
        rows.append(
            [g["device"]] * several + ["whole models: " * g["model"] + mode, timing, g["dtype"], _number(g["cases"])]
            + [_number(g[name], ".2f", " ×") for name in ("geometric_mean", "least", "greatest")]
            + [Number(f"{g['faster']} of {g['cases']}", g["faster"] / g["cases"])]
        )  # fmt: skip
    heads = ["device"] * several + ["mode", "timing", "dtype", "#cases"]
    heads += ["#geometric mean", "#least", "#greatest", "#faster in"]
    if not rows:
        return "<p>No case has both a time of ours and a peer's.</p>"
    return (
        "<p>The time of each case's fastest peer over ours, paired within rounds of one run: above 1, ours is faster. "
        "Of whole models: before over after.</p>" + _table(heads, rows)
    )


def _worst(results: Results) -> str:
    rows = []
    for entry in worst(results):
        assert entry.ours and entry.best
        peer, ratio, spread = entry.best
        rows.append(
            [_number(ratio, ".2f", " ×"), _share(spread, ".1%", "± "), entry.title, *_how(entry.mode, entry.timing),
             _number(entry.ours["ms"]["median"]), _number(peer["ms"]["median"]), impl_words(peer["impl"]),
             entry.ours["backend"] or entry.ours["impl"], _share(entry.ours["roofline_share"])]
        )  # fmt: skip
    heads = ("#× best peer", "#spread", "case", "mode", "timing", "#our ms", "#its ms", "best peer", "ours took",
             "#roofline")  # fmt: skip
    return _table(heads, rows) if rows else ""


def _errors(results: Results) -> str:
    """A row per implementation, case and reason."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in errors(results):
        words = case_words(row["case"], row["dtype"], row["batch"])
        groups.setdefault((impl_words(row["impl"]), words, row["error"]), []).append(f"{row['mode']}, {row['timing']}")
    rows = [
        (impl, case, ("; ".join(dict.fromkeys(how)), "wide"), (why, "wide"))
        for (impl, case, why), how in groups.items()
    ]
    return _table(("implementation", "case", "mode and timing", "why"), rows) if rows else ""


def _compared(lines: Sequence[dict[str, Any]], floor: float, old: Results | None) -> str:
    told = {"slower": "bad", "lost": "bad", "faster": "good"}
    rows = []
    for line in lines:
        impl = " against ".join(filter(None, (line["impl"], line.get("against"))))
        change = _share(line["change"] and line["change"] - 1, "+.1%")
        by = (line["error"], "wide") if "error" in line else ", ".join(line["yardsticks"])
        rows.append(
            [(line["verdict"], told.get(line["verdict"], "")), change, _share(line["band"], ".1%", "± "), line["title"],
             *_how(line["mode"], line["timing"]), impl, _number(line["ms"]), _number(line["old_ms"]), by]
        )  # fmt: skip
    bad = sum(line["verdict"] in FAILED for line in lines)
    count = f"{bad or 'No'} regression{'s' * (bad != 1)}"
    text = f'<p class="{"bad" if bad else "good"}">{count} beyond the noise band.</p><p>Change of our time'
    if old:
        text += (
            " by the yardsticks of the same rounds (peers, device copy, bare product), not in milliseconds, in which "
            "two runs can't be compared. "
        )
    else:
        text += " against the other version's, paired within rounds. "
    text += f"The band is the spread of these ratios, and {floor:.1%} at least.</p>"
    if old:
        facts, commands = small_print(old.runs)
        text += f'<p class="small">Older: {escape(facts)}<br><code>{escape(commands)}</code></p>'
    heads = ("verdict", "#change", "#band", "case", "mode", "timing", "implementation", "#ms", "#ms then", "by")
    return text + _table(heads, rows)


def _rows(results: Results) -> str:
    """Every row, ours in bold; columns without a value are left out."""
    listed = [
        (entry, row)
        for entry in sorted(results.entries, key=lambda e: (e.model, rank(e.mode), e.timing, order(e)))
        for row in entry.rows.values()
    ]
    columns = {
        "#ms": lambda e, r: _number(r["ms"] and r["ms"]["median"]),
        "#p20 – p80": lambda e, r: _spread(r),
        "#images/s": lambda e, r: _number(r["images_per_s"]),
        "#GB/s": lambda e, r: _number(r["gb_per_s"]),
        "#TFLOP/s": lambda e, r: _number(r["tflops"]),
        "#roofline": lambda e, r: _share(r["roofline_share"]),
        "#× ours": lambda e, r: _number(times(r, e.ours)[0] if e.ours and e.ours["ms"] and r["ms"] else None, ".2f"),
        "#peak MB": lambda e, r: _number(r["peak_mb"]),
    }
    cells = {head: [make(entry, row) for entry, row in listed] for head, make in columns.items()}
    cells = {head: column for head, column in cells.items() if any(cell.value is not None for cell in column)}
    several = len(results.runs) > 1
    rows, marks, seen = [], [], {"mode": {}, "timing": {}, "dtype": {}}  # type: ignore[var-annotated]
    for i, (entry, row) in enumerate(listed):
        impl = " = ".join(filter(None, (impl_words(row["impl"]), row["backend"])))
        rows.append([entry.title, impl, *(column[i] for column in cells.values()), row["mode"], row["timing"]])
        rows[-1] += [Path(results.runs[row["run"]]["file"]).name] * several
        data = {"mode": row["mode"], "timing": row["timing"], "dtype": dtype_words(row)}
        for name, value in data.items():
            seen[name][value] = None
        data |= {"impl": f"{impl} {row['impl']}", "case": f"{entry.title} {row['case']}"}
        role = "ours" if row is entry.ours else row["role"] if row["role"] == "ceiling" else ""
        marks.append("".join(f' data-{k}="{escape(v)}"' for k, v in data.items()) + f' class="{role}"' * bool(role))
    choices = []
    for name, values in seen.items():
        options = "".join(f"<option>{escape(value)}</option>" for value in values)
        choices.append(f'<label>{name}<select name="{name}"><option value="">all</option>{options}</select></label>')
    choices += [
        f'<label>{n} contains<input name="{n}" type="search" autocomplete="off"></label>' for n in ("case", "impl")
    ]
    heads = ("case", "implementation", *cells, "mode", "timing", *["file"] * several)
    return (
        f'<form>{"".join(choices)}<span id="shown" role="status"></span></form>\n'
        "<p class=small>GB/s and TFLOP/s count the bytes that must move and the arithmetic of the problem, whatever an "
        "implementation does beside it. × ours: its time over ours.</p>" + _table(heads, rows, "rows", marks)
    )


def _how(mode: str, timing: str) -> list[str]:
    return [MODES.get(mode, mode), TIMINGS.get(timing, timing)]


def _share(value: float | None, form: str = ".0%", before: str = "") -> Number:
    return Number("" if value is None else f"{before}{value:{form}}", value)


def _spread(row: Row) -> Number:
    if not row["ms"] or "p20" not in row["ms"] or "p80" not in row["ms"]:
        return Number("", None)
    return Number(f"{row['ms']['p20']:,.4g} – {row['ms']['p80']:,.4g}", half_spread(row["ms"]))


def _made_of(results: Results) -> str:
    rows = []
    for i, run in enumerate(results.runs):
        facts, command = small_print([run])
        rows.append(
            [run["file"], _number(sum(row["run"] == i for row in results.rows)), (facts, "wide"), (command, "wide")]
        )
    text = _table(("file", "#rows", "machine and versions", "command"), rows)
    if results.skipped:
        text += "<p>Skipped:</p>" + _table(("file", "why"), [[file, (why, "wide")] for file, why in results.skipped])
    return text


# --- Figures.


def _figures(figures: Sequence[dict[str, Any]]) -> str:
    return "".join(
        f"<details{' open' * (i == 0)}><summary>{escape(figure['title'])}</summary>"
        f'<figure aria-label="{escape(figure["title"])}">{inline(figure["svg"], f"f{i}")}</figure></details>\n'
        for i, figure in enumerate(figures)
    )


def inline(svg: str, name: str) -> str:
    """A figure for a page: colours as the page has them, ids of its own, and without what a page does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", svg)
    svg = re.sub(r'<g id="[\w.]+">', "<g>", svg)
    svg = re.sub(r"font-family: [^;]*; ?", "", svg)
    svg = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return re.sub("|".join(COLOURS), lambda found: f"var(--{COLOURS[found[0]]})", svg)
