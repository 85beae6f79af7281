"""The proof itself: it finds what is broken, and says it in one JSON object."""

import json
import subprocess
import sys

import pytest
import torch

from vitkernels import cli, dispatch
from vitkernels.testing import random_problems, verify

REFERENCE = dispatch.backend("reference")


def test_cases_are_their_seeds():
    for case in random_problems.cases(50, 20):
        again = random_problems.case(case.seed)
        assert again == case
        for a, b in zip(case.tensors().values(), again.tensors().values(), strict=True):
            if isinstance(a, torch.Tensor):
                assert a.stride() == b.stride()
                assert torch.equal(a, b)
            else:
                assert a == b
        assert "\n" not in str(case)
        assert str(case).startswith(f"seed {case.seed}: ")


def test_cases_cover_the_contract():
    seen = list(random_problems.cases(0, 1000))
    assert {c.images[0] for c in seen} == {0, 1, 2, 3, 4, 5}
    assert {c.images[1] for c in seen} == {1, 3, 4, 13}
    assert {c.weight[-1] for c in seen} == {c.weight[-2] for c in seen} == {1, 2, 3, 4, 7, 8, 12, 14, 16, 32}
    assert len({(c.image_dtype, c.weight_dtype) for c in seen}) == 20
    assert len({c.image_layout for c in seen}) == 7
    for has in (
        lambda c: len(c.images) == 5,
        lambda c: c.keep and c.keep[1] == 0,
        lambda c: c.keep and c.keep[1] > c.N,
        lambda c: c.pos_embed and len(c.pos_embed) == 3 and c.pos_embed[0] == c.images[0] > 1,
        lambda c: c.prefix and len(c.prefix) == 3 and c.prefix[0] == c.images[0] > 1,
        lambda c: c.prefix and c.prefix[-2] == 0,
        lambda c: c.padding and c.keep,
        lambda c: c.stride and c.mean and c.out_dtype,
    ):
        assert sum(map(bool, map(has, seen))) >= 5


def test_what_lies_between_is_poison():
    case = next(
        c for c in random_problems.cases(0, 999) if (c.image_layout, c.image_dtype) == ("sliced", torch.float32)
    )
    x = case.tensors()["images"]
    assert x.isfinite().all()
    assert x.as_strided((2,), (1,), x.storage_offset())[1].isnan()


def spoilt(change):
    true = REFERENCE.forward

    def forward(p, *tensors):
        tensors = list(tensors)
        out = change(p, tensors)
        return true(p, *tensors) if out is None else out(true(p, *tensors))

    return forward


def without(position):
    def change(p, tensors):
        if tensors[position] is not None:
            tensors[position] = torch.zeros_like(tensors[position])

    return change


def rounded(p, tensors):
    if p.compute_dtype == torch.float32:  # as TF32 does
        tensors[1] = tensors[1].half().float()


def next_patch(p, tensors):
    if tensors[5] is not None:
        tensors[5] = (tensors[5] + 1) % p.N


BROKEN = {
    "no bias": without(2),
    "no position": without(3),
    "no prefix": without(4),
    "weights of 11 bits": rounded,
    "keep off by one": next_patch,
    "an unwritten token": lambda p, tensors: lambda out: torch.cat([out[:, :-1], out[:, -1:] * torch.nan], 1),
    "not contiguous": lambda p, tensors: lambda out: out.mT.contiguous().mT,
    "another dtype": lambda p, tensors: lambda out: out.to(torch.float64),
    "another shape": lambda p, tensors: lambda out: out[:, :, None],
    "an exception": lambda p, tensors: 1 / 0,
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_finds_what_is_broken(name, monkeypatch):
    monkeypatch.setattr(REFERENCE, "forward", spoilt(BROKEN[name]))
    result = verify.run("cpu", "reference", count=24, seed=100)
    assert not result["ok"]
    assert all(row["reason"] for row in result["rows"] if not row["ok"])
    json.dumps(result, allow_nan=False)


def test_a_backend_that_takes_nothing_has_not_passed():
    result = verify.run("cpu", "cuda", count=1)
    assert not result["ok"]
    assert {row["ok"] for row in result["rows"]} == {None}
    assert all(row["reason"] for row in result["rows"])


def test_command_line(capsys):
    assert cli.main(["verify", "--device", "cpu", "--cases", "2", "--seed", "7", "--gradients", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["device"]) == (True, "cpu")
    rows = [r for r in result["rows"] if r["backend"] == "reference"]
    assert {r["dtype"] for r in rows} == {"float16", "bfloat16", "float32", "float64"}
    assert {"tokens", "weight"} <= {r["what"] for r in rows}
    assert all(r["error"] <= r["bound"] and r["case"].startswith("seed ") for r in rows)


def test_command_line_for_people(monkeypatch, capsys):
    assert cli.main(["verify", "--device", "cpu", "--backend", "reference", "--cases", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok"
    monkeypatch.setattr(REFERENCE, "forward", spoilt(BROKEN["not contiguous"]))
    assert cli.main(["verify", "--device", "cpu", "--backend", "reference", "--cases", "1", "--seed", "1"]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "not ok"
    assert "failed: reference, float16, tokens: not contiguous" in text
    assert cli.main(["verify", "--device", "cpu", "--backend", "cuda", "--cases", "1"]) == 1
    assert "declined 4 ×: cuda: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--cases", "0"], "--cases must be at least 1, got 0"),
     (["--device", "cuda", "--interpret"], "--interpret runs on the CPU"),
     *([] if torch.cuda.is_available() else [(["--device", "cuda"], "this PyTorch finds no GPU")])],
)  # fmt: skip
def test_wrong_words(words, message, capsys):
    assert cli.main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_interpreter_from_a_cold_start(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = ["verify", "--backend", "triton", "--interpret", "--cases", "1", "--seed", "3", "--json"]
    command = [sys.executable, "-m", "vitkernels", *words]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["ok"]
    assert result["device"] == "cpu"
