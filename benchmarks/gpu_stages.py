"""The stages of gpu_suite.py. Each takes (args, out, deadline), writes rows to `out`, and runs in its own process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path

from suites import CASES, HEADLINE, MODELS, RACES, SMOKE, TARGETS, TINY, TRAINING

DRY_TARGETS = [(TINY[0], "forward", 1e9, None), (TINY[0], "images", None, 1e-9)]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def build(args, out, deadline):
    if not (ROOT / "csrc").is_dir():
        return out.write({"note": "no csrc/: nothing to build"})
    # Dry, it builds nothing, and not in place: what was built there before would go.
    mode, *where = ("0", "--build-lib", str(Path(args.out) / "build")) if args.dry_run else ("1", "--inplace")
    wanted = {**os.environ, "VITKERNELS_CUDA": mode}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", *where], cwd=ROOT, check=False, env=wanted)
    out.write({"note": f"setup.py build_ext: exit status {done.returncode}"})
    command = [sys.executable, "-m", "vitkernels", "inspect", "--extension"]
    return None if done.returncode or args.dry_run else say(subprocess.run(command, cwd=ROOT, check=False).returncode)


def smoke(args, out, deadline):
    import torch

    from vitkernels import dispatch
    from vitkernels.bench.gate import gate
    from vitkernels.bench.implementations import problem
    from vitkernels.bench.op import settings
    from vitkernels.bench.timing import alive, short

    for case in TINY if args.dry_run else SMOKE:
        for backend in dispatch.MODULES:
            if not out.once(f"{case.name} {backend}"):
                continue
            row = {"case": case.name, "impl": backend, "check": "right"}
            try:
                call = case.call(args.device)
                if reasons := dispatch.why_not(problem(call), backend):
                    row["check"] = "declines: " + "; ".join(reasons)
                else:
                    with settings(case):
                        row["check"] = gate(backend, call, "forward") or gate(backend, call, "backward") or "right"
            except Exception as error:
                traceback.print_exc()
                row["check"] = short(error)
            say(f"{case.name:<32} {backend:<10} {row['check']}")
            try:
                alive(torch.device(args.device))
            except RuntimeError:
                out.write(row | {"fatal": True})
                raise
            out.write(row)


def races(args, out, deadline):
    """Each kernel many times beside other work: every result has the bits of the first, and the first is right."""
    import torch

    from vitkernels.bench.op import settings
    from vitkernels.bench.timing import alive, short
    from vitkernels.testing.races import hunt

    launches = 3 if args.dry_run else 300
    for case in TINY[:2] if args.dry_run else RACES:
        call = case.call(args.device)
        with settings(case):
            for kernel, gate, run in _launches(call, without=out.killers()):
                if time.time() > deadline - 5:
                    return out.write({"note": f"no time left for {case.name} {kernel} and what follows"})
                if not out.once(f"{case.name} {kernel}"):
                    continue
                row = {"case": case.name, "impl": kernel}
                try:
                    wrong = gate() or hunt(run, launches)
                    row["check"] = f"wrong: {wrong}" if wrong else f"right, {launches} times the same bits"
                except Exception as error:
                    traceback.print_exc()
                    row["check"] = short(error)
                say(f"{case.name:<32} {kernel:<40} {row['check']}")
                out.write(row)
                alive(torch.device(args.device))
    return None


def _launches(call, without=()):
    """(kernel, a check of its first result, one launch of it) for every kernel that a default takes."""
    import torch

    from vitkernels import dispatch
    from vitkernels.backends import cuda
    from vitkernels.backends.common import canonical
    from vitkernels.backends.patch_layout import product_of
    from vitkernels.backends.triton import configs
    from vitkernels.backends.triton.forward_plan import kernels_of
    from vitkernels.bench.gate import gate
    from vitkernels.bench.implementations import problem
    from vitkernels.gpu import gpu_of, tf32
    from vitkernels.testing import oracle

    names = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
    p, tensors = problem(call), canonical(*(call.get(name) for name in names))
    grad = torch.randn(p.out_shape, device=p.device).to(p.out_dtype)

    def forward(module, kernel, **choice):
        run = partial(module.forward, p, *tensors, **choice)
        return kernel, partial(gate, lambda **_: run(), call), lambda: [("tokens", run())]

    def backward(name, images, **choice):  # its check is of what is taken without a choice
        def run():
            grads = [t if t is None else torch.empty_like(t) for t in tensors[:5]]
            grads = [grads[0], *[None] * 4] if images else [None, *grads[1:]]
            dispatch.backend(name).backward(p, grad, *tensors, grads=tuple(grads), **choice)
            return [(f"gradient of {n}", g) for n, g in zip(names, grads, strict=False) if g is not None]

        check = partial(gate, name, call, "backward")
        if images:  # which the gate does not ask for
            check = partial(_images_wrong, run, oracle.oracle, call, grad)
        return f"{name} gradient of {'images' if images else 'parameters'}", check, run

    for name, module in ((n, dispatch.backend(n)) for n in dispatch.MODULES):
        if name in without or dispatch.why_not(p, name):
            continue
        if name == "triton":
            gpu, product = gpu_of(p.device), product_of(p, tf32())
            for kernel in kernels_of(p, gpu, product, call["images"].data_ptr() % 16 == 0):
                choice = kernel, configs.default(p, kernel, product, gpu)
                yield forward(module, f"triton {kernel} {'×'.join(map(str, choice[1][:3]))}", choice=choice)
        elif name == "cuda":
            for how, plan in cuda.candidates(p, *tensors).items():
                yield forward(module, f"cuda: {how}", plan=plan)
        else:
            yield forward(module, name)
        yield backward(name, images=False)
        if name == "cuda":
            kernel, _, plain = backward(name, images=False)
            _, _, paired = backward(name, images=False, pairs=True)
            yield f"{kernel} by pairs of blocks", partial(_other_bits, paired, plain), paired
        if p.image_dtype.is_floating_point:
            yield backward(name, images=True)


def _other_bits(run, plain):
    """Which results are not those of the plain kernel, whose sums these have in the same order; or nothing."""
    import torch

    pairs = zip(run(), plain(), strict=True)
    return ", ".join(name for (name, found), (_, same) in pairs if not torch.equal(found, same)) or None


def _images_wrong(run, oracle, call, grad):
    """Why the images' gradient is not the exact one, to a few roundings of its dtype or the product's; or nothing."""
    import torch

    [(_, found)] = run()
    exact = {k: v.double() if torch.is_tensor(v) and k != "keep" else v for k, v in call.items()}
    images = exact["images"].detach().requires_grad_()
    with torch.enable_grad():
        (true,) = torch.autograd.grad(oracle(**{**exact, "images": images}), images, grad.double())
    tf32 = call["weight"].dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    rounding = max(torch.finfo(t.dtype).eps for t in (found, call["weight"], grad))
    limit = 4 * max(rounding, 2**-10 if tf32 else 0) * true.abs().max().item()
    error = (found.view(true.shape).double() - true).abs().nan_to_num(nan=torch.inf).max().item()
    return None if error <= limit else f"the images' gradient errs by {error:.3g}, {limit:.3g} is allowed"


def headline(args, out, deadline):
    _time(args, out, deadline, _headline(args), ["forward"], compiled=False, seconds=0.3)


def training(args, out, deadline):
    cases = TINY[:1] if args.dry_run else TRAINING
    _time(args, out, deadline, cases, ["both", "backward"], compiled=False, seconds=0.2)


def targets(args, out, deadline):
    """The best of our backends beside what it should take (suites.TARGETS), in graph replays where there are any."""
    from vitkernels import dispatch
    from vitkernels.bench.implementations import problem

    for case, mode, us, products in DRY_TARGETS if args.dry_run else TARGETS:
        p = problem(case.call(args.device))
        ours = ["reference"] if args.dry_run else [n for n in dispatch.MODULES if not dispatch.why_not(p, n)]
        rows = _time(args, out, deadline, [case], [mode], impls=[*ours, "gemm"], seconds=0.1)
        rows.sort(key=lambda row: row["timing"] == "graph")
        found = {row["impl"]: 1e3 * row["ms"]["median"] for row in rows if row["ms"]}
        product = found.pop("gemm", None)
        limit = products * product if products and product else us
        if not found or limit is None:
            continue
        best = min(found, key=found.__getitem__)
        note = f"{mode}: {best} {found[best]:.1f} µs of {limit:.1f}, {'reached' * (found[best] <= limit) or 'missed'}"
        say(case.name, note)
        out.write({"case": case.name, "note": note, "us": found, "product_us": product, "limit_us": limit})


def host(args, out, deadline):
    """What a call costs the host, by its steps."""
    from vitkernels.bench.host import host

    for row in host(args.device):
        beside = f", {row['ratio']:.2f} x F.linear" if row["ratio"] else ""
        row |= {"case": row["mode"], "note": f"{row['impl']}: {row['us']:.1f} us{' (stub)' * row['stub']}{beside}"}
        say(row["mode"], row["note"])
        out.write(row)


def compiled(args, out, deadline):
    """Beside torch.compile, one peer at a time: a compiler that hangs costs one row."""
    peers = ["compile_conv", "compile_linear"]
    if args.device != "cpu":
        peers += ["compile_conv_max", "compile_linear_max"]
    for mode, cases in (("forward", _headline(args)), ("both", TINY[:1] if args.dry_run else TRAINING[:2])):
        for case in cases[: 1 if args.dry_run else None]:
            for peer in peers[: 1 if args.dry_run else None]:
                _time(args, out, deadline, [case], [mode], impls=["auto", peer], seconds=0.2)


def kernels(args, out, deadline):
    """Every loader and tile of the C++ extension: the guesses that its plans choose by, measured."""
    import torch

    from vitkernels import dispatch
    from vitkernels.backends import cuda
    from vitkernels.backends.common import canonical
    from vitkernels.bench.implementations import problem
    from vitkernels.bench.op import settings
    from vitkernels.bench.timing import alive, short

    for case in _headline(args):
        if time.time() > deadline - 5:
            return out.write({"note": f"no time left for {case.name} and what follows"})
        if not out.once(case.name):
            continue
        call = case.call(args.device)
        p = problem(call)
        if reasons := dispatch.why_not(p, "cuda"):
            out.write({"case": case.name, "note": "cuda declines: " + "; ".join(reasons)})
            continue
        names = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
        tensors = canonical(*(call.get(name) for name in names))
        with settings(case), torch.no_grad():
            chosen, grad = cuda.how(p), torch.randn(p.out_shape, device=p.device).to(p.out_dtype)
            made = [None if t is None or i == 0 else torch.empty_like(t) for i, t in enumerate(tensors[:5])]
            steps = {
                how: partial(cuda.forward, p, *tensors, plan=plan) for how, plan in cuda.candidates(p, *tensors).items()
            }
            for pairs in (False, True):
                how = "gradients of the parameters" + " by pairs of blocks" * pairs
                steps[how] = partial(cuda.backward, p, grad, *tensors, tuple(made), pairs=pairs)
            for how, step in steps.items():
                try:
                    ms = _milliseconds(step, args.device)
                    row = {"case": case.name, "kernel": how, "chosen": how == chosen, "kernel_ms": ms}
                except RuntimeError as error:
                    row = {"case": case.name, "error": f"{how}: {short(error)}"}
                say(row)
                out.write(row)
                alive(torch.device(args.device))
    return None


def tests(args, out, deadline):
    """What the GPU alone can show first: the backends, then the rest."""
    first = ["test_backends", "test_triton_backward", "test_cuda", "test_weight_sm90", "test_triton_forward"]
    never = ["test_bench", "test_benchmarks", "test_model", "test_packaging", "test_examples", "test_report"]
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file.stem not in never]
    files.sort(key=lambda file: (first.index(file.stem) if file.stem in first else len(first), file))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    command += ["-x", "-k", "case or problem"] if args.dry_run else ["--maxfail=30"]
    command += [str(file.relative_to(ROOT)) for file in files]
    log = Path(args.out) / "pytest.log"
    with log.open("w") as file:
        try:
            left = max(5, deadline - time.time() - 2)
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False)
            end = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "cut off"
    lines = log.read_text().strip().splitlines()
    out.write({"note": f"pytest: {end}; {lines[-1] if lines else 'no output'}",
               "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]})  # fmt: skip
    say("\n".join(lines[-15:]), end)


def tune(args, out, deadline):
    """Search, then time again; the tiles found come back in a file that can be shipped in vitkernels/tuned/."""
    from vitkernels.bench.op import settings
    from vitkernels.bench.timing import short
    from vitkernels.tuning.tune import tune as search

    cases = _headline(args)
    for i, case in enumerate(cases):
        left = deadline - time.time()
        if left <= 10:
            out.write({"note": f"no time left for {case.name} and what follows"})
            break
        if out.once(case.name):
            try:
                with settings(case):
                    found = search(case.call(args.device), seconds=min(30, left * 0.6 / (len(cases) - i)))
                if Path(str(found.get("file"))).is_file():
                    shutil.copy(found["file"], args.out)
                out.write({"case": case.name, "tuned": json.loads(json.dumps(found, default=str))})
                say(case.name, found)
            except Exception as error:
                traceback.print_exc()
                out.write({"case": case.name, "error": f"tune: {short(error)}"})
    _time(args, out, deadline, cases, ["forward"], impls=["auto", "gemm"], seconds=0.2)


def profile(args, out, deadline):
    """`vitkernels profile` of the first headline shape: traces of all, then ncu's counters of each backend."""
    size = "--image 32 --dim 48 --batch 2" if args.dry_run else "--batch 256"
    runs = {"traces": "--impl auto --no-run"}
    if not args.dry_run:
        runs = {"traces": "--impl auto,cuda,timm_eager --no-run", "auto": "--impl auto", "cuda": "--impl cuda"}
    for name, words in runs.items():
        left = deadline - time.time()
        if left < 12:
            return out.write({"note": f"no time left for profile {name} and what follows"})
        if not out.once(name):
            continue
        folder = Path(args.out) / f"profile-{name}"
        words = f"profile {size} {words} --limit {max(5, left - 20):.0f} --device {args.device} --out".split()
        command = [sys.executable, "-m", "vitkernels", *words, str(folder)]
        end = _run(command, Path(args.out) / f"profile-{name}.txt", deadline)
        for file in (f for f in folder.rglob("*") if f.is_file() and f.stat().st_size > 200_000):
            file.unlink()  # traces are megabytes: the tables are in profile-*.txt
        out.write({"note": f"profile {name}: {end}"})
    return None


def sanitize(args, out, deadline):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    found = Path(tool).exists()
    if not found and not args.dry_run:
        return out.write({"note": "no compute-sanitizer here"})
    for check in ("memcheck", "racecheck")[: 1 if args.dry_run else 2]:
        if time.time() > deadline - 10:
            return out.write({"note": f"no time left for {check}"})
        if not out.once(check):
            continue
        own = [sys.executable, str(HERE / "gpu_suite.py"), "--once", "--device", args.device]
        log = Path(args.out) / f"sanitize-{check}.log"
        end = _run([tool, "--tool", check, "--error-exitcode", "9", *own] if found else own, log, deadline)
        tail = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])[:300]
        say(check, end, tail)
        out.write({"note": f"sanitize {check}: {end}; {tail}; {log.name}"})
    return None


def models(args, out, deadline):
    """Whole models before and after `fuse`, and the way from a decoder's bytes to tokens."""
    import torch

    from vitkernels.bench.model import bench_model
    from vitkernels.bench.timing import alive, short

    tiny = args.dry_run
    for spec, batch, dtype, task in MODELS[:1] if tiny else MODELS:
        name = f"{spec} B{batch} {dtype} {task}"
        if time.time() > deadline - 8:
            return out.write({"note": f"no time left for {name} and what follows"})
        if not out.once(name):
            continue
        try:
            found = bench_model(
                "timm:test_vit" if tiny else spec, batch=1 if tiny else batch, device=args.device,
                dtype="fp32" if tiny else dtype, seconds=0.02 if tiny else 0.5, mode=task,
            )  # fmt: skip
            for row in found["rows"]:
                out.write(row)
            out.write({"case": name, "note": found["verdict"]})
            say(name, found["verdict"])
        except Exception as error:
            traceback.print_exc()
            out.write({"case": name, "error": short(error)})
            alive(torch.device(args.device))
    return None


def table(args, out, deadline):
    _time(args, out, deadline, TINY[2:4] if args.dry_run else CASES, ["forward"], compiled=False, seconds=0.1)


def backward(args, out, deadline):
    _time(args, out, deadline, TINY[:2] if args.dry_run else CASES, ["backward"], compiled=False, seconds=0.1)


# --- Their helpers.


def once(args) -> None:
    """One launch of each backend's kernels on tiny problems, both directions, for a tool to look at."""
    import torch

    from vitkernels import dispatch
    from vitkernels.bench.implementations import problem, steps

    for case, backend in product(TINY, dispatch.MODULES):
        call = case.call(args.device)
        if backend != "reference" and not dispatch.why_not(problem(call), backend):
            for step, leaves in steps(backend, [call], "both"):
                tokens = step()
                torch.autograd.grad(tokens, leaves, torch.ones_like(tokens))
    if args.device != "cpu":
        torch.cuda.synchronize()


def say(*words) -> None:
    print(*words, flush=True)


def line_of(row: dict) -> str:
    head = f"{row['case']:<34} {row['mode']:<8} {row['impl']:<20} {row['timing']:<6}"
    if row.get("error"):
        return f"{head} {row['error']}"
    share, ratio = row["roofline_share"], row.get("ratio")
    return (
        f"{head} {row['ms']['median']:>10.4f} ms  ({row['ms']['p20']:.4f} to {row['ms']['p80']:.4f})"
        + (f"  {ratio['median']:6.2f} x" if ratio else "")
        + (f"  {share:6.1%} of the roofline" if share else "")
    )


def _headline(args):
    return TINY[:2] if args.dry_run else HEADLINE


def _time(args, out, deadline, cases, modes, *, impls=None, compiled=None, seconds) -> list[dict]:
    import torch

    from vitkernels.bench.implementations import default_impls
    from vitkernels.bench.op import bench
    from vitkernels.bench.timing import alive, short

    killers, made = out.killers(), []
    for mode in modes:
        for case in cases:
            if time.time() > deadline - 5:
                out.write({"note": f"no time left for {case.name} {mode} and what follows"})
                return made
            if not out.once(f"{case.name} {mode} {' '.join(impls or ())}"):
                continue
            try:
                chosen = impls or default_impls(case.call(args.device), compiled=compiled)
                chosen = [name for name in chosen if name not in killers]
                rows = bench(
                    case, device=args.device, mode=mode, impls=chosen,
                    seconds=0.02 if args.dry_run else seconds,
                )  # fmt: skip
            except Exception as error:
                traceback.print_exc()
                trace = traceback.format_exc()[-3000:]
                out.write({"case": case.name, "mode": mode, "error": short(error), "trace": trace})
                alive(torch.device(args.device))
                continue
            for row in rows:
                out.write(row)
                say(line_of(row))
            made += rows
    return made


def _run(command: list[str], log: Path, deadline: float) -> str:
    """Run to the log, for a minute at most; how it ended."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            return f"exit status {process.wait(max(5, min(deadline - time.time() - 6, 60)))}"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends the tools that it put in sessions of their own
            try:
                process.wait(4)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "cut off"


def _milliseconds(step, device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    from triton.testing import do_bench

    return do_bench(step, warmup=5, rep=30, return_mode="median")
