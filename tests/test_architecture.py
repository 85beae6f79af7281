"""The house: which folder may import which, and that no imports go round in a circle. docs/architecture.md draws it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import vitkernels as vk

ROOT = Path(vk.__file__).parent
# From the ground up: a module imports from its own floor's folder and from the floors below.
FLOORS = (
    ("problem", "cpu", "gpu", "eager"),
    ("backends", "calls"),
    ("dispatch", "sharded"),
    ("ops", "cost_model"),
    ("functional",),
    ("layers", "testing"),
    ("models", "fusing"),
    ("bench", "report"),
    ("profiling", "demo"),
    ("tuning",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Of the backends, which may not know each other: the kernels fall back on the definition's gradients.
BACKENDS = {"reference": set(), "triton": {"reference"}, "cuda": {"reference"}}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a folder goes by its own name."""
    files = [f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py"]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports of the package, in functions too. A public name counts as its home."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("vitkernels")):
            continue
        above = package[: len(package) + 1 - node.level] if node.level else []
        below = (node.module or "").split(".") if node.level else node.module.split(".")[1:]
        base = ".".join([*above, *below]).strip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            home = inner if inner in known else base or vk._HOME.get(alias.name)
            if home is not None and home != name:  # None: __version__
                yield home


def test_no_module_imports_upward():
    known = modules()
    assert {name.split(".")[0] for name in known} == set(FLOOR)
    for name, file in known.items():
        room = name.split(".")[0]
        for other in imported(name, file, known):
            there = other.split(".")[0]
            assert there == room or FLOOR[there] < FLOOR[room], f"{name} imports {other}, from its own floor or above"


def test_no_imports_go_round():
    known = modules()
    graph = {name: set(imported(name, file, known)) for name, file in known.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_backends_know_the_definition_alone():
    known = modules()
    for name, file in known.items():
        if name.startswith("backends.") and (mine := name.split(".")[1]) in BACKENDS:
            others = {n.split(".")[1] for n in imported(name, file, known) if n.startswith("backends.")}
            assert others & BACKENDS.keys() <= {mine} | BACKENDS[mine], name
