"""The machine code of a few kernels, normalised, and the record of it.

As a program: writes the listings to build/listings; with --record also what `sass.json` holds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from helpers import compiled

from gqa_cutlass.codegen import DType, KernelConfig, Math, Schedule, default_config
from gqa_cutlass.codegen.compile import compiler_version

RECORD = Path(__file__).parent / "sass.json"
LISTINGS = Path(__file__).parent.parent / "build" / "listings"
_TMA = Schedule.TMA
_TENSOROP = Math.TENSOROP
_F16, _BF16 = DType.F16, DType.BF16
# Every head_dim that has tiles of its own, narrow and wide groups, both schedules, CUDA cores, and
# dependent launches.
BASE = (
    default_config(_TENSOROP, _F16, 128, 4, 8),
    default_config(_TENSOROP, _BF16, 64, 8, 8),
    default_config(_TENSOROP, _F16, 96, 1, 8),
    default_config(_TENSOROP, _BF16, 256, 8, 8),
    default_config(_TENSOROP, _F16, 128, 4, 8, _TMA),
    default_config(_TENSOROP, _BF16, 64, 8, 8, _TMA),
    default_config(_TENSOROP, _F16, 96, 1, 8, _TMA),
    default_config(_TENSOROP, _BF16, 256, 16, 8, _TMA),
    default_config(Math.SIMT, _F16, 128, 1, 8),
    KernelConfig.from_name(f"{default_config(_TENSOROP, _F16, 128, 4, 8, _TMA).name}_pdl"),
)

# An instruction, and the two words of its encoding; or a label.
_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]+?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\n"
    r"\s+/\* 0x(?P<control>[0-9a-f]{16}) \*/|^(?P<label>\.L_x_\d+):",
    re.MULTILINE,
)
_LABEL = re.compile(r"\.L_x_\d+")
_CONTROL_SHIFT, _CONTROL_BITS = 41, 21  # stalls, yield, barriers, reuse: of the second word


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the record holds of a kernel.

    Args:
        digest: Of the normalised listing.
        instructions: Lines of it that are no labels.
        registers: Per thread.
    """

    digest: str
    instructions: int
    registers: int


def nvdisasm() -> Path | None:
    """The disassembler, if it is installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(next(file for file in files if file.stem == "nvdisasm").locate()))


def tools() -> str:
    """What machine code and its text depend on beside the source."""
    return f"{compiler_version()} nvdisasm-{importlib.metadata.version('nvidia-cuda-nvdisasm')}"


@cache
def disassemble(config: KernelConfig) -> str:
    """A kernel's machine code for sm_90a, and its encoding."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled(config).code)
        cubin.flush()
        command = [str(nvdisasm()), "-c", "-hex", cubin.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def normalised(listing: str, name: str) -> str:
    """One line per instruction: its control bits, then its text. No addresses, no names.

    Args:
        listing: What nvdisasm says.
        name: The kernel's.
    """
    lines, labels = [], dict[str, str]()
    for found in _LINE.finditer(listing):
        text = found["label"] or found["text"].replace(name, "kernel")
        text = _LABEL.sub(lambda m: labels.setdefault(m[0], f".L{len(labels)}"), text)
        if found["label"]:
            lines.append(f"{text}:")
        else:
            control = int(found["control"], 16) >> _CONTROL_SHIFT & (1 << _CONTROL_BITS) - 1
            lines.append(f"  {control:06x} {' '.join(text.split())}")
    while lines and lines[-1].endswith(("NOP", ":")):  # which fill the section up
        lines.pop()
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One of a kernel's.

    Args:
        text: With its operands.
        sets: The scoreboard that counts it until its result is there; None: none does.
        awaits: Those that must have come to zero before it starts.
    """

    text: str
    sets: int | None
    awaits: frozenset[int]


def instructions(listing: str) -> list[Instruction]:
    """A listing's instructions with their scoreboards, of which a warp has six.

    The fields of the control bits are those of Jia et al., "Dissecting the NVIDIA Volta GPU
    architecture via microbenchmarking", section 2.1: from the top 4 bits of reuse, 6 of barriers
    awaited, 3 of one set when read, 3 of one set when written, 1 of yielding, 4 of the stall.
    """
    found = []
    for match in _LINE.finditer(listing):
        if match["label"]:
            continue
        control = int(match["control"], 16) >> _CONTROL_SHIFT
        written, awaited = control >> 5 & 7, control >> 11 & 63
        found.append(
            Instruction(
                text=match["text"],
                sets=None if written == 7 else written,
                awaits=frozenset(i for i in range(6) if awaited >> i & 1),
            )
        )
    return found


def listing(config: KernelConfig) -> str:
    """A kernel's normalised machine code."""
    return normalised(disassemble(config), config.name)


def figures(config: KernelConfig) -> Figures:
    """What a record holds of a kernel as it is now."""
    text = listing(config)
    return Figures(
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        instructions=sum(line.startswith("  ") for line in text.splitlines()),
        registers=compiled(config).registers,
    )


def recorded() -> tuple[str, dict[str, Figures]]:
    """The tools and the figures of the committed record."""
    record = json.loads(RECORD.read_text())
    return record["tools"], {name: Figures(**row) for name, row in record["kernels"].items()}


def main() -> None:
    """Write the listings, and the record if asked."""
    parser = argparse.ArgumentParser(description="Writes the SASS of the base kernels.")
    parser.add_argument("--record", action="store_true", help=f"also write {RECORD.name}")
    record = parser.parse_args().record
    LISTINGS.mkdir(parents=True, exist_ok=True)
    for config in BASE:
        (LISTINGS / f"{config.name}.sass").write_text(listing(config))
    print(f"{len(BASE)} listings in {LISTINGS}")
    if record:
        kernels = {config.name: asdict(figures(config)) for config in BASE}
        RECORD.write_text(json.dumps({"tools": tools(), "kernels": kernels}, indent=1) + "\n")
        print(f"recorded in {RECORD}")


if __name__ == "__main__":
    main()
