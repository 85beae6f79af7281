"""The search for tiles: its order, what it drops, that it survives being killed, and what it remembers. No GPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vitkernels as vk
from vitkernels import cli
from vitkernels.backends import triton, user_cache
from vitkernels.backends.triton import (
    backward_launch,
    backward_plan,
    config_cache,
    configs,
    forward_launch,
    forward_plan,
)
from vitkernels.backends.triton.configs import Config
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton
from vitkernels.tuning import search, tune
from vitkernels.tuning.candidates import candidates_of, estimate

H100 = NOMINAL[90]._replace(name="Some GPU 9000")
DIRECTIONS = ("forward", "weight", "images")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, nothing shipped, and no plan that an entry of another test has made."""
    monkeypatch.setenv("VITKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(user_cache, "SHIPPED", tmp_path / "shipped")
    config_cache.forget_plans()
    yield tmp_path / "cache"
    while OPEN:
        OPEN.pop().close(remove=False)
    config_cache.forget_plans()


def call(B=4, **change):
    half = torch.bfloat16
    return {
        "images": torch.zeros(B, 3, 32, 32, dtype=half), "weight": torch.zeros(64, 3, 16, 16, dtype=half),
        "bias": torch.zeros(64, dtype=half), "pos_embed": torch.zeros(5, 64, dtype=half),
        "prefix": torch.zeros(1, 64, dtype=half), **change,
    }  # fmt: skip


def planned(p, direction, gpu=H100):
    """The direction and tile that a call takes."""
    config_cache.forget_plans()
    if direction == "forward":
        taken = forward_plan.make_plan(p, gpu, True, False)
        return taken.kernel, taken.config
    if direction == "images":
        return direction, backward_plan.image_launch(p, p.image_strides, gpu, p.out_dtype, False)[0].config
    wanted = backward_plan.Wanted(True, True, True, True)
    plan = backward_plan.reduction(p, gpu, backward_plan.dense(p), wanted, False)
    return ("weight_descriptor", plan.weight.config) if plan.weight else ("weight", plan.reduce.config)


def choices(*tiles):
    return [("gather", Config(*tile)) for tile in tiles]


class FakeClock:
    """Times of candidates by a rule, with what was asked for; a candidate of no time raises."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, choice, ms):
        self.asked.append((choice, ms))
        time_ = self.rule(choice)
        if time_ is None:
            raise RuntimeError("out of resource: shared memory")
        return time_

    @property
    def looks(self):
        return [choice for choice, ms in self.asked if ms == search.SHORT]


OPEN: list[search.Journal] = []


def journal(tmp_path, head=None):
    OPEN.append(search.Journal(tmp_path / "a.journal", head or {"key": "k"}))
    return OPEN[-1]


def found(candidates, clock, notes, **more):
    return search.search(candidates, clock, notes, **more)


# --- The order.


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("B", [1, 8, 256])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_candidates_begin_with_the_default_and_go_on_by_promise(arch, B, direction):
    gpu = NOMINAL[arch]
    p = compile_triton.problem(16, "bf16", B=B)
    found = candidates_of(p, gpu, True, direction)
    assert len(set(found)) == len(found) > 10
    assert found[0] == planned(p, direction, gpu)
    if direction == "forward":
        assert all(configs.fitted(p, c, gpu) == c for _, c in found)
    others = found[1:]
    firsts = [c for i, c in enumerate(found) if search._tile(c) not in map(search._tile, found[:i])]
    assert found[: len(firsts)] == firsts, "every tile is looked at once before any is varied"
    if direction == "forward":
        sizes = p.image_dtype.itemsize, p.compute_dtype.itemsize
        costs = [estimate(p.B * p.N, p.D, p.K, c, gpu, "half", *sizes) for _, c in others]
        for part in (costs[: len(firsts) - 1], costs[len(firsts) - 1 :]):
            assert part == sorted(part)
        assert max(costs) <= 3 * min(costs)


def test_the_estimate_counts_waves_and_traffic():
    big, small = Config(128, 256, 64, 8, 3), Config(64, 64, 64, 4, 3)
    cost = lambda c, M: estimate(M, 768, 768, c, H100, "half", 2, 2)  # noqa: E731
    assert cost(big, 1 << 16) < cost(small, 1 << 16)  # as many multiply-adds, an eighth of the programs' reads
    assert cost(small, 196) < cost(big, 196)  # 6 programs for 132 multiprocessors against 48
    assert estimate(64, 64, 64, small, H100, "half", 2, 2) == 64**3 + 0.7 * 64 * (64 * 2 + 64 * 2)


# --- The search.


def test_finds_the_fastest_and_times_the_finalists_in_turns(tmp_path):
    candidates = choices(*((BM, BN, 32, 4, 3) for BM in (32, 64, 128) for BN in (32, 64, 128)))
    times = dict(zip(candidates, (3.0, 2.0, 1.0, 1.1, 1.2, 5.0, 0.9, 1.0, 1.3), strict=True))
    clock = FakeClock(times.get)
    result = found(candidates, clock, journal(tmp_path))
    assert (result.choice, result.ms, result.default_ms) == (candidates[6], 0.9, 3.0)
    assert clock.looks == candidates and result.tried == 9
    near = [candidates[i] for i in (6, 2, 7, 3)]  # within 1.3 × of 0.9: neither 1.2 nor 1.3
    last = [choice for choice, ms in clock.asked if ms == search.LONG]
    assert last == [*near, candidates[0]] * search.ROUNDS


def test_other_stages_of_a_hopeless_tile_are_not_tried(tmp_path):
    slow, fast = (64, 64, 32), (128, 128, 32)
    candidates = choices((*slow, 4, 3), (*fast, 8, 3), (*slow, 4, 2), (*fast, 8, 4), (*slow, 8, 2))
    clock = FakeClock(lambda c: 2.0 if c[1].BM == 64 else 1.0)
    result = found(candidates, clock, journal(tmp_path))
    assert clock.looks == [candidates[i] for i in (0, 1, 3)]
    assert (result.tried, result.dropped) == (3, 2)


def test_a_candidate_that_fails_takes_nobody_with_it(tmp_path):
    candidates = choices((64, 64, 32, 4, 5), (64, 64, 32, 4, 2))
    result = found(candidates, FakeClock(lambda c: None if c[1].stages == 5 else 1.0), journal(tmp_path))
    assert result.choice == candidates[1] and result.default_ms is None
    with pytest.raises(RuntimeError, match="none of 2 candidates ran"):
        found(candidates, FakeClock(lambda c: None), journal(tmp_path / "other"))


def test_the_default_stays_where_nothing_is_clearly_faster(tmp_path):
    candidates = choices((64, 64, 32, 4, 3), (64, 64, 32, 4, 4))
    result = found(candidates, FakeClock(lambda c: {3: 1.0, 4: 0.99}[c[1].stages]), journal(tmp_path))
    assert result.choice == candidates[0]


def test_the_time_is_kept_and_told(tmp_path):
    candidates = choices(*((64, 64, 32, 4, stages) for stages in range(1, 9)))
    now, events = [0.0], []

    def timer(choice, ms):
        now[0] += 10
        return 1.0

    notes = journal(tmp_path)
    result = search.search(candidates, timer, notes, seconds=35, clock=lambda: now[0], progress=events.append)
    assert result.tried == 4
    assert [e.seconds_left for e in events[:3]] == [35, 25, 25]
    assert events[1].text == "gather 64×64×32 4w 1s: 1000.0 µs" and events[1].best_ms == 1.0
    assert events[1].done == 1 and events[1].total == 8


def test_a_lost_device_stops_the_search_and_the_next_goes_on_behind_the_culprit(tmp_path):
    candidates = choices(*((64, 64, 32, 4, stages) for stages in (2, 3, 4)))

    def alive():
        raise RuntimeError("an illegal memory access was encountered")

    clock = FakeClock(lambda c: None if c[1].stages == 3 else 1.0)
    with pytest.raises(RuntimeError, match="illegal"), search.journal(tmp_path / "j", {"key": "k"}) as notes:
        found(candidates, clock, notes, alive=alive)
    clock = FakeClock(lambda c: 1.0)
    with search.journal(tmp_path / "j", {"key": "k"}) as notes:
        result = found(candidates, clock, notes)
    assert clock.looks == [candidates[2]] and (result.tried, result.resumed) == (3, 2)
    assert not (tmp_path / "j").exists()


# --- Killed.

KILLED = """
import os, signal, sys
from vitkernels.backends.triton.configs import Config
from vitkernels.tuning import search

candidates = [("gather", Config(64, 64, 32, 4, stages)) for stages in range(1, 7)]

def timer(choice, ms):
    if choice[1].stages == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(choice[1].stages)

with search.journal(__import__("pathlib").Path(sys.argv[1]), {"key": "k"}) as notes:
    search.search(candidates, timer, notes)
"""


def test_killed_it_goes_on_and_leaves_out_what_killed_it(tmp_path):
    file = tmp_path / "j"
    done = subprocess.run([sys.executable, "-c", KILLED, file], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with file.open("ab") as out:
        out.write(b'{"event": "do')  # it was writing
    candidates = choices(*((64, 64, 32, 4, stages) for stages in range(1, 7)))
    clock = FakeClock(lambda c: 0.5 if c[1].stages == 6 else 9.0)
    with search.journal(file, {"key": "k"}) as notes:
        result = found(candidates, clock, notes)
        assert file.read_bytes().endswith(b"\n") and [json.loads(line) for line in file.read_bytes().splitlines()]
    assert clock.looks == candidates[4:], "1 to 3 are known, 4 ended the process"
    assert result.choice == candidates[5] and result.resumed == 4
    assert not file.exists()


def test_another_driver_or_triton_begins_anew(tmp_path):
    candidate = choices((64, 64, 32, 4, 2))[0]
    notes = journal(tmp_path, {"key": "k", "triton": "3.6.0"})
    notes.done(candidate, ms=1.0)
    notes.close(remove=False)
    again = journal(tmp_path, {"key": "k", "triton": "3.6.0"})
    assert again.times == {candidate: 1.0}
    again.close(remove=False)
    assert journal(tmp_path, {"key": "k", "triton": "3.7.0"}).times == {}


@pytest.mark.parametrize("text", [b"", b"\x00\xff garbage\n", b'{"head": ', b'[1]\n{"head": {"key": "k"}}\n'])
def test_a_damaged_journal_begins_anew(text, tmp_path):
    (tmp_path / "a.journal").write_bytes(text)
    notes = journal(tmp_path)
    assert notes.times == {}
    notes.done(choices((64, 64, 32, 4, 2))[0], ms=1.0)
    notes.close(remove=False)
    assert len(journal(tmp_path).times) == 1


def test_an_interrupted_candidate_is_tried_again(tmp_path):
    def timer(choice, ms):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), search.journal(tmp_path / "a.journal", {"key": "k"}) as notes:
        found(choices((64, 64, 32, 4, 2)), timer, notes)
    assert journal(tmp_path).times == {}


def test_two_processes_do_not_search_the_same_problem(tmp_path):
    pytest.importorskip("fcntl")
    first = journal(tmp_path)
    with pytest.raises(BlockingIOError, match="another process"):
        journal(tmp_path)
    first.close(remove=True)
    journal(tmp_path).close(remove=True)


# --- The whole, from a call to the plan.


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tune_keeps_what_the_plan_then_takes(direction, cache):
    p = vk.explain(**call()).problem
    found = candidates_of(p, H100, call()["images"].data_ptr() % 16 == 0, direction)
    best = found[7]
    clock = FakeClock(lambda c: 0.7 if c == best else 1.0)
    result = tune.tune(call(), direction=direction, gpu=H100, timer=clock)
    assert (result["kernel"], Config(*result["config"])) == best
    assert (result["ms"], result["default_ms"], result["tried"]) == (0.7, 1.0, len(found))
    assert [f.name for f in cache.iterdir() if f.suffix != ".lock"] == ["some-gpu-9000.json"]
    [(key, entry)] = json.loads(Path(result["file"]).read_text()).items()
    assert key == result["key"]
    assert {"ms", "default_ms", "gpu", "driver", "triton", "vitkernels", "date"} <= entry.keys()
    assert planned(p, direction) == best
    config_cache.forget_plans()
    for other in DIRECTIONS:
        if other != direction:  # theirs are the tables' still
            assert planned(p, other) == candidates_of(p, H100, True, other)[0]


def test_tune_ships_into_the_package(cache):
    result = tune.tune(call(), gpu=H100, timer=FakeClock(lambda c: 1.0), ship=True)
    assert Path(result["file"]) == user_cache.SHIPPED / "some-gpu-9000.json"
    assert config_cache.measured(H100.name)
    assert not list(cache.glob("*.json"))


@pytest.mark.parametrize(
    ("change", "error"), [({"direction": "sums"}, "direction"), ({"direction": "images"}, "uint8")]
)
def test_tune_refuses(change, error):
    wrong = call(images=torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=error):
        tune.tune(wrong, gpu=H100, timer=FakeClock(lambda c: 1.0), **change)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_tile_that_is_timed_is_the_one_asked_for_and_right(direction, device, monkeypatch):
    tensors = {k: torch.randn_like(t, device=device) for k, t in call(B=2).items()}
    p = vk.explain(**tensors).problem
    choice = candidates_of(p, H100, tensors["images"].data_ptr() % 16 == 0, direction)[3]
    taken = []
    home = forward_launch if direction == "forward" else backward_launch
    bound = home.bound
    monkeypatch.setattr(home, "bound", lambda name, config, *rest: taken.append(config) or bound(name, config, *rest))
    run = tune.runner(p, tensors, direction)
    run(choice)
    assert choice[1] in taken

    name = "forward" if direction == "forward" else "backward"
    true = getattr(triton, name)

    def wrong(*arguments, choice):
        out = true(*arguments, choice=choice)
        for t in [out] if direction == "forward" else [g for g in arguments[-1] if g is not None]:
            t[..., -1] += 3 * t.abs().max()
        return out

    monkeypatch.setattr(triton, name, wrong)
    run(choice)  # it was checked, and is not again
    with pytest.raises(ArithmeticError, match="differs from the definition"):
        run(candidates_of(p, H100, True, direction)[4])


# --- What is remembered.


def entry(**change):
    made = {"kernel": "gather", "config": [64, 64, 64, 4, 2, 1.0], "ms": 0.1, "default_ms": 0.13}
    return made | config_cache.compiled_from() | change


WRONG = {
    "too many stages for the GPU": entry(config=[128, 128, 128, 8, 8, 1.0]),
    "a kernel of another direction": entry(kernel="weight"),
    "another Triton's": entry(triton="3.5.0"),
    "another source's": entry(source="0" * 12),
    "an older version's, which noted neither": {"kernel": "gather", "config": [64, 64, 64, 4, 2, 1.0], "ms": 0.1},
    "no kernel": {"config": [64, 64, 64, 4, 2]},
    "no power of two": entry(config=[65, 64, 64, 4, 2]),
    "too short": entry(config=[64, 64]),
    "words": entry(config=["64", "64", "64", "4", "2"]),
    "a list": [1, 2],
    "nothing": None,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_entry_that_does_not_fit_is_not_used(name, cache):
    p = compile_triton.problem(16, "bf16")
    default = planned(p, "forward")
    cache.mkdir()
    file = user_cache.file_of(H100.name)
    file.write_text(json.dumps({config_cache.key(p, "half", True): WRONG[name]}))
    config_cache.measured.cache_clear()
    assert planned(p, "forward") == default
    file.write_text(json.dumps({config_cache.key(p, "half", True): entry()}))
    config_cache.measured.cache_clear()
    assert planned(p, "forward") == ("gather", Config(64, 64, 64, 4, 2))


def test_the_users_entries_go_before_the_shipped():
    config_cache.remember(H100.name, "a", entry(ms=1.0), ship=True)
    config_cache.remember(H100.name, "b", entry(ms=2.0), ship=True)
    config_cache.remember(H100.name, "a", entry(ms=3.0))
    assert {key: e["ms"] for key, e in config_cache.measured(H100.name).items()} == {"a": 3.0, "b": 2.0}


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00"])
def test_a_damaged_file_is_set_aside(text, cache):
    cache.mkdir()
    file = user_cache.file_of(H100.name)
    file.write_text(text)
    with pytest.warns(UserWarning, match="some-gpu-9000"):
        assert config_cache.measured(H100.name) == {}
    with pytest.warns(UserWarning, match="some-gpu-9000"):
        config_cache.remember(H100.name, "a", entry())
    assert list(config_cache.measured(H100.name)) == ["a"]
    assert file.with_suffix(".damaged").read_text() == text


REMEMBER = """
import sys, time
from pathlib import Path
from vitkernels.backends import user_cache

name, folder = sys.argv[1], Path(sys.argv[2])
(folder / name).touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for i in range(25):
    entry = {"kernel": "gather", "config": [64, 64, 64, 4, 2]}
    user_cache.write(user_cache.file_of("g"), {f"{name} {i}": entry})
"""


def test_a_tile_with_a_hazard_is_not_launched(device, monkeypatch):
    tensors = {k: torch.randn_like(t, device=device) for k, t in call(B=2).items()}
    p = vk.explain(**tensors).problem
    run = tune.runner(p, tensors, "forward")
    monkeypatch.setattr(tune, "hazard_of", lambda p, choice: "LDSM R4: touches R4" * (choice[1].warps == 8))
    monkeypatch.setattr(triton, "forward", lambda *_, choice: pytest.fail(f"{choice} was launched"))
    with pytest.raises(ArithmeticError, match="hazard: LDSM R4"):
        run(("gather", Config(64, 64, 64, 8, 2)))


def test_processes_that_remember_at_once_lose_nothing(tmp_path):
    pytest.importorskip("fcntl")
    running = [subprocess.Popen([sys.executable, "-c", REMEMBER, name, tmp_path]) for name in "ab"]
    while not all((tmp_path / name).exists() for name in "ab"):
        assert all(p.poll() is None for p in running)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [p.wait(60) for p in running] == [0, 0]
    assert len(user_cache.read(user_cache.file_of("g"))) == 50


def test_without_fcntl_it_remembers_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for key in "ab":
        user_cache.write(user_cache.file_of("g"), {key: entry()})
    assert list(user_cache.read(user_cache.file_of("g"))) == ["a", "b"]


def test_keys_tell_apart_what_has_a_say_in_the_tile():
    p = compile_triton.problem(16, "bf16", B=8)
    others = [
        compile_triton.problem(16, "bf16", B=16), compile_triton.problem(16, "bf16", B=8, D=384),
        compile_triton.problem(16, "fp32", B=8),
        compile_triton.problem(16, "bf16", B=8, keep=True), compile_triton.problem(32, "bf16", B=8),
        vk.explain(**call(images=call(8)["images"].contiguous(memory_format=torch.channels_last))).problem,
        vk.explain(**call(8)).problem,
    ]  # fmt: skip
    keys = [config_cache.key(q, "half", False) for q in (p, *others)]
    keys += [
        config_cache.key(p, "half", True),
        *(config_cache.key(p, "half", False, direction) for direction in DIRECTIONS[1:]),
    ]
    assert len(set(keys)) == len(keys)
    assert (
        config_cache.key(compile_triton.problem(16, "bf16", B=9), "half", False) == keys[0]
    )  # both of 2^10 to 2^11 patches


# --- The command.


def run(*argv, capsys):
    status = cli.main(["tune", *argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_list_and_forget_work_without_a_gpu(cache, capsys):
    config_cache.remember("GPU One", "half/x", entry(gpu="GPU One", triton="0.1", date="2026-01-31"))
    config_cache.remember("GPU Two", "weight/half/y", entry(gpu="GPU Two"), ship=True)
    (cache / "gpu-one.0123.journal").write_text("{}\n")
    status, listed = run("--list", capsys=capsys)
    assert status == 0
    assert [(e["gpu"], e["key"], e["shipped"], e["stale"]) for e in listed["entries"]] == [
        ("GPU Two", "weight/half/y", True, False), ("GPU One", "half/x", False, True),
    ]  # fmt: skip
    assert cli.main(["tune", "--list"]) == 0
    out = capsys.readouterr().out
    assert "1.30" in out and "stale" in out and "64×64×64" in out

    config_cache.remember("GPU Three", "half/x", entry())
    if not torch.cuda.is_available():
        assert cli.main(["tune", "--forget"]) == 2
        assert "gpu-one | gpu-three" in capsys.readouterr().err
    status, forgotten = run("--forget", "GPU One", capsys=capsys)
    assert status == 0
    assert {Path(f).name for f in forgotten["forgotten"]} == {
        "gpu-one.json", "gpu-one.json.lock", "gpu-one.0123.journal",
    }  # fmt: skip
    assert [f.name for f in cache.glob("*.json")] == ["gpu-three.json"]
    assert cli.main(["tune", "--forget", "GPU One"]) == 0
    assert "nothing to forget" in capsys.readouterr().out


@pytest.fixture
def pretended(monkeypatch):
    """A GPU with which the command goes through everything but the timing: tensors stay on the CPU."""
    asked = []
    real = tune.tune

    def tuned(call, **options):
        asked.append((options["direction"], vk.explain(**call).problem))
        return real(call, gpu=H100, timer=FakeClock(lambda c: 1.0 if c[1].stages == 3 else 1.5), **options)

    from vitkernels.cli import tune as command

    monkeypatch.setattr(tune, "tune", tuned)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: H100.name)
    monkeypatch.setattr(torch, "device", lambda name: type("D", (), {"type": "cuda"})() if name == "gpu" else name)
    monkeypatch.setattr(command, "device_of", lambda args: "gpu")
    monkeypatch.setattr(command, "dtype_of", lambda args, device: "bf16")
    monkeypatch.setattr(command, "case_of", lambda args, device, batch: OnCpu(args, batch))
    return asked


class OnCpu:
    def __init__(self, args, batch):
        from vitkernels.cli import options

        self.case = options.case_of(args, "cpu", batch)
        self.dtype, self.autocast = self.case.dtype, self.case.autocast

    def call(self, device):
        return self.case.call("cpu")


def test_the_command_tunes_every_batch_and_road(pretended, capsys):
    argv = ("--image", "32", "--dim", "64", "--batch", "2,64", "--dtype", "bf16", "--mode", "both")
    status, result = run(*argv, capsys=capsys)
    assert status == 0 and result["gpu"] == H100.name
    assert [(direction, p.B) for direction, p in pretended] == [
        (direction, B) for B in (2, 64) for direction in DIRECTIONS
    ]
    assert [row["kernel"] for row in result["tuned"] if row["key"].startswith("weight/")] == ["weight"] * 2
    pretended.clear()
    assert cli.main(["tune", *argv, "--pixels", "uint8"]) == 0
    assert [direction for direction, _ in pretended] == ["forward", "weight"] * 2  # bytes have no gradient
    assert "× default" in capsys.readouterr().out


def test_the_shape_of_a_model():
    pytest.importorskip("timm")
    from vitkernels.cli.tune import _front_end

    make = _front_end("timm:vit_tiny_patch16_224", "bf16", "uint8")
    p = vk.explain(**make(3, "cpu")).problem
    assert (p.B, p.D, p.P, p.N, p.T, p.has_bias, p.pos_rows) == (3, 192, (1, 16, 16), 196, 1, True, 197)
    assert (p.image_dtype, p.weight_dtype, p.normalised) == (torch.uint8, torch.bfloat16, True)
    with pytest.raises(ValueError, match="no front end"):
        _front_end("timm:resnet10t", "bf16", None)


def test_the_command_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["tune", "--image", "32"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["tune", "--batch", "8,many"])


def test_packages_ship_the_tables(tmp_path):
    """vitkernels/tuned/ has no modules: setuptools must take it along all the same."""
    setuptools = pytest.importorskip("setuptools")
    folder = tmp_path / "vitkernels" / "tuned"
    folder.mkdir(parents=True)
    (tmp_path / "vitkernels" / "__init__.py").touch()
    (folder / "gpu.json").write_text("{}")
    found_ = setuptools.find_namespace_packages(str(tmp_path), include=["vitkernels", "vitkernels.*"])
    assert "vitkernels.tuned" in found_
