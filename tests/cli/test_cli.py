"""The command line: help, JSON, exit statuses, and the demonstration at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vitkernels import __version__, cli, dispatch


def test_help_of_all(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    assert "can't be loaded" not in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_module_and_version():
    run = subprocess.run([sys.executable, "-m", "vitkernels", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["vitkernels", __version__]


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert {"machine", "versions", "backends", "auto", "choices"} <= info.keys()
    [first, *_] = info["choices"].values()
    assert first["weight"] == {"backend": "reference", "source": "rule", "why": dispatch.CPU.why}
    assert info["machine"]["cpu"]
    assert info["versions"]["vitkernels"] == __version__
    backends = {backend["name"]: backend for backend in info["backends"]}
    assert backends["reference"]["available"]
    assert all(backend["available"] or backend["reasons"] for backend in info["backends"])
    assert all(not backends[name]["problems"][problem] for problem, name in info["auto"].items())

    assert cli.main(["info"]) == 0
    assert "auto takes it" in " ".join(capsys.readouterr().out.split())


@pytest.fixture
def photograph(tmp_path):
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    pixels = numpy.random.default_rng(0).integers(0, 256, (50, 70, 3), "uint8")
    image.fromarray(pixels).save(tmp_path / "photograph.png")
    return str(tmp_path / "photograph.png")


SMALL = ("demo", "--model", "vit_tiny_patch16_224", "--device", "cpu", "--batch", "1", "--repeats", "1")


def test_demo(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    image = pytest.importorskip("PIL.Image")
    assert cli.main([*SMALL, "--json", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert result["ok"]
    assert result["token_errors"][1] <= result["token_error_allowed"]
    assert result["logit_difference"] <= result["logit_difference_allowed"]
    for part in ("front_end", "whole_model"):
        times = result[part]
        assert 0 < times["before"]["median"]
        assert times["ratio"] == pytest.approx(times["before"]["median"] / times["after"]["median"])
    with image.open(result["picture"]) as picture:
        assert picture.format == "PNG"
        assert len(picture.getcolors()) > 100


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_demo_for_people(model, tmp_path, photograph, capsys):
    pytest.importorskip("timm")
    assert cli.main([*SMALL, "--model", model, "--image", photograph, "--out", str(tmp_path)]) == 0
    assert "They agree" in capsys.readouterr().out


def test_demo_that_disagrees(tmp_path, photograph, monkeypatch, capsys):
    pytest.importorskip("timm")
    from vitkernels import patch_embed
    from vitkernels.demo import run

    monkeypatch.setattr(run, "patch_embed", lambda *args, **kwargs: patch_embed(*args, **kwargs) * 1.01)
    assert cli.main([*SMALL, "--image", photograph, "--out", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "command"),
        (["dmeo"], "dmeo"),
        (["info", "--frobnicate"], "--frobnicate"),
        (["demo", "--batch", "many"], "many"),
        (["demo", "--batch", "0"], "--batch"),
        (["demo", "--device", "abacus"], "abacus"),
        (["demo", "--device", "meta"], "meta"),
        (["demo", "--model", "no_such_model"], "no_such_model"),
        (["demo", "--model", "resnet18"], "resnet18"),
        (["demo", "--image", "no/such/file.png", "--model", "vit_tiny_patch16_224"], "no/such/file.png"),
    ],
)
def test_wrong_input_is_one_line(argv, word, capsys):
    if argv[:1] == ["demo"]:
        pytest.importorskip("timm")
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert word in err


def test_broken_command_leaves_the_others(monkeypatch, capsys):
    load = cli.import_module

    def broken(name, package):
        if name == ".bench":
            raise RuntimeError("100 % broken")
        return load(name, package)

    monkeypatch.setattr(cli, "import_module", broken)
    assert cli.main(["info", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "100 % broken" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "vitkernels: bench can't be loaded: 100 % broken; see vitkernels --help\n"


def test_json_stays_alone_on_stdout(monkeypatch, capsys):
    def run(args):
        print("a library talks")
        return {"ok": False}

    def arguments(parser):
        pass

    noisy = SimpleNamespace(HELP="", arguments=arguments, run=run, show=print)
    monkeypatch.setattr(cli, "import_module", lambda name, package: noisy)
    assert cli.main(["info", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": False}
    assert err == "a library talks\n"


def test_a_table_of_times_fits_a_terminal_of_80_columns(monkeypatch, capsys):
    from vitkernels.cli import bench

    monkeypatch.setenv("FORCE_COLOR", "1")  # as if to a terminal
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "case": "B8-224-P16-D768-bf16", "mode": "forward", "impl": "conv_channels_last", "timing": "eager",
        "ms": {"median": 0.00069823, "p20": 0.0005, "p80": 0.0009}, "images_per_s": 1234567, "gb_per_s": 0.591234,
        "tflops": 0.0914567, "roofline_share": 0.58, "peak_mb": 0.602345, "ratio": {"median": 15.02},
    }  # fmt: skip
    bench.show({"header": {"gpu": None, "cpu": "a CPU", "torch": "2", "triton": "3", "vitkernels": "0", "commit": "0"},
                "rows": [row]})  # fmt: skip
    out = capsys.readouterr().out
    assert all(whole in out for whole in ("15.02", "0.000698", "1,234,567", "0.602")), out
