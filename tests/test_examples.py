"""examples/train.py: it learns, fused or not alike; whatever stops it, it ends where it would have ended."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import vitkernels as vk

for name in ("timm", "sklearn", "torchvision", "matplotlib", "skimage"):
    pytest.importorskip(name)

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
SIZES = ("patch_size=4", "embed_dim=16", "depth=2", "num_heads=2")
SMALL = ("--model", "vit_tiny_patch16_224", "--model-args", *SIZES, "--device", "cpu", "--warmup", "0")
OF_THE_CLOCK = {"seconds", "images_per_s"}


@pytest.fixture(scope="module")
def train():
    """The script as a module, with its neighbour data.py."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import train
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return train


@pytest.fixture
def result(train, capsys):
    """What --json prints, of a run in this process."""

    def run(out, *words, **_):
        capsys.readouterr()
        assert train.main([*map(str, words), "--out", str(out), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Crops of three photographs as ImageFolder wants them: 3 x 8 to train, 3 x 3 to validate."""
    import numpy as np
    from PIL import Image
    from skimage import data

    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in ("astronaut", "coffee", "rocket"):
        image = getattr(data, name)()
        for part, count in (("train", 8), ("val", 3)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                y, x = (random.integers(0, size - 96) for size in image.shape[:2])
                Image.fromarray(image[y : y + 96, x : x + 96]).save(folder / f"{i}.png")
    return root


def history(out):
    return json.loads((out / "history.json").read_text())


def curve(out):
    """Without what a clock says."""
    return [{key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in history(out)]


def close(left, right, rel=1e-3):
    """Two curves within the rounding of other kernels or another order of sums, and two images."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a["epoch"], a["lr"], a["val_images"]) == (b["epoch"], b["lr"], b["val_images"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=rel)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=5 * rel)
        assert a.get("val_accuracy", 0) == pytest.approx(b.get("val_accuracy", 0), abs=2.5 / a["val_images"])


def environment():
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def torchrun(out, *words, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(SCRIPT), *map(str, words), "--out", str(out), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_digits_are_learnt(result, tmp_path):
    found = result(tmp_path, "--device", "cpu", "--epochs", 40)  # of 60: a minute
    # Eight seeds had 95.6 to 97.8 % by then, fused or not, and another order of summation is as good as a seed.
    assert found["val_accuracy"] >= 0.95
    assert found["fused"] and "projection, position and prefix tokens" in found["front_end"]
    assert len(history(tmp_path)) == found["epoch"] == 40
    assert found["val_images"] == 360


@pytest.mark.parametrize("task", ("classify", "mae"))
def test_fused_and_unfused_learn_alike(result, tmp_path, monkeypatch, task):
    calls = []

    def counted(images, *args, true=vk.patch_embed, **kwargs):
        calls.append(images.dtype)
        return true(images, *args, **kwargs)

    monkeypatch.setattr(vk, "patch_embed", counted)
    monkeypatch.setattr("vitkernels.fusing.swapping.patch_embed", counted)
    words = ("--device", "cpu", "--task", task, "--epochs", 4, "--warmup", 1)
    fused = result(tmp_path / "fused", *words)
    updates, batches = 4 * 22, 4 * 6
    assert calls == [torch.uint8 if task == "mae" else torch.float32] * (updates + batches)

    plain = result(tmp_path / "plain", *words, "--no-fuse", "--compare", tmp_path / "fused")
    assert len(calls) == updates + batches
    assert (fused["fused"], plain["fused"]) == (True, False)
    first, other = curve(tmp_path / "fused"), curve(tmp_path / "plain")
    close(first[:1], other[:1], rel=1e-5)
    close(first, other, rel=5e-3)
    assert first[-1]["train_loss"] < 0.95 * first[0]["train_loss"]
    assert Path(plain["picture"]).stat().st_size > 20_000


# With everything that has a state: what is forgotten shows in the last digit.
STATEFUL = ("--batch", 64, "--accumulate", 2, "--ema", 0.9, "--mixup", 0.2, "--cutmix", 0.2)


def test_killed_in_the_middle_of_an_epoch(result, tmp_path):
    words = ("--device", "cpu", *STATEFUL, "--epochs", 4, "--warmup", 1)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(SCRIPT), *map(str, words), "--out", str(killed)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(12000):
            done = 0
            with suppress(FileNotFoundError):
                done = len(history(killed))
            if done >= 2 or process.poll() is not None:
                break
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(history(killed))
    assert 2 <= done < 4

    found = result(killed, *words)
    assert found["resumed_after"] >= done
    result(whole, *words)
    assert curve(killed) == curve(whole)
    same_weights(killed, whole)
    assert result(killed, *words)["resumed_after"] == 4  # nothing is left to do
    assert curve(killed) == curve(whole)


def same_weights(left, right):
    left, right = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (left, right))
    for part in ("model", "ema"):
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(left[part][name], right[part][name]) for name in left[part])


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("where", ("save", "fsync", "replace", "history"))
def test_killed_while_the_checkpoint_is_written(train, result, tmp_path, monkeypatch, where):
    words = (*SMALL, "--epochs", 3, "--ema", 0.9)
    result(tmp_path / "whole", *words)
    calls = []

    def half(state, stream, true=torch.save):
        calls.append(where)
        if len(calls) == 2:
            stream.write(b"PK\x03\x04 the first bytes")
            raise KilledError
        true(state, stream)

    def second(*args, true, at=2):
        calls.append(where)
        if len(calls) == at:
            raise KilledError
        return true(*args)

    with monkeypatch.context() as patch:  # each epoch syncs and replaces two files: the checkpoint's are calls 1, 3, 5
        if where == "save":
            patch.setattr(train.torch, "save", half)
        else:
            true, at = getattr(os, "replace" if where == "history" else where), 4 if where == "history" else 3
            patch.setattr(os, true.__name__, lambda *args: second(*args, true=true, at=at))
        with pytest.raises(KilledError):
            train.main([*map(str, words), "--out", str(tmp_path / "killed"), "--json"])

    written = 2 if where == "history" else 1
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == written and len(history(tmp_path / "killed")) == 1
    assert result(tmp_path / "killed", *words)["resumed_after"] == written
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    same_weights(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.part"))


@pytest.mark.parametrize("parallel", ("ddp", "fsdp2"))
def test_two_processes_learn_as_one_does(result, tmp_path, photographs, parallel):
    """Begun by one process, gone on with by two, ended by one; 9 images to validate, which two can't share evenly."""
    words = ("--data", photographs, *SMALL, "--img-size", 32, "--workers", 0, "--epochs", 4, "--batch", 8, "--lr", 2e-3)
    words += ("--accumulate", 2, "--ema", 0.5)
    result(tmp_path / "one", *words)
    result(tmp_path / "two", *words, "--stop-after", 1)
    found = torchrun(tmp_path / "two", *words, "--stop-after", 3, "--parallel", parallel)
    assert (found["processes"], found["parallel"], found["resumed_after"], found["epoch"]) == (2, parallel, 1, 3)
    assert found["val_images"] == 9 and found["fused"]
    result(tmp_path / "two", *words)
    close(curve(tmp_path / "one"), curve(tmp_path / "two"))
    one, two = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-2, atol=1e-3)


def test_folder_of_photographs(result, tmp_path, photographs):
    words = ("--data", photographs, *SMALL, "--img-size", 32, "--workers", 1, "--epochs", 8, "--batch", 8, "--lr", 3e-3)
    found = result(tmp_path, *words)
    first, last = history(tmp_path)[0], history(tmp_path)[-1]
    assert last["train_loss"] < 0.9 * first["train_loss"] < 0.9 * 1.5 * math.log(3)
    assert found["val_accuracy"] > 1 / 3 and found["val_images"] == 9


def test_an_image_depends_on_seed_epoch_and_index_alone(train, photographs):
    data = train.load(str(photographs), 32, seed=0)
    options = dict(rank=0, world=1, train=True)
    first = list(train.batches(data.train, 5, epoch=0, **options))
    assert [images.shape for images, _ in first] == [(5, 3, 32, 32)] * 4  # 4 of 24 are left for another epoch
    assert first[0][0].dtype == torch.uint8
    other = list(train.batches(data.train, 5, epoch=0, num_workers=2, **options))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, other, strict=True))
    order = [int(image.sum()) for images, _ in train.batches(data.train, 5, epoch=1, **options) for image in images]
    assert not {int(image.sum()) for images, _ in first for image in images} & {*order}

    halves = [list(train.batches(data.train, 4, epoch=0, rank=rank, world=2, train=True)) for rank in (0, 1)]
    whole = train.batches(data.train, 8, epoch=0, **options)
    for (images, _), (left, _), (right, _) in zip(whole, *halves, strict=True):
        assert torch.equal(images, torch.stack([left, right], 1).flatten(0, 1))
    assert torch.equal(data.val[3][0], data.val[3][0])


def test_mae_learns_and_initialises_the_classifier(train, result, tmp_path):
    words = ("--device", "cpu", "--epochs", 16)
    found = result(tmp_path / "mae", *words, "--task", "mae", "--warmup", 1)
    rows = history(tmp_path / "mae")
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"] and rows[-1]["val_loss"] < 0.95 * rows[0]["val_loss"]
    assert "val_accuracy" not in found and found["fused"] and "4 visible patches of 8" in found["front_end"]

    encoder = torch.load(tmp_path / "mae" / "checkpoint.pt", weights_only=True)["model"]
    words = ("--device", "cpu", "--init", tmp_path / "mae")
    run = train.start(train.options([*map(str, words), "--out", str(tmp_path / "tuned")]))
    own = run.bare.state_dict()
    taken = {
        name for name, value in own.items() if torch.equal(value, encoder.get(f"encoder.{name}", own["cls_token"]))
    }
    assert {*own} - taken == {"head.weight", "head.bias"}
    found = result(tmp_path / "tuned", *words, "--epochs", 1, "--warmup", 0)
    assert found["train_loss"] < math.log(10)


@pytest.mark.parametrize("amp", ("bf16", "fp16"))
def test_half_precision(result, tmp_path, amp):
    words = (*SMALL, "--epochs", 1, "--batch", 256)
    exact = result(tmp_path / "exact", *words)
    half = result(tmp_path / "half", *words, "--amp", amp)
    assert half["train_loss"] == pytest.approx(exact["train_loss"], rel=0.01)
    assert half["train_loss"] != exact["train_loss"]


def test_no_decay_of_biases_norms_positions_and_tokens(train, tmp_path):
    run = train.start(train.options(["--task", "mae", "--device", "cpu", "--out", str(tmp_path)]))
    decayed = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in run.bare.named_parameters() if id(parameter) in decayed}
    assert names and all(name.endswith(".weight") and "norm" not in name for name in names)
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(list(run.bare.parameters()))


def test_another_training_in_the_folder(train, result, tmp_path, capsys):
    words = [*map(str, (*SMALL, "--epochs", 2, "--batch", 256))]
    result(tmp_path, *words, "--stop-after", 1)
    assert train.main([*words, "--lr", "0.5", "--seed", "3", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "--lr 0.016, not 0.5" in line and "--seed 0, not 3" in line and "--fresh" in line
    assert train.main([*words, "--no-fuse", "--out", str(tmp_path)]) == 2
    assert "--fuse True, not False" in capsys.readouterr().err
    assert result(tmp_path, *words, "--seed", 3, "--fresh")["resumed_after"] == 0
    assert result(tmp_path, *words, "--seed", 3)["resumed_after"] == 2


WRONG = {
    "size and patch": (["--img-size", "9"], "9x9 pixels are no multiple of patches of 4x2: 1 rows and 1 columns"),
    "no folder": (["--data", "/nowhere"], "no folder /nowhere/train"),
    "batch and parts": (["--batch", "10", "--accumulate", "3"], "--batch 10 is not divisible by 1 processes x"),
    "batch and images": (["--batch", "2000"], "--batch 2000 is more than the 1437 training images"),
    "no torchrun": (["--parallel", "ddp"], "--parallel ddp needs torchrun"),
    "no model": (["--model", "vit_unheard_of"], "no model 'vit_unheard_of'"),
    "no ViT": (["--model", "resnet18"], "img_size"),
    "registers": (["--task", "mae", "--model-args", "reg_tokens=2", "patch_size=2"], "no registers"),
    "no such argument": (["--model-args", "depht=3"], "depht"),
    "warm-up": (["--epochs", "3", "--warmup", "3"], "--warmup 3 leaves nothing of --epochs 3"),
    "smoothing": (["--smoothing", "1.5"], "--smoothing must be from 0 to 1, got 1.5"),
    "odd mixup": (["--mixup", "0.5", "--batch", "33"], "--batch 33 in 1 parts has 33 in each"),
    "all masked": (["--task", "mae", "--mask-ratio", "0.99"], "--mask-ratio 0.99 of 8 patches leaves 0 visible"),
    "no checkpoint": (["--init", "/nowhere.pt"], "--init /nowhere.pt: there is no such checkpoint"),
    "not a checkpoint": (["--init", str(SCRIPT)], "is no checkpoint"),
    "no comparison": (["--compare", "/nowhere"], "there is no /nowhere/history.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(train, tmp_path, capsys, name):
    words, expected = WRONG[name]
    assert train.main([*words, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_words(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--epochs", "0"])
    assert stopped.value.code == 2 and "must be at least 1, got 0" in capsys.readouterr().err


def test_wrong_folder(train, tmp_path, photographs, capsys):
    (tmp_path / "train").symlink_to(photographs / "train")
    (tmp_path / "val" / "tea").mkdir(parents=True)
    (tmp_path / "val" / "tea" / "0.png").symlink_to(photographs / "val" / "coffee" / "0.png")
    assert train.main(["--data", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "4 classes are not in both train and val: astronaut, coffee, rocket, tea" in capsys.readouterr().err
