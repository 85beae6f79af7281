"""What pytest-benchmark stores and shows: the machine in words, the results as `vitkernels report` reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

STORED = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("vitkernels")
    help = "torch.compile among the peers, which takes minutes for each case (on a GPU by default)"
    group.addoption("--compilers", action="store_true", default=None, help=help)
    group.addoption("--no-compilers", action="store_false", dest="compilers", help="without it")
    group.addoption("--results", metavar="FILE", help="write header and rows there, as in benchmarks/results/")
    group.addoption("--seconds", type=float, default=0.3, help="of samples, for each implementation of a case (0.3)")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    """Results are always stored, as JSON below .benchmarks/."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("benchmarks/ needs pytest-benchmark: pip install pytest-benchmark")
    option = config.option
    if not (option.benchmark_save or option.benchmark_json):
        option.benchmark_autosave = "vitkernels"
    option.benchmark_sort = "median"
    option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_benchmark_update_machine_info(config, machine_info):
    import torch

    from vitkernels.bench.environment import header

    words = " ".join(sys.argv[1:])
    machine_info.pop("node", None)  # a name that is nobody's business
    machine_info["vitkernels"] = header("cuda" if torch.cuda.is_available() else "cpu", f"pytest {words}")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    config.stash[STORED] = output_json
    if file := config.getoption("results"):
        rows = [b["extra_info"]["row"] for b in output_json["benchmarks"] if "row" in b["extra_info"]]
        result = {"header": output_json["machine_info"]["vitkernels"], "rows": rows}
        Path(file).write_text(json.dumps(result, indent=0))


def pytest_terminal_summary(terminalreporter, config):
    """Ours against the best peer of each shape, of this run."""
    if not any("row" in b["extra_info"] for b in config.stash.get(STORED, {}).get("benchmarks", ())):
        return  # what was timed is no operation: bench_host.py
    from vitkernels.report import results, summary

    rows = summary.summary(results.read(config.stash[STORED]))
    if rows:
        terminalreporter.section("ours against the best peer: its time over ours")
    for row in rows:
        terminalreporter.line(
            f"{row['mode']:<10} {row['timing']:<6} {row['dtype']:<18} geometric mean {row['geometric_mean']:5.2f}  "
            f"({row['least']:.2f} to {row['greatest']:.2f}; faster in {row['faster']} of {row['cases']})"
        )
