"""Machine code of a cubin, by NVIDIA's disassembler, and what is counted in it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gqa_cutlass.errors import CompileError, CompilerMissingError

_REMEDY = "pip install nvidia-cuda-nvdisasm, or put a CUDA toolkit's nvdisasm on the PATH"
_SECONDS = 120  # that it may take
# An instruction's address, and its text with a predicate before it, if it has one.
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?(?P<text>[A-Z][^;]*?)\s*;", re.M)
_TENSOR_CORES = re.compile(r"(HMMA|HGMMA|QGMMA|IMMA|QMMA|UTCHMMA|UTCQMMA)\b")
_WIDE_LOADS = re.compile(r"(LD|LDG|LDS|LDGSTS)\b.*\.128\b")
_SPILLS = re.compile(r"(LDL|STL)\b")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is counted in the machine code of one kernel.

    Args:
        instructions: All of them, but for those that fill up the end.
        mix: By name, without modifiers, the most frequent first.
        wide_loads: Loads and copies of 128 bits, from global and from shared memory.
        spills: Accesses to local memory: spilled registers, and arrays indexed at run time.
        tensor_core: Instructions for tensor cores.
    """

    instructions: int
    mix: dict[str, int]
    wide_loads: int
    spills: int
    tensor_core: int


def disassembler() -> Path | None:
    """NVIDIA's disassembler, from a package or from a CUDA toolkit; None without one."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    packaged = [Path(str(file.locate())) for file in files if file.stem == "nvdisasm"]
    found = next((path for path in packaged if path.is_file()), None)
    if found is None and (on_path := shutil.which("nvdisasm")):
        found = Path(on_path)
    return found


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text.

    Raises:
        CompilerMissingError: There is no disassembler.
        CompileError: It refused the cubin.
    """
    tool = disassembler()
    if tool is None:
        raise CompilerMissingError(f"nvdisasm: not found; remedy: {_REMEDY}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run(
                [tool, "-c", file.name], capture_output=True, text=True, timeout=_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"nvdisasm: {tool} does not run ({error})") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise CompileError(f"nvdisasm: {tool} refused the cubin ({said})")
    return done.stdout


def statistics(listing: str) -> Statistics:
    """Count in what `disassemble` gave."""
    texts = [match["text"] for match in _LINE.finditer(listing)]
    while texts and texts[-1].startswith("NOP"):  # which fill the section up
        texts.pop()
    mix = Counter(re.split(r"[. ]", text, maxsplit=1)[0] for text in texts)
    return Statistics(
        instructions=len(texts),
        mix=dict(mix.most_common()),
        wide_loads=sum(bool(_WIDE_LOADS.match(text)) for text in texts),
        spills=sum(bool(_SPILLS.match(text)) for text in texts),
        tensor_core=sum(bool(_TENSOR_CORES.match(text)) for text in texts),
    )
