"""The measuring of backends, with stand-ins for clock and GPU: what is timed, what is kept, that it survives being
killed, and that `auto` then takes it."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import vitkernels as vk
from vitkernels import cli, dispatch
from vitkernels.backends import measured, user_cache
from vitkernels.backends.cuda import extension
from vitkernels.bench.cases import Case
from vitkernels.gpu import NOMINAL
from vitkernels.tuning import backends
from vitkernels.tuning.search import INF

H100 = NOMINAL[90]
HALF, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch, host_extension):
    """A cache of the test's own; every backend there, and a GPU of which only figures are asked."""
    from host import backend

    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(user_cache, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(extension, "load", lambda: host_extension)
    monkeypatch.setattr(extension, "missing", lambda: "")
    monkeypatch.setattr(extension, "record", lambda: {"archs": ["8.0", "9.0a"]})
    monkeypatch.setattr(host_extension, "device_type", "cuda")
    monkeypatch.setattr(backends.environment, "header", lambda *_: {"driver": "1", "torch": "2"})
    monkeypatch.setattr(backends.timing, "alive", lambda device: None)
    backend.forget()
    measured.rows.cache_clear()
    yield
    measured.rows.cache_clear()
    backend.forget()


class Clock:
    """Milliseconds by a rule of (case, mode, backend), with what was asked for; None raises."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, case, mode, name):
        self.asked.append((case.name, mode, name))
        if (ms := self.rule(case, mode, name)) is None:
            raise ArithmeticError("tokens: error 1 above 0.1")
        return ms


def tuned(rule, **more):
    clock = Clock(rule)
    result = backends.tune_backends(torch.device("cuda", 90), timer=clock, **more)
    return {(row["direction"], row["kind"]): row for row in result["rows"]}, clock, result


def even(case, mode, name):
    return {"triton": 0.5, "cuda": 0.75, "reference": 1.0}[name]


def explained(weights=HALF, arch=90, **more):
    shapes = dict(images=torch.empty(256, 3, 224, 224, dtype=weights, device="meta"),
                  weight=torch.empty(768, 3, 16, 16, dtype=weights, device="meta"))  # fmt: skip
    return vk.explain(**shapes, gpu=f"sm_{arch}", **more)


def test_every_direction_and_kind_is_timed_and_then_taken():
    assert explained().sources == {"forward": "shipped", "weight": "shipped", "images": "rule"}
    assert explained(arch=80).sources == dict.fromkeys(dispatch.DIRECTIONS, "rule")
    rows, clock, result = tuned(even)
    assert set(rows) == {
        ("weight", "half, padded for wgmma"),
        ("weight", "half, copied for wgmma"),
        ("weight", "half, tokens copied for wgmma"),
        *((direction, kind) for direction in dispatch.DIRECTIONS for kind in ("half", "fp32", "tf32")),
    }
    assert len(set(clock.asked)) == len(clock.asked) == 3 * (3 * len(backends.CASES) - 1)  # bytes have no gradient
    assert all(row["backends"] == ["triton", "cuda", "reference"] for row in rows.values())
    for weights in (HALF, F32):
        why = explained(weights)
        assert {name for name, _ in why.auto.values()} == {"triton"}
        assert set(why.sources.values()) == {f"measured here on {time.strftime('%Y-%m-%d')}"}
        assert "0.50 × the reference's time (0.50 to 0.50), cuda 0.75" in str(why)
        assert "(measured here on" in str(why)
    assert explained(arch=80).sources == dict.fromkeys(dispatch.DIRECTIONS, "rule")  # another GPU
    assert not list(user_cache.folder().glob("*.journal"))
    assert not result["failed"]


def test_what_is_slower_than_the_reference_on_average_is_not_tried():
    large = lambda case: case.batch > 8  # noqa: E731
    rows, _, _ = tuned(
        lambda case, mode, name: {"triton": 0.25 if large(case) else 2.0, "cuda": 0.25 if large(case) else 32.0}.get(
            name, 1.0
        )
    )
    row = rows["forward", "fp32"]  # two of three cases are large: 0.25² × 2 < 1 < 0.25² × 32
    assert row["backends"] == ["triton", "reference"]
    assert "cuda 1.26 × the reference's time (0.25 to 32.00), over 3 shapes" in row["why"]
    _, _, result = tuned(lambda case, mode, name: 0.99 if name == "triton" else 1.0)
    assert {tuple(row["backends"]) for row in result["rows"]} == {("reference",)}  # a tie


def test_what_breaks_the_rule_once_is_out_of_its_kind():
    def rule(case, mode, name):
        wrong = (name, mode, case.keep) == ("triton", "forward", 0.25)
        return None if wrong else even(case, mode, name)

    rows, _, result = tuned(rule)
    assert rows["forward", "half"]["backends"] == ["cuda", "reference"]
    assert "triton failed" in rows["forward", "half"]["why"]
    assert rows["weight", "half"]["backends"] == ["triton", "cuda", "reference"]
    [failed] = result["failed"]
    assert "keep0.25" in failed and "error 1 above 0.1" in failed
    assert explained().chosen == "cuda"


def test_a_shape_that_the_reference_can_not_do_does_not_count():
    rows, _, _ = tuned(lambda case, mode, name: None if case.batch == 256 else even(case, mode, name))
    assert list(rows["forward", "half"]["ms"]) == [Case(batch=8).name]
    assert rows["forward", "half"]["backends"] == ["triton", "cuda", "reference"]


KILLED = """
import os, signal, sys
import torch
from vitkernels.backends.cuda import extension
from vitkernels.bench import environment
from vitkernels.tuning import backends

extension.missing = lambda: "not built"
environment.header = lambda *_: {"driver": "1", "torch": "2"}
backends.timing.alive = lambda device: None
count = 0

def timer(case, mode, name):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0

backends.tune_backends(torch.device("cuda", 90), timer=timer)
"""


def test_killed_it_goes_on_and_leaves_out_what_killed_it(monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: "not built")
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [journal] = user_cache.folder().glob("*.backends.journal")
    first = [json.loads(line)["choice"] for line in journal.read_text().splitlines()[1:]]
    _, clock, _ = tuned(even)
    cases = [name for name, *_ in clock.asked]
    assert len(clock.asked) == 2 * (3 * len(backends.CASES) - 1) - 6
    assert (first[-1][0], first[-1][2]) == (Case(batch=8).name, "reference") and Case().name in cases
    assert measured.rows(H100.name)["forward", "half"]["ms"][Case(batch=8).name] == {"triton": 1.0, "reference": 1.0}
    assert not journal.exists()


def test_whoever_stops_it_is_not_the_backends_fault():
    def stop(case, mode, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(stop)
    _, clock, result = tuned(even)
    assert len(clock.asked) == 3 * (3 * len(backends.CASES) - 1)
    assert not result["failed"]


def test_a_lost_gpu_ends_it_and_the_next_goes_on_behind(monkeypatch):
    def alive(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(backends.timing, "alive", alive)
    with pytest.raises(backends.GpuLost, match=r"forward triton the GPU is lost.*run again.*illegal memory"):
        tuned(lambda *_: None)
    monkeypatch.setattr(backends.timing, "alive", lambda device: None)
    rows, clock, _ = tuned(even)
    assert (Case(batch=8).name, "forward", "triton") not in clock.asked
    assert rows["forward", "half"]["backends"] == ["cuda", "reference"]


# --- What is kept.


def entry(**change):
    made = {"backends": ["cuda", "reference"], "why": "a test", "date": "2026-01-31", "ms": {}}
    return made | measured.built_from() | change


WRONG = {
    "another version's": dict(vitkernels="0.0.1"),
    "another Triton's": dict(triton="3.5.0"),
    "other kernels'": dict(source="0" * 12),
    "another build of the extension": dict(extension="0" * 12),
    "a backend that there isn't": dict(backends=["cutlass", "reference"]),
    "not all problems are taken": dict(backends=["cuda"]),
    "no list": dict(backends="reference"),
    "no date": dict(date=None),
}


@pytest.mark.parametrize("name", [None, *WRONG])
def test_only_what_holds_is_used(name):
    user_cache.write(user_cache.file_of(H100.name), {"auto/forward/half": entry(**WRONG.get(name, {}))})
    measured.rows.cache_clear()
    dispatch.forget()
    assert explained().chosen == ("triton" if name else "cuda")
    assert explained().sources["forward"] == ("shipped" if name else "measured here on 2026-01-31")


def test_a_damaged_file_is_not_used():
    user_cache.folder().mkdir(parents=True)
    user_cache.file_of(H100.name).write_text("{")
    with pytest.warns(UserWarning, match="h100"):
        assert explained().sources["forward"] == "shipped"


def test_tiles_and_backends_share_a_file():
    from vitkernels.backends.triton import config_cache

    tile = {"kernel": "gather", "config": [64, 64, 64, 4, 2], **config_cache.compiled_from()}
    config_cache.remember(H100.name, "half/x", tile)
    measured.remember(H100.name, {("forward", "half"): entry()})
    config_cache.forget_plans()
    assert set(measured.rows(H100.name)) == {("forward", "half")}
    assert set(config_cache.measured(H100.name)) == {"half/x"}
    config_cache.forget_plans()


# --- The command, and the clock.


def test_the_command(monkeypatch, capsys):
    from vitkernels.cli import tune as command

    real = backends.tune_backends
    monkeypatch.setattr(
        backends, "tune_backends", lambda device, **more: real(torch.device("cuda", 90), timer=Clock(even), **more)
    )
    monkeypatch.setattr(command, "device_of", lambda args: "cuda")
    assert cli.main(["tune", "--backends"]) == 0
    shown = capsys.readouterr().out
    assert "parameters' gradients, half, copied for wgmma" in shown
    assert "auto takes triton, then cuda, then reference" in shown
    assert cli.main(["tune", "--backends", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 12
    assert cli.main(["tune", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["entries"]
    assert {(e["gpu"], e["stale"]) for e in listed} == {("H100", False)}
    assert "auto/weight/tf32" in {e["key"] for e in listed}
    assert cli.main(["tune", "--list"]) == 0
    assert "triton, cuda" in capsys.readouterr().out
    lost = backends.GpuLost("after a forward cuda the GPU is lost to this process: run again")
    with monkeypatch.context() as patched:
        patched.setattr(backends, "tune_backends", lambda *_, **__: (_ for _ in ()).throw(lost))
        assert cli.main(["tune", "--backends"]) == 1
    assert "run again" in capsys.readouterr().out
    assert cli.main(["tune", "--backends", "--ship"]) == 2
    assert "docs/gpus.md" in capsys.readouterr().err
    assert cli.main(["tune", "--forget", "H100"]) == 0
    assert not list(user_cache.folder().glob("*.json"))


def test_no_gpu_no_times(capsys):
    with pytest.raises(NotImplementedError, match="timed on a GPU; the device is cpu"):
        backends.tune_backends("cpu")
    assert cli.main(["tune", "--backends", "--device", "cpu"]) == 2
    assert "vitkernels tune: backends are timed on a GPU" in capsys.readouterr().err


def test_an_amd_gpu_has_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    with pytest.raises(NotImplementedError, match="for AMD GPUs"):
        backends.tune_backends("cuda")


@pytest.mark.parametrize("mode", backends.MODES.values())
def test_the_clock(mode):
    case = Case(batch=2, image=32, dim=48, dtype="fp32")
    timer = backends._timer(torch.device("cpu"), 0.01)
    assert 0 < timer(case, mode, "reference") < INF
    with pytest.raises(ArithmeticError, match="NotImplementedError"):
        timer(case, mode, "cuda")
