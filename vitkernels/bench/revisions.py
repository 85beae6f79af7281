"""Another version of the package in the same rounds: `vitkernels bench --against REVISION`.

Two versions do not fit one process, as both would register the operation. The other one runs in a process of its own,
which takes one sample when it is asked for one, so that the two are compared pair by pair on a machine that drifts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

# Seconds between a sample of one process and one of the other: OpenMP's threads spin for some milliseconds after their
# work, and would take the cores from those of the other.
REST = 0.02


@contextmanager
def checkouts(names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """name -> a folder with that version: the folder itself, or a revision of this repository, checked out for now."""
    found: dict[str, Path] = {}
    with ExitStack() as stack:
        for name in names:
            if (Path(name) / "vitkernels" / "__init__.py").is_file():
                found[Path(name).resolve().name] = Path(name).resolve()
                continue
            root = Path(__file__).resolve().parents[2]
            folder = Path(stack.enter_context(TemporaryDirectory())) / "checkout"
            git = ["git", "-C", str(root), "worktree"]
            done = subprocess.run(
                [*git, "add", "--detach", str(folder), name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                reason = " ".join(done.stderr.split()[-12:])
                raise ValueError(f"{name!r} is no folder with vitkernels/ in it, and no revision of {root}: {reason}")
            stack.callback(subprocess.run, [*git, "remove", "--force", str(folder)], capture_output=True, check=False)
            found[name] = folder
        yield found


class Other:
    """The other version's process: the `tokens` of its first call, `grads` of the inputs named where `probe` is the
    tokens' gradient; `sample()` is the milliseconds of one call in which that is `grad`."""

    def __init__(
        self, folder: Path, case: Any, *, mode: str, gradients: Sequence[str], device: torch.device, sets: int,
        grad: torch.Tensor | None, probe: torch.Tensor,
    ):  # fmt: skip
        self.exchange = TemporaryDirectory()
        file = Path(self.exchange.name) / "exchange.pt"
        torch.save((grad, probe), file)
        work = {"case": asdict(case), "mode": mode, "gradients": gradients, "device": str(device), "sets": sets,
                "file": str(file), "threads": torch.get_num_threads()}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder), json.dumps(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            if self._line() != "ready":
                raise RuntimeError(f"the version in {folder} failed: {self._last_words()}")
            self.tokens, *self.grads = torch.load(file, map_location=device)
        except BaseException:
            self.close()
            raise

    def sample(self) -> float:
        time.sleep(REST)
        try:
            return self._sample()
        finally:
            time.sleep(REST)

    def _sample(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("sample\n")
        self.process.stdin.flush()
        line = self._line()
        if not line:
            raise RuntimeError(f"the other version's process ended: {self._last_words()}")
        return float(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.exchange.cleanup()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _last_words(self) -> str:
        _, said = self.process.communicate()
        return (said.strip().splitlines() or ["it said nothing"])[-1]


def _beside(name: str) -> Any:
    """This version's module of that name, by its file: `vitkernels` is the other version here."""
    spec = spec_from_file_location(f"_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: str, work: dict[str, Any]) -> None:
    sys.path[0] = folder
    import vitkernels as vk

    assert Path(vk.__file__).is_relative_to(folder), f"{vk.__file__} is not in {folder}"
    cases, timing = _beside("cases"), _beside("timing")
    torch.set_num_threads(work["threads"])
    device, mode = torch.device(work["device"]), work["mode"]
    grad, probe = torch.load(work["file"], map_location=device)
    case = cases.Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in work["case"].items()})
    torch.backends.cuda.matmul.allow_tf32 = case.dtype == "tf32"
    todo = []
    with cases.autocast(case), torch.set_grad_enabled(mode != "forward"):
        for seed in range(work["sets"]):
            call = case.call(device, seed)
            leaves = [call[name].requires_grad_() for name in work["gradients"]]
            step = partial(vk.patch_embed, **call)
            if seed == 0:
                tokens = step()
                grads = torch.autograd.grad(tokens, leaves, probe) if mode != "forward" else ()
                torch.save([tokens.detach(), *grads], work["file"])
            todo.append(timing.modal(mode, step, leaves, grad))
        for step in todo[:2]:
            step()
        sample = timing.sampler_of(device, todo)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(sample(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
