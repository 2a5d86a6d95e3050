"""Who may import what: the import rules of the design, and what tests leave alone, read from the
sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
import torch
from executors import Notes, running_on
from helpers import REPOSITORY, call_tensors, run_python

from gqa_cutlass import gqa_decode

_RUNTIME_FILES = {str(path) for path in (REPOSITORY / "gqa_cutlass").rglob("*.py")}
CODEGEN = sorted((REPOSITORY / "codegen").glob("*.py"))
RUNTIME = sorted((REPOSITORY / "gqa_cutlass").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"), key=lambda path: path.name)
CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, `from a import b` as `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _users(of: str) -> list[str]:
    return [
        path.name
        for path in (*CODEGEN, *RUNTIME)
        if any(f"{name}.".startswith(f"{of}.") for name in _imports(path))
    ]


def _mentioning(*words: str) -> list[str]:
    sources = {path.name: path.read_text() for path in (*CODEGEN, *RUNTIME)}
    return [name for name, text in sources.items() if any(word in text for word in words)]


@pytest.mark.parametrize("path", CODEGEN, ids=lambda path: path.name)
def test_the_generator_never_imports_the_runtime_or_torch(path: Path) -> None:
    ours = {name for name in _imports(path) if name.split(".")[0] == "gqa_cutlass"}
    allowed = ("gqa_cutlass.codegen", "gqa_cutlass.errors")
    assert [name for name in ours if not name.startswith(allowed)] == []
    assert [name for name in _imports(path) if name.split(".")[0] == "torch"] == []


def test_configurations_depend_on_no_part_of_the_generator_but_the_schema() -> None:
    ours = {n for n in _imports(REPOSITORY / "codegen" / "config.py") if n.startswith("gqa_")}
    others = {n for n in ours if not n.startswith("gqa_cutlass.codegen.schema")}
    assert others == {"gqa_cutlass.errors.ConfigError"}


def test_the_schema_depends_on_nothing_of_ours() -> None:
    """But on errors: it is what all others import."""
    folder = REPOSITORY / "codegen" / "schema"
    ours = {n for path in folder.glob("*.py") for n in _imports(path) if n.startswith("gqa_")}
    others = {n for n in ours if not n.startswith("gqa_cutlass.codegen.schema")}
    assert others == {"gqa_cutlass.errors.ConfigError"}


def test_dispatch_depends_on_the_generator_alone() -> None:
    """Sources: on nothing of the runtime but itself. In a process: torch and driver stay out."""
    folder = REPOSITORY / "gqa_cutlass" / "dispatch"
    allowed = ("gqa_cutlass.codegen.", "gqa_cutlass.dispatch.", "gqa_cutlass.errors.")
    ours = {n for path in folder.glob("*.py") for n in _imports(path) if n.startswith("gqa_")}
    assert [name for name in ours if not name.startswith(allowed)] == []
    code = """
import sys
from gqa_cutlass.codegen import ARCHES, DType
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.dispatch import dispatch, model_device
sizes = dict(batch_size=1, num_q_heads=8, num_kv_heads=2, head_dim=128, max_seq_len=4096)
problem = Problem(**sizes, dtype=DType.F16, vec_width=8, append=True)
print(dispatch(problem, model_device(ARCHES["sm_90a"])).config.name)
print(*(name for name in ("torch", "cuda", "gqa_cutlass.gpu.driver") if name in sys.modules))
"""
    kernel, loaded = run_python(code).split("\n")[:2]
    assert kernel.startswith("gqa_decode_sm90_tensorop_f16") and loaded == ""


def test_nothing_imports_what_is_distributed_but_itself() -> None:
    """Nor, in a process, what it is made of: only who calls it pays for torch.distributed."""
    folder = REPOSITORY / "gqa_cutlass" / "distributed"
    others = [path for path in (*CODEGEN, *RUNTIME) if path.parent != folder]
    importing = [
        path.name
        for path in others
        if any(
            n.startswith(("gqa_cutlass.distributed", "torch.distributed")) for n in _imports(path)
        )
    ]
    assert importing == []
    code = """
import sys
from gqa_cutlass import KVCache, PagedKVCache, gqa_decode, merge_states
print("gqa_cutlass.distributed" in sys.modules)
"""
    assert run_python(code).strip() == "False"


def _functions_entered(call: Callable[[], object]) -> list[Path]:
    """The files of the runtime's functions that a call enters, one after the other."""
    files: list[Path] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename in _RUNTIME_FILES:
            files.append(Path(frame.f_code.co_filename))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


def _changes(files: list[Path]) -> int:
    return sum(before != after for before, after in pairwise(files))


@pytest.mark.parametrize("lengths", [3, torch.zeros(2, dtype=torch.int32)], ids=["int", "device"])
@pytest.mark.parametrize("tokens", [100, 700], ids=["multistage", "tma"])
def test_the_way_of_a_call_is_short(tokens: int, lengths: int | torch.Tensor) -> None:
    """Whoever follows one with a new layout turns to another file at most 12 times."""
    with running_on(Notes()):
        for size in (tokens, tokens + 1):  # once, for what is only done in a new process
            call = partial(gqa_decode, **call_tensors(max_seq_len=size), cache_seqlens=lengths)
            new = _functions_entered(call)
        again = _functions_entered(call)
    assert len(set(new)) > 6 and _changes(new) <= 12
    assert len(again) <= 3 and _changes(again) <= 1


def test_one_module_compiles() -> None:
    assert _mentioning("nvrtcCompileProgram") == ["compile.py"]


def test_one_module_talks_to_the_driver() -> None:
    assert _users("cuda.bindings.driver") == ["driver.py"]


def test_one_module_reads_the_environment() -> None:
    assert _mentioning("os.environ", "getenv") == ["env.py"]


def _reads_a_clock(path: Path) -> bool:
    text = path.read_text("utf-8")
    if "time" not in text:  # to parse takes its time
        return False
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)]
    read = {ast.unparse(node) for node in nodes if node.attr in CLOCKS}
    return any(f"time.{clock}" in {*read, *_imports(path)} for clock in CLOCKS)


def test_no_test_depends_on_how_fast_the_machine_is() -> None:
    """One draws by hand for minutes; one records how long ptxsim takes; one gives up waiting."""
    clocked = [path.name for path in TESTS if _reads_a_clock(path)]
    assert clocked == ["ptx_fuzz.py", "test_gpu_ptxsim.py", "test_workers.py"]
