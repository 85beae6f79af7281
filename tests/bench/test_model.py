"""Whole models before and after fuse: what is built, what is timed, what the verdict may say; the way from JPEGs."""

import importlib.util
import json

import pytest
import torch

import vitkernels as vk
from vitkernels import cli
from vitkernels.backends import reference
from vitkernels.bench import input_pipeline, model, model_zoo
from vitkernels.bench.model import load_model

SMALL = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=48,patch_size=8"
TINY = {  # specification: size of an input
    "timm:test_vit": (3, 160, 160),
    f"transformers:ViTModel,image_size=32,{SMALL}": (3, 32, 32),
    f"transformers:ViTMAEModel,image_size=32,{SMALL}": (3, 32, 32),
    f"transformers:VideoMAEModel,image_size=16,num_frames=4,{SMALL}": (4, 3, 16, 16),
    f"transformers:VideoMAEModel,image_size=16,num_frames=4,mask_ratio=0.75,{SMALL}": (4, 3, 16, 16),
    "vit_pytorch:ViT,image_size=32,patch_size=8,dim=32,depth=1,heads=2,mlp_dim=48": (3, 32, 32),
}
MASKED = next(spec for spec in TINY if "mask_ratio" in spec)


@pytest.fixture(autouse=True)
def installed(request):
    spec = getattr(request.node, "callspec", None) and request.node.callspec.params.get("spec", "timm:")
    pytest.importorskip((spec or "timm:").partition(":")[0])


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("spec", TINY)
def test_rows(spec, mode):
    result = model.bench_model(spec, batch=2, seconds=0.01, mode=mode)
    assert [row["impl"] for row in result["rows"]] == ["before", "fused"]
    for row in result["rows"]:
        assert (row["case"], row["mode"], row["dtype"], row["batch"]) == (spec, mode, "fp32", 2)
        assert (row["bytes"], row["flops"], row["roofline_share"]) == (None, None, None)
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"]["median"], rel=1e-3)
        assert row["peak_mb"] > 0
        front = result["front_end"][row["impl"]]
        assert front["share"] == pytest.approx(min(1, front["ms"]["median"] / row["ms"]["median"]), rel=1e-3)
    ratio = result["rows"][1]["ratio"]
    assert ratio["p20"] <= ratio["median"] <= ratio["p80"]
    assert 1 / ratio["p80"] <= result["gain"]["median"] * 1.001 and result["gain"]["median"] <= 1.001 / ratio["p20"]
    assert result["difference"] < 1e-5
    assert "fused" in result["report"]
    assert f"{result['at_most']:.3f} x as fast" in result["verdict"]
    assert json.loads(json.dumps(result)) == result


def test_bfloat16_and_samples():
    result = model.bench_model("timm:test_vit", batch=1, dtype="bf16", seconds=0.01, keep_samples=True)
    assert result["difference"] < 0.05
    assert len({len(row["samples"]) for row in result["rows"]}) == 1
    assert len(result["rows"][0]["samples"]) >= 5


@pytest.mark.parametrize("spec", TINY)
def test_models_and_what_they_take(spec):
    torch.manual_seed(0)
    model, shape = load_model(spec)
    assert tuple(shape) == TINY[spec]
    images, more = model_zoo.inputs(model, shape, 2, torch.device("cpu"), torch.float32)
    assert images.shape == (2, *shape)
    assert list(more) == ["bool_masked_pos"] * (spec == MASKED)
    if more:
        assert more["bool_masked_pos"].sum(1).tolist() == [6, 6]  # of 8
    assert vk.fuse(model).fused
    ran = []
    block = model_zoo.first_block(model)
    model.eval()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: ran.append(module))
    reached = []
    block.register_forward_pre_hook(lambda _, args: reached.append((len(ran), args[0].shape)))
    model(images, **more)
    [(before, tokens)] = reached
    assert len(tokens) == 3
    assert tokens[0] == 2
    seen = {type(m).__name__ for m in ran[:before]}
    assert not any("Attention" in name or "Block" in name or "Layer" in name for name in seen - {"LayerNorm"}), seen


def test_short_forms_are_specifications():
    assert all(spec.partition(":")[0] in model_zoo.SOURCES for spec in model_zoo.MODELS.values())
    timm = pytest.importorskip("timm")
    names = [s.partition(":")[2] for s in model_zoo.MODELS.values() if s.startswith("timm:")]
    assert len(names) >= 4
    assert all(timm.is_model(name) for name in names)
    assert model.bench_model("timm:test_vit,img_size=32", batch=1, seconds=0)["rows"][0]["ms"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody:x", "a model is one of mae-b16"),
        ("timm:", "a model is one of"),
        ("timm:no_such_vit", "timm has no model"),
        ("timm:test_vit,img_size", "is not KEY=VALUE"),
        ("transformers:NoModel", "no model class"),
        ("vit_pytorch:NoModel", "no model class"),
    ],
)
def test_specifications_that_are_wrong(name, message):
    library = name.partition(":")[0]
    if library != "nobody" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_a_mode_or_dtype_that_is_wrong():
    for wrong in ({"mode": "sleep"}, {"dtype": "fp8"}):
        with pytest.raises(ValueError, match=r"sleep|fp8"):
            model.bench_model("timm:test_vit", **wrong)


@pytest.mark.parametrize("mode", ["inference", "training", "pipeline"])
def test_a_wrong_backend_gets_no_time(monkeypatch, mode):
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda p, *tensors: right(p, *tensors) * 1.01)
    result = model.bench_model("timm:test_vit", batch=2, seconds=0.01, mode=mode)
    ours = result["rows"][-1]
    assert (ours["impl"], ours["ms"]) == ({"pipeline": "uint8"}.get(mode, "fused"), None)
    assert "differ by" in ours["error"] or "tokens: error" in ours["error"]
    assert result["ok"] is False
    assert "Not " in result["verdict"]


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    right = reference.backward

    def wrong(*args, grads):
        right(*args, grads=grads)
        grads[1].mul_(2)

    monkeypatch.setattr(reference, "backward", wrong)
    result = model.bench_model(f"transformers:ViTMAEModel,image_size=32,{SMALL}", batch=2, mode="training")
    assert {row["ms"] for row in result["rows"]} == {None}


def test_the_model_comes_back_and_learns_nothing():
    found = model._Bench("timm:test_vit", 1, torch.device("cpu"), "fp32", "auto", "training")
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    classes = [type(m) for m in found.model.modules()]
    found.run(0.01, False, lambda text: None)
    assert [type(m) for m in found.model.modules()] == classes
    assert not any(m._forward_pre_hooks for m in found.model.modules())
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_front_end_ends_with_the_tokens():
    found = model._Bench("timm:test_vit", 2, torch.device("cpu"), "fp32", "auto", "inference")
    with found.stopped():
        tokens = found.tokens()
    expected = found.model._pos_embed(found.model.patch_embed(found.images))
    torch.testing.assert_close(tokens, expected)


def said(gain, share=0.02, fused=True):
    fronts = {"before": {"share": share}, "fused": {"share": share / 2}}
    result = {"gain": dict(zip(("p20", "median", "p80"), gain, strict=True)), "front_end": fronts}
    return model._verdict(result | {"at_most": 1 / (1 - share)}, fused)


def test_the_verdict_says_where_there_is_nothing():
    assert "No gain to be measured (1.010 x, 0.990 to 1.020)" in said((0.99, 1.01, 1.02))
    assert "slower here" in said((0.9, 0.95, 0.97))
    assert said((1.1, 1.2, 1.3), share=0.25).startswith("1.200 x the images a second")
    assert "took 25.0% of the time before and takes 12.5% now" in said((1.1, 1.2, 1.3), share=0.25)
    assert "1.333 x as fast" in said((1.1, 1.2, 1.3), share=0.25)
    assert said((1.1, 1.2, 1.3), fused=False).startswith("Nothing to gain")


def test_a_model_without_a_front_end_has_nothing_to_gain():
    result = model.bench_model("timm:test_resnet", batch=1, seconds=0)
    assert result["report"] == "no front end found"
    assert "Nothing to gain" in result["verdict"]


def test_the_pipeline():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    result = model.bench_model("timm:test_vit", batch=8, seconds=0.01, mode="pipeline")
    rows = {row["impl"]: row for row in result["rows"]}
    assert list(rows) == ["float", "normalise_on_device", "uint8"] == list(input_pipeline.PIPELINES)
    assert [row["bus_bytes"] for row in rows.values()] == [n * 8 * 3 * 160 * 160 for n in (4, 1, 1)]
    for row in rows.values():
        assert (row["case"], row["mode"], row["batch"]) == ("timm:test_vit", "pipeline", 8)
        assert list(row["stages"]) == ["batch", "copy", "front_end"]
        assert all(ms > 0 for ms in row["stages"].values())
        assert row["ms_with_decode"]["median"] >= max(
            row["ms"]["median"], result["decode"]["median"]
        )  # sample by sample
        assert row["images_per_s"] > 0
        assert row["ratio"]["median"] > 0
    assert "4 times fewer bytes" in result["verdict"]
    assert "Decoding takes" in result["verdict"]
    assert json.loads(json.dumps(result)) == result


def test_photographs_come_as_jpeg_and_go_as_pixels():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    files = input_pipeline.jpegs()
    assert len(files) == 6
    assert all(file[:2] == b"\xff\xd8" for file in files)
    pixels = input_pipeline.decoded(files[0], (40, 24))
    assert (pixels.shape, pixels.dtype) == ((40, 24, 3), "uint8")
    assert pixels.std() > 10


def test_the_pipeline_is_for_images_and_a_convolution():
    pytest.importorskip("vit_pytorch")
    with pytest.raises(ValueError, match="three channels and a Conv2d"):
        model.bench_model("vit_pytorch:ViT,dim=32,depth=1,heads=2,mlp_dim=48", mode="pipeline")


def test_a_model_before_and_after(capsys):
    words = "bench --model timm:test_vit --batch 1 --seconds 0.05 --device cpu --json"
    assert cli.main(words.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["impl"] for row in result["rows"]] == ["before", "fused"]
    assert result["difference"] < 1e-5
    assert result["verdict"]
    assert cli.main(["bench", "--model", "nobody:x"]) == 2


@pytest.mark.parametrize("task", ["training", "pipeline"])
def test_tasks_for_people(capsys, task):
    assert cli.main(f"bench --model timm:test_vit --batch 2 --seconds 0.01 --device cpu --task {task}".split()) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "timm:test_vit" in shown
    assert {"training": "front end took", "pipeline": "Decoding takes"}[task] in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_graphs_of_inference():
    rows = model.bench_model("timm:test_vit", batch=1, device="cuda", seconds=0.05)["rows"]
    assert [(row["impl"], row["timing"]) for row in rows] == [
        (impl, timing) for timing in ("eager", "graph") for impl in ("before", "fused")
    ]
    assert all(row["ms"] for row in rows)
