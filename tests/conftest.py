"""Options, markers, and the files that a whole GPU run writes."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration import Calibration
from executors import Notes, running_on
from instant import InstantCompiler

from gqa_cutlass.codegen import Kernel, carried
from gqa_cutlass.codegen.compile import shared_headers
from gqa_cutlass.codegen.render import code_digest
from gqa_cutlass.cpu import executor
from gqa_cutlass.kernels import store as store_module
from gqa_cutlass.kernels.store import Store
from gqa_cutlass.proof.evidence import Evidence, provenance
from gqa_cutlass.ptxsim.prepare import Program

# Of what they compare, a failure shows the difference, as in tests.
pytest.register_assert_rewrite("c_and_python", "c_refusals")

# By these, commands print otherwise, or find other kernels, on one machine than on another.
_UNSET = (
    "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS",
    "GQA_CUTLASS_KERNEL_DIR", "GQA_CUTLASS_DISABLE_JIT",
)  # fmt: skip
# Graphs and events of other tests, dead in a cycle of references, end a capture if they are
# collected during it; torch collects no more before one than it is told to.
if hasattr(torch.compiler.config, "force_cudagraph_gc"):
    torch.compiler.config.force_cudagraph_gc = True
_WIDTH = "1000"  # so that no line is broken, however long the temporary folder's name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-evidence",
        action="store_true",
        help="after the whole GPU suite has passed, write gpu_evidence and gpu_calibration.json",
    )
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run what CI takes a sample of: every planted bug, every shipped kernel in ptxsim",
    )


@pytest.hookimpl(tryfirst=True)  # pytest-xdist, which reads groups, would come first otherwise
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if group := _process_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    if not config.getoption("--thorough"):
        sampled = pytest.mark.skip(reason="beyond CI's sample: `make thorough`")
        for item in _beyond_the_sample(items):
            item.add_marker(sampled)
    for item in items:
        if _is_in_ptxsim(item) and item.get_closest_marker("gpu"):
            raise pytest.UsageError(f"{item.nodeid}: marked gpu, and would run in ptxsim")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU; what it proved on one is in gpu_evidence.json")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _is_in_ptxsim(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("device") == "cpu"


def _beyond_the_sample(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """What CI leaves out: what is marked so, and half of what GPUs run as well.

    Of a test with several cases in ptxsim it takes every second: most have a kernel of their own,
    and compiling takes most of the time. Its name says whether the first is one of them, so that
    they are the same whatever else is collected.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thorough"):
            if not item.get_closest_marker("gpu"):
                yield item
        elif _is_in_ptxsim(item):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, each in cases.items():
        if len(each) > 1:
            yield from each[len(name) % 2 :: 2]


def _process_of(item: pytest.Item) -> str:
    """What tests that belong into one process have in common."""
    if item.get_closest_marker("gpu"):
        return "gpu"  # they measure time
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    # A kernel is compiled and parsed once by the process that has all of its tests.
    for value in parameters:
        if isinstance(value, Kernel):
            return value.name
    if item.get_closest_marker("xdist_group"):
        return ""
    if isinstance(item, pytest.Function) and _has_a_fixture_of_its_module(item):
        return item.path.name  # or each process makes it
    return str(getattr(getattr(item, "module", None), "PROCESS", ""))


def _has_a_fixture_of_its_module(item: pytest.Function) -> bool:
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return any(
        definition.scope == "module" for definitions in fixtures for definition in definitions
    )


@pytest.fixture(scope="session", autouse=True)
def _shared_headers() -> Iterator[None]:
    """Most of the time goes into compiling; of several processes each takes space of its own."""
    few = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) <= 4
    with shared_headers() if few else nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _uncollected_programs() -> Iterator[None]:
    """Programs of ptxsim stay and are millions of objects: the collector need not look again."""

    made = executor.program_from

    def program_from(ptx: str, name: str) -> Program:
        program = made(ptx, name)
        gc.freeze()
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "program_from", program_from)
        yield


@pytest.fixture(autouse=True)
def _first_paged_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a test's first paged cache are 0, 1, 2, ..., as in a process of its own."""
    if request.path.parent.name == "paged":
        monkeypatch.setattr("gqa_cutlass.cache.paged.storage._CACHES", itertools.count())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ptxsim, threads that spin are made to wait sooner: for tests where many of them do."""
    monkeypatch.setattr("gqa_cutlass.ptxsim.machine._PATIENCE", 64)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel runs: in ptxsim, and on a GPU if there is one."""
    return str(request.param)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> InstantCompiler:
    """What a store compiles with, in place of NVRTC."""
    monkeypatch.delenv("GQA_CUTLASS_DISABLE_JIT", raising=False)
    fake = InstantCompiler()
    monkeypatch.setattr(store_module, "compile_kernel", fake)
    return fake


@pytest.fixture
def store(tmp_path: Path, compiler: InstantCompiler) -> Store:
    """A store that is new and compiles in no time."""
    return Store(root=tmp_path / "store")


@pytest.fixture
def notes() -> Iterator[Notes]:
    """What would be launched."""
    executor = Notes()
    with running_on(executor):
        yield executor


class Record:
    """What the GPU suite has seen of each kernel in this run."""

    def __init__(self) -> None:
        self.kernels: dict[str, dict[str, object]] = {}

    def add(self, config: Kernel, cases: int, share: float) -> None:
        """Note a kernel's test: how many cases, and the worst error over what is allowed."""
        self.kernels[config.name] = {
            "digest": code_digest(config),
            "cases": cases,
            "worst_error_over_bound": round(share, 3),
        }


_RECORD = pytest.StashKey[Record]()
_CALIBRATION = pytest.StashKey[Calibration]()
_PARTIAL = pytest.StashKey[bool]()
_LEFT_OUT = pytest.StashKey[bool]()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("terminalreporter"):
        writer = config.get_terminal_writer()
        writer.fullwidth = writer.fullwidth  # pytest keeps the terminal's
    for name in _UNSET:  # before test files import what reads them once
        os.environ.pop(name, None)
    os.environ["COLUMNS"] = _WIDTH
    config.stash[_RECORD] = Record()
    config.stash[_CALIBRATION] = Calibration()
    config.stash[_LEFT_OUT] = False
    config.stash[_PARTIAL] = config.args_source is pytest.Config.ArgsSource.ARGS


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[_LEFT_OUT] |= item.get_closest_marker("gpu") is not None


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Record:
    """Where tests note what they saw of a kernel."""
    return request.config.stash[_RECORD]


@pytest.fixture(scope="session")
def calibration(request: pytest.FixtureRequest) -> Calibration:
    """Where tests note how ptxsim compares with a GPU."""
    return request.config.stash[_CALIBRATION]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the evidence and the calibration of a run that passed and missed no shipped kernel."""
    if not session.config.getoption("--gpu-evidence") or exitstatus != 0:
        return
    stash = session.config.stash
    if hasattr(session.config, "workeroutput"):  # one process of several: they are put together
        seen = stash[_RECORD].kernels, stash[_CALIBRATION].text(), stash[_LEFT_OUT]
        session.config.workeroutput["seen"] = seen
        return
    if stash[_PARTIAL] or stash[_LEFT_OUT]:
        raise pytest.UsageError("no evidence written: only a part of the GPU suite was run")
    kernels = stash[_RECORD].kernels
    absent = [config.name for config in carried() if config.name not in kernels]
    if absent:
        raise pytest.UsageError(f"no evidence written: {len(absent)} kernels were not tested")
    run = provenance()
    Evidence(run=run, kernels=dict(sorted(kernels.items()))).write()
    stash[_CALIBRATION].write(run)


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what one process of several has seen."""
    seen = getattr(node, "workeroutput", {}).get("seen")
    if seen:
        kernels, calibration, left_out = seen
        node.config.stash[_RECORD].kernels.update(kernels)
        node.config.stash[_CALIBRATION].add(Calibration.parse(calibration))
        node.config.stash[_LEFT_OUT] |= left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = Evidence.shipped().missing(carried())
    terminalreporter.write_line(
        f"GPU evidence: {len(missing)} of {len(carried())} shipped kernels lack current evidence"
    )
