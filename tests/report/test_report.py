"""The report: results in, numbers, figures and a page out; and that what got slower, and only that, is called so."""

from __future__ import annotations

import cmath
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from vitkernels import cli
from vitkernels.report import compare, labels, results, summary

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads"
HEADER = {"gpu": None, "cpu": "a CPU, 2 threads", "torch": "2.14.1", "vitkernels": "0.1.0", "commit": "abc1234",
          "command": "vitkernels bench"}  # fmt: skip
TIMES = {"auto": 2.0, "timm_eager": 4.0, "reshape_linear": 3.0, "copy": 1.0, "gemm": 1.5}
FLOPS, BYTES = 2 * 8 * 196 * 768 * 768, 10_000_000


def rows(case="B8-224-P16-D768-fp32", mode="forward", timing="eager", times=TIMES, spread=0.02, clock=1.0, old=False):
    """What a run leaves of one case, its medians `times` ms on a machine `clock` times as slow."""
    first = next(iter(times.values()))

    def around(value, spread):
        return {"median": value, "p20": value * (1 - spread), "p80": value * (1 + spread)}

    made = []
    for impl, ms in times.items():
        row = {"case": case, "mode": mode, "dtype": "fp32", "impl": impl, "timing": timing, "bytes": BYTES,
               "flops": FLOPS, "roofline_share": None, "ms": ms and around(ms * clock, 3 * spread)}  # fmt: skip
        if ms is None:
            row["error"] = f"RuntimeError: no {impl}"
        elif first:
            row["ratio"] = ms / first if old else around(ms / first, 0 if ms is first else spread)
        made.append(row | ({"backend": "reference"} if impl == "auto" else {}))
    return made


def store(path: Path, *groups, header=HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": [row for group in groups for row in group], "ok": True}))
    return path


def loaded(path: Path, *groups) -> results.Results:
    return results.load([store(path, *groups)])


# --- Reading.


def test_names_are_those_of_the_benchmark():
    from vitkernels.bench import baselines, implementations

    assert set(implementations.OURS) <= set(results.OURS)
    assert set(results.CEILINGS) == set(implementations.CEILINGS)
    assert baselines.PEERS.keys() <= labels.WORDS.keys()


def test_folders_files_and_what_is_neither(tmp_path):
    store(tmp_path / "a" / "results.json", rows(), [{"case": "x", "impl": "auto", "check": "right"}])
    store(tmp_path / "b.json", rows(mode="both"))
    benchmark = {"machine_info": {"vitkernels": HEADER | {"cpu": "another"}},
                 "benchmarks": [{"extra_info": {"row": row}} for row in rows(old=True)]}  # fmt: skip
    (tmp_path / "pytest.json").write_text(json.dumps(benchmark))
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "broken.json").write_text("{")
    found = results.load([tmp_path, tmp_path / "b.json"])
    assert [Path(run["file"]).name for run in found.runs] == ["results.json", "b.json", "pytest.json"]
    assert {Path(file).name for file, _ in found.skipped} == {"results.json", "package.json", "broken.json"}
    assert len(found.rows) == 3 * len(TIMES)
    assert {(row["device"], found.runs[row["run"]]["header"]["cpu"]) for row in found.rows} == {
        ("a CPU, 2 threads", "a CPU, 2 threads"), ("another", "another"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ('{"name": "x"}', "no results file: no \"header\" and \"rows\""),
        ("[]", "no JSON object"),
        ("{", "is no results file"),
        ('{"header": {}, "rows": []}', "no rows in"),
        ('{"header": {}, "rows": [{"case": "", "mode": "", "impl": "", "timing": "", "ms": -1}]}', "no rows in"),
        (None, "does not exist"),
    ),
)  # fmt: skip
def test_a_named_file_that_is_none(tmp_path, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        results.load([path])


def test_old_and_new_rows_say_the_same(tmp_path):
    new, old = (loaded(tmp_path / f"{name}.json", rows(old=name == "old")) for name in ("new", "old"))
    for a, b in zip(new.rows, old.rows, strict=True):
        assert a["gb_per_s"] == b["gb_per_s"]
        assert a["gb_per_s"] == (None if a["impl"] == "gemm" else pytest.approx(BYTES / a["ms"]["median"] / 1e6))
        assert a["tflops"] == (None if a["impl"] == "copy" else pytest.approx(FLOPS / a["ms"]["median"] / 1e9))
        assert a["ratio"]["median"] == b["ratio"]["median"]
    assert new.rows[0]["images_per_s"] == 8 / 2 * 1000
    [a], [b] = new.entries, old.entries
    assert a.best[:1] + a.best[1:2] == (a.rows["reshape_linear"], 1.5)
    assert a.best[2] == pytest.approx(0.02, rel=0.01)  # the ratio's own spread, by which it was paired
    assert b.best[2] == pytest.approx(0.06 * math.sqrt(2), rel=0.01)  # both times' spreads, where it is not known


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("B8-224-P16-D768-bf16", "ViT-B/16 · 224 · B 8 · bf16"),
        ("B256-518-P14-D1024-bf16-uint8-T5-keep0.25-hwc",
         "ViT-L/14 · 518 · B 256 · uint8 → bf16 · T 5 · keep 25 % · channels-last"),
        ("B8-224-P16-D768-bf16-autocast", "ViT-B/16 · 224 · B 8 · bf16 · autocast"),
        ("B2-16f224-P2x16-D384-fp16", "ViT-S/16 · 16 frames of 224 · B 2 · fp16"),
        ("B1-32x48-P8x16-D33-fp16-C4", "D 33 /8×16 · 32×48 · B 1 · fp16 · 4 channels"),
        ("something else", "something else · fp32"),
        ("timm:vit_small_patch16_224", "ViT-S/16 · 224 · timm · fp32"),
    ),
)  # fmt: skip
def test_words(name, words):
    assert labels.case_words(name, "fp32") == words


# --- Numbers.


def test_summary_takes_each_case_s_best_peer(tmp_path):
    slow = TIMES | {"auto": 4.0}  # the best peer is faster: 3/4
    results = loaded(tmp_path / "r.json", rows(), rows("B1-224-P16-D768-fp32", times=slow), rows(mode="both"))
    forward, both = summary.summary(results)
    assert (forward["mode"], forward["cases"], forward["faster"], both["cases"]) == ("forward", 2, 1, 1)
    assert forward["geometric_mean"] == pytest.approx(math.sqrt(1.5 * 0.75))
    assert (forward["least"], forward["greatest"]) == pytest.approx((0.75, 1.5))
    assert summary.worst(results)[0].case == "B1-224-P16-D768-fp32"


def test_an_error_of_auto_is_not_hidden_behind_another_backend(tmp_path):
    results = loaded(tmp_path / "r.json", rows(times={"auto": None, "triton": 1.0, "timm_eager": 2.0}))
    assert summary.summary(results) == []
    assert [row["error"] for row in summary.errors(results)] == ["RuntimeError: no auto"]


def test_peers_of_later_rounds_count_with_the_ratio_of_their_own(tmp_path):
    """The suite times compilers apart: the clock may have changed since, the ratio has not."""
    later = rows(times={"auto": 2.0, "compile_linear": 2.5}, clock=3)
    [entry] = loaded(tmp_path / "r.json", rows(), later).entries
    assert (entry.best[0]["impl"], entry.best[1]) == ("compile_linear", 1.25)


def test_models(tmp_path):
    pair = {"before": 10.0, "fused": 9.0}
    model = rows("timm:vit_small_patch16_224", "inference", times=pair)
    for row in model:
        row |= {"bytes": None, "flops": None, "batch": 4, "images_per_s": 4 / row["ms"]["median"] * 1e3}
    [group] = summary.summary(loaded(tmp_path / "r.json", model))
    assert group["model"]
    assert group["geometric_mean"] == pytest.approx(10 / 9)


def test_markdown_of_the_stored_results():
    text = summary.markdown(results.load([STORED]))
    stored = json.loads((STORED / "operation.json").read_text())
    for case, mode, words in (
        ("B8-224-P16-D768-fp32", "forward", "ViT-B/16 · 224 · B 8 · fp32"),
        ("B32-224-P16-D768-fp32-uint8", "forward", "ViT-B/16 · 224 · B 32 · uint8 → fp32"),
        ("B8-224-P16-D768-fp32-keep0.25", "both", "ViT-B/16 · 224 · B 8 · fp32 · keep 25 %"),
    ):
        rows = {row["impl"]: row for row in stored["rows"] if (row["case"], row["mode"]) == (case, mode)}
        peers = ("timm_eager", "conv_channels_last", "reshape_linear")
        cells = [words, f"{rows['auto']['ms']['median']:#.3g}"]
        cells += [f"{rows[name]['ratio']['median']:.2f} ×" for name in peers]
        assert f"| {' | '.join(cells)} |" in text.splitlines()
    last = text.splitlines()[-1]
    assert all(word in last for word in ("AMD EPYC, 2 threads", "torch 2.", "commit ", "`pytest benchmarks/"))


# --- What got slower.


def test_a_slower_machine_is_no_regression(tmp_path):
    old, new = loaded(tmp_path / "old.json", rows()), loaded(tmp_path / "new.json", rows(clock=2.5))
    [line] = compare.compare(new, old)
    assert line["verdict"] == "same"
    assert line["change"] == pytest.approx(1)
    assert line["yardsticks"] == ["timm_eager", "reshape_linear", "copy", "gemm"]


@pytest.mark.parametrize(("factor", "verdict"), ((1.04, "same"), (1.08, "slower"), (0.92, "faster"), (0.97, "same")))
def test_the_floor_of_the_band(tmp_path, factor, verdict):
    times = TIMES | {"auto": TIMES["auto"] * factor}
    results = loaded(tmp_path / "new.json", rows(times=times, clock=0.5))
    [line] = compare.compare(results, loaded(tmp_path / "old.json", rows()))
    assert line["verdict"] == verdict
    assert line["change"] == pytest.approx(factor)
    assert line["band"] == pytest.approx(0.05)


def test_a_wide_spread_widens_the_band(tmp_path):
    times = TIMES | {"auto": TIMES["auto"] * 1.12}
    old = loaded(tmp_path / "old.json", rows(spread=0.1))
    [line] = compare.compare(loaded(tmp_path / "new.json", rows(times=times, spread=0.1)), old)
    assert line["verdict"] == "same"
    assert math.log1p(line["band"]) == pytest.approx(math.sqrt(2) * math.log(1.1 / 0.9) / 2, rel=1e-3)


def test_one_yardstick_that_changed_is_not_our_regression(tmp_path):
    """A compiler that chose better: the mean moves by 1/4 of it, and the yardsticks' disagreement covers that."""
    times = TIMES | {"timm_eager": TIMES["timm_eager"] / 2}
    old = loaded(tmp_path / "old.json", rows())
    [line] = compare.compare(loaded(tmp_path / "new.json", rows(times=times)), old)
    assert line["change"] == pytest.approx(2**0.25)
    assert line["verdict"] == "same"


def test_lost_missing_new_and_without_yardstick(tmp_path):
    a, b, c, d, e = (f"B{n}-224-P16-D768-fp32" for n in (1, 2, 3, 4, 5))
    alone = {"auto": 2.0, "empty": 0.001}
    failing = TIMES | {"auto": None}
    old = loaded(tmp_path / "old.json", rows(a), rows(b), rows(d, times=alone), rows(e, times=failing))
    new = loaded(tmp_path / "new.json", rows(a, times=failing), rows(c), rows(d, times=alone), rows(e, times=failing))
    found = {line["case"]: line for line in compare.compare(new, old)}
    assert {case: line["verdict"] for case, line in found.items()} == {
        a: "lost", b: "missing", c: "new", d: "no yardstick", e: "same",
    }  # fmt: skip
    assert found[a]["error"] == "RuntimeError: no auto"


def test_of_cases_alike_the_file_of_the_same_name_is_compared(tmp_path):
    slow, fast = rows(times=TIMES | {"auto": 3.0}), rows()
    for folder in ("old", "new"):
        store(tmp_path / folder / "with.json", fast)
        store(tmp_path / folder / "without.json", slow)
    new, old = (results.load([tmp_path / folder]) for folder in ("new", "old"))
    assert [line["change"] for line in compare.compare(new, old)] == pytest.approx([1, 1])
    assert {entry.note for entry in new.entries} == {"with", "without"}


def test_nothing_to_compare(tmp_path):
    old = store(tmp_path / "old.json", rows(), header=HEADER | {"gpu": "another device"})
    with pytest.raises(ValueError, match="in both: 5 and 5 rows, of a CPU, 2 threads and another device"):
        compare.compare(loaded(tmp_path / "new.json", rows()), results.load([old]))
    with pytest.raises(ValueError, match="noise band"):
        compare.compare(results.load([old]), results.load([old]), -0.1)


@pytest.mark.parametrize(("theirs", "verdict"), ((2.0, "same"), (1.8, "slower"), (2.4, "faster"), (None, "new")))
def test_another_version_in_the_same_rounds(tmp_path, theirs, verdict):
    results = loaded(tmp_path / "r.json", rows(times=TIMES | {"auto@main": theirs}))
    [line] = compare.regressions(results.rows)
    assert (line["verdict"], line["against"]) == (verdict, "main")
    if theirs:
        assert line["change"] == pytest.approx(2 / theirs)
    assert results.entries[0].best[0]["impl"] == "reshape_linear"  # an older version of ours is no peer


def test_another_version_still_had_a_time(tmp_path):
    results = loaded(tmp_path / "r.json", rows(times={"auto": None, "auto@main": 2.0, "copy": 1.0}))
    [line] = compare.regressions(results.rows)
    assert line["verdict"] == "lost"


# --- The command.


def command(capsys, *argv):
    status = cli.main(["report", *map(str, argv), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else captured.err


def test_compare_sets_the_exit_status(tmp_path, capsys):
    old = store(tmp_path / "old.json", rows())
    new = store(tmp_path / "new.json", rows(times=TIMES | {"auto": 2.4}))
    options = ("--out", tmp_path / "out", "--no-figures")
    status, result = command(capsys, new, "--compare", old, *options)
    assert (status, result["ok"], result["comparison"][0]["verdict"]) == (1, False, "slower")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 regression beyond" in page
    assert "+20.0%" in page
    assert command(capsys, new, "--compare", old, "--noise", "0.3", *options)[0] == 0
    assert command(capsys, old, "--compare", new, *options)[0] == 0  # faster is no failure
    paired = store(tmp_path / "paired.json", rows(times=TIMES | {"auto@main": 1.5}))
    status, result = command(capsys, paired, *options)
    assert (status, result["paired"][0]["verdict"]) == (1, "slower")
    assert cli.main(["report", str(new), "--compare", str(old), *map(str, options)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "slower: auto, B8-224-P16-D768-fp32, forward, eager: +20.0%, beyond ±5.0%" in out
    assert "at least ±5.0%" in out
    status, error = command(capsys, tmp_path / "none.json")
    assert (status, error.count("\n")) == (2, 1)


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.delitem(__import__("sys").modules, "vitkernels.report.figures", raising=False)
    results = store(tmp_path / "r.json", rows())
    status, error = command(capsys, results, "--out", tmp_path / "out")
    assert status == 2
    assert "figures need matplotlib" in error
    assert "--no-figures" in error
    assert command(capsys, results, "--out", tmp_path / "out", "--no-figures")[0] == 0
    assert cli.main(["report", str(results), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("Forward, eager call:\n\n| | one call, ms |")


EVIL = '</script><img src=x onerror=alert(1)>$\\frac$"&\x1b[31m'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Figures and page of results of every kind, some of them ill-meant."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    many = [rows(f"B{n}-224-P16-D768-fp32", timing=t) for n in range(1, 15) for t in ("eager", "graph")]
    model = rows("timm:vit_small_patch16_224", "inference", times={"before": 10.0, "fused": 9.0})
    for row in model:
        row |= {"bytes": None, "flops": None, "batch": 4}
    evil = rows(EVIL, times={"auto": 1.0, EVIL: 2.0, "timm_eager": None})
    for row in evil:
        row |= {"batch": 2, "error": EVIL, "backend": EVIL}
    store(folder / "in" / "a.json", *many, rows(mode="both"), model)
    store(folder / "in" / "b.json", evil, header=HEADER | {"cpu": EVIL, "command": EVIL * 9})
    status = cli.main(["report", str(folder / "in"), "--out", str(folder / "out"), "--json"])
    return status, folder / "out"


def test_figures(made):
    status, out = made
    assert status == 0
    names = {path.stem for path in out.glob("*.png")}
    assert names == {path.stem for path in out.glob("*.svg")}
    assert {"throughput-1-forward-eager-1", "throughput-1-forward-eager-2", "throughput-1-forward-graph-1",
            "throughput-1-both-eager", "models-1-inference-eager", "roofline-1-forward", "roofline-1-both",
            "throughput-2-forward-eager"} <= names  # fmt: skip
    for name in names:
        root = xml.parse(out / f"{name}.svg").getroot()
        texts = [element for element in root.iter() if element.tag.endswith("}text")]
        sizes = [float(re.search(r"font(?:-size)?:[^;]*?([\d.]+)px", element.get("style"))[1]) for element in texts]
        assert min(sizes) >= 9
        words = " ".join("".join(element.itertext()) for element in texts)
        if "-1-" in name:
            assert "a CPU, 2 threads · torch 2.14.1 · vitkernels 0.1.0 · commit abc1234" in words
            assert "vitkernels bench" in words
    words = "".join(xml.parse(out / "throughput-1-both-eager.svg").getroot().itertext())
    assert "4,000\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}1.50 ×" in words
    assert "copy 10 GB/s · product 1.23 TFLOP/s" in "".join(xml.parse(out / "roofline-1-both.svg").getroot().itertext())


def test_no_text_of_a_figure_lies_on_another(tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from vitkernels.report import figures

    shapes = [f"B{B}-{size}-P{P}-D{D}-fp32{more}" for B in (1, 256) for size, P, D, more in (
        (224, 16, 768, ""), (224, 14, 1024, "-uint8-keep0.25-hwc"), (518, 14, 1536, "-T5"))]  # fmt: skip
    times = TIMES | dict.fromkeys(("compile_conv", "compile_linear_max", "compile_conv_max", "cuda"), 2.5)
    groups = [rows(shape, times=times, clock=1 + i) for i, shape in enumerate(shapes)]
    for i, group in enumerate(groups):
        for row in group:
            row["bytes"] = BYTES * (1 + i / 9)
    header = HEADER | {"command": "python benchmarks/GPU_SUITE.py --minutes 25 --out benchmarks/results/H100 " * 12}
    found = results.load([store(tmp_path / "r.json", *groups, header=header)])
    checked = 0
    for _, title, make in figures._figures(found):
        with matplotlib.rc_context(figures.SETTINGS):
            figure = make()
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw(renderer)
            unseen = set()
            for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
                low, high = axis.get_view_interval()
                unseen |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
            texts = {t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()}
            texts -= unseen
            corners = [(t.get_text(), _corners(t, renderer)) for t in texts]
            for i, (text, a) in enumerate(corners):
                assert all(0 <= x <= figure.bbox.width and 0 <= y <= figure.bbox.height for x, y in a), (title, text)
                for other, b in corners[:i]:
                    assert _apart(a, b), (title, text, other)
                    checked += 1
    assert checked > 1000


def _corners(text, renderer):
    """Of the text's box, turned as the text is; a pixel inside it."""
    angle, at = text.get_rotation(), complex(*text.get_transform().transform(text.get_position()))
    text.set_rotation(0)
    x0, y0, x1, y1 = text.get_window_extent(renderer).extents
    text.set_rotation(angle)
    turn = cmath.rect(1, math.radians(angle))
    box = [complex(x, y) for x, y in ((x0 + 1, y0 + 1), (x1 - 1, y0 + 1), (x1 - 1, y1 - 1), (x0 + 1, y1 - 1))]
    turned = [(p - at) * turn + at if angle % 90 else p for p in box]
    return [(p.real, p.imag) for p in turned]


def _apart(a, b):
    """Whether two convex shapes have no point in common: all of one lie on this side of an edge, all of the other
    beyond."""
    for shape in (a, b):
        for (x0, y0), (x1, y1) in zip(shape, shape[1:] + shape[:1], strict=True):
            sides = [[(x - x0) * (y1 - y0) - (y - y0) * (x1 - x0) for x, y in points] for points in (a, b)]
            if max(sides[0]) <= min(sides[1]) or max(sides[1]) <= min(sides[0]):
                return True
    return False


def test_page_is_whole_and_escaped(made):
    _, out = made
    page = (out / "index.html").read_text()
    assert "{{" not in page.partition("<script>")[0]
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "://" not in re.sub(r"http://www.w3.org/[\w/]+", "", page)
    assert "<img" not in page
    assert page.count("<script") == page.count("</script>") == 1
    assert "\x1b" not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for colour in ("#1f2430", "#ffffff"):  # in the style sheet alone: figures follow the page's light and dark
        assert colour not in page.partition("</style>")[2]


def test_page_in_a_browser(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = (made[1] / "index.html").read_text()
    watch = """<script>const failures = [];
      for (const kind of ["error", "securitypolicyviolation"])
        addEventListener(kind, e => failures.push(e.message || e.violatedDirective));</script>"""
    ask = """<script>{
      const table = document.querySelector("#rows"), heads = [...table.tHead.rows[0].cells];
      const i = heads.findIndex(head => head.textContent === "ms"), button = heads[i].querySelector("button");
      const column = () => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[i].dataset.value);
      const said = () => [heads[i].getAttribute("aria-sort"), column()];
      const before = said(); button.focus(); const focused = document.activeElement === button;
      button.click(); const down = said(); button.click(); const up = said();
      const form = document.querySelector("form");
      form.elements.timing.value = "graph"; form.elements.impl.value = "TIMM";
      form.dispatchEvent(new Event("input"));
      const left = column().length, shown = document.getElementById("shown").textContent;
      const out = document.createElement("pre"); out.id = "answer";
      out.textContent = JSON.stringify({ before, down, up, focused, left, shown, failures });
      document.body.append(out); }</script>"""
    page = page.replace("<head>", "<head>" + watch, 1).replace("</body>", ask + "</body>", 1)
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}"]
    flags += [f"--disable-{name}" for name in ("quic", "sync", "background-networking", "component-update")]
    run = subprocess.run(
        [browser, *flags, "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="answer">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stderr[-2000:]
    answer = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert answer["failures"] == []
    assert answer["focused"]
    numbers = [[float(value) for value in answer[name][1] if value] for name in ("before", "down", "up")]
    assert answer["before"][0] == "none"
    assert (answer["down"][0], numbers[1]) == ("descending", sorted(numbers[0], reverse=True))
    assert (answer["up"][0], numbers[2]) == ("ascending", sorted(numbers[0]))
    assert answer["down"][1][-1] == answer["up"][1][-1] == ""  # what has no time stays below
    assert (answer["left"], answer["shown"].split()[0]) == (14, "14")
