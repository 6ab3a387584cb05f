"""What a benchmark run measures about the machine, keeps and prints."""

import re
import warnings
from importlib.metadata import version
from pathlib import PosixPath
from time import time

import pytest
import torch

from benchmarks import measure, report, rivals

LIMITS = pytest.StashKey[measure.CpuLimits | measure.GpuLimits]()
ROWS, TARGET = pytest.StashKey[list[dict]](), pytest.StashKey[PosixPath]()


class Target(PosixPath):
    """A path, as pytest-benchmark takes it from 5.3 on, that opens to be written, as before."""

    def __enter__(self):
        self.file = self.open("wb")
        return self.file

    def __exit__(self, *_):
        self.file.close()


def pytest_addoption(parser):
    parser.addoption("--all-layers", action="store_true", help="all of transformers' Mamba: minutes a step")
    parser.addoption("--small", action="store_true", help="bench_transfer.py of sizes that take seconds")
    parser.addoption("--tests-failed", action="store_true", help="say so beside every ratio")
    parser.addoption("--commit", help="what is measured, where the checkout is not git's")
    parser.addoption("--until", type=float, help="seconds of the epoch: what would begin later is skipped")


def pytest_configure(config):
    config.addinivalue_line("markers", "minutes: a rival takes so long that it runs only twice")
    warnings.filterwarnings("ignore", "Not saving anything")  # where all are skipped, or fail
    config.option.benchmark_quiet = True  # it knows only one side
    config.stash[ROWS], config.stash[TARGET] = [], None
    some = config.option.keyword or config.option.markexpr or any("::" in str(arg) for arg in config.args)
    if not (config.option.benchmark_json or some or config.option.small or config.option.collectonly):
        report.RESULTS.mkdir(exist_ok=True)
        config.stash[TARGET] = config.option.benchmark_json = Target(report.RESULTS / f"{slug(config)}.json")


def pytest_runtest_setup(item):
    if item.config.option.until and time() > item.config.option.until:
        pytest.skip("no time was left")


def on_gpu(config) -> bool:
    return any("bench_gpu" in str(arg) for arg in config.args) and torch.cuda.is_available()


def slug(config) -> str:
    """Of this machine: its newest results take the place of the older ones."""
    if on_gpu(config):
        return dashed(torch.cuda.get_device_name())
    part = ".transfer" if any("bench_transfer" in str(arg) for arg in config.args) else ""
    return f"{dashed(measure.processor())}-{torch.get_num_threads()}-threads{part}"


def dashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@pytest.fixture(scope="session")
def limits(request, tmp_path_factory) -> measure.CpuLimits:
    measure.allocate_as_after_a_while()
    request.config.stash[LIMITS] = measure.cpu_limits(tmp_path_factory.mktemp("limits"))
    return request.config.stash[LIMITS]


@pytest.fixture(scope="session")
def chip(request) -> measure.GpuLimits:
    request.config.stash[LIMITS] = measure.gpu_limits()
    return request.config.stash[LIMITS]


@pytest.fixture
def record(request, benchmark):
    """Keep a row of the table; then one whose answer is wrong fails."""

    def keep(wrong: str, **row) -> None:
        row["red"] = wrong or "tests/ops failed" * request.config.option.tests_failed
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        assert not wrong, wrong

    return keep


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]
    machine_info["limits"] = config.stash[LIMITS]._asdict()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    if on_gpu(config):
        machine_info["gpu"], machine_info["versions"] = measure.chip(), rivals.versions()
    else:
        machine_info["versions"] = {name: version(name) for name in ("torch", "transformers", "mambapy")}


def pytest_benchmark_update_commit_info(config, commit_info):
    if config.option.commit:
        commit_info.update(id=config.option.commit, dirty=False)


def pytest_benchmark_update_json(config, output_json):
    for one in output_json["benchmarks"]:
        del one["stats"]["data"], one["params"]
        if on_gpu(config):
            del one["stats"]  # of checking and measuring together
    if failed := red(config):
        output_json["red"] = failed


def red(config) -> list[str]:
    """What failed: here, and in the tests before."""
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    here = [x.nodeid.partition("::")[2] for key in ("failed", "error") for x in stats.get(key, [])]
    return ["tests/ops"] * config.option.tests_failed + here


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows, failed = config.stash[ROWS], red(config)
    if rows:
        terminalreporter.section("results")
        terminalreporter.write_line(report.tables(rows, failed))
    if rows and config.stash[TARGET]:
        report.write()
        terminalreporter.write_line(f"written: {report.PAGE}")
