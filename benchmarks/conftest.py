"""What a benchmark run measures about the machine, keeps and prints."""

import re
from importlib.metadata import version
from platform import machine

import pytest
import torch

from benchmarks import report
from benchmarks.limits import Limits, measure
from benchmarks.measure import allocate_as_after_a_while

LIMITS, ROWS = pytest.StashKey[Limits](), pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    parser.addoption("--all-layers", action="store_true", help="all of transformers' Mamba: minutes a step")


def pytest_configure(config):
    config.addinivalue_line("markers", "minutes: a rival takes so long that it runs only twice")
    config.option.benchmark_quiet = True  # it knows only one side
    config.stash[ROWS] = []
    some = config.option.keyword or config.option.markexpr or any("::" in str(arg) for arg in config.args)
    if not (config.option.benchmark_json or some or config.option.collectonly):
        report.RESULTS.mkdir(exist_ok=True)
        config.option.benchmark_json = report.RESULTS / f"{slug()}.json"


def slug() -> str:
    """Of this machine: its newest results take the place of the older ones."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2] for line in file if line.startswith("model name")), machine())
    return f"{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}-{torch.get_num_threads()}-threads"


@pytest.fixture(scope="session")
def limits(request, tmp_path_factory) -> Limits:
    allocate_as_after_a_while()
    request.config.stash[LIMITS] = measure(tmp_path_factory.mktemp("limits"))
    return request.config.stash[LIMITS]


@pytest.fixture
def record(request, benchmark):
    """Keep a row of the table."""

    def keep(**row) -> None:
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    return keep


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    machine_info["versions"] = {name: version(name) for name in ("torch", "transformers", "mambapy")}
    machine_info["limits"] = config.stash[LIMITS]._asdict()


def pytest_benchmark_update_json(output_json):
    for one in output_json["benchmarks"]:
        del one["stats"]["data"], one["params"]


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("results")
        terminalreporter.write_line(report.tables(rows))
    if rows and not exitstatus and config.option.benchmark_json == report.RESULTS / f"{slug()}.json":
        report.write()
        terminalreporter.write_line(f"written: {report.PAGE}")
