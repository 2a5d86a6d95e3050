"""The record of ptxsim beside a GPU, and its table in docs/ptxsim.md.

Run as a program, it brings the table up to date with the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

RECORD = Path(__file__).parent / "gpu_calibration.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "ptxsim.md"
_TABLE = re.compile(r"(<!-- calibration -->\n).*?(<!-- /calibration -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class InstructionRow:
    """What a family of instructions gave.

    Args:
        family: Its name.
        forms: Forms compared.
        inputs: Operand tuples, of all forms together.
        defined: Results that PTX defines to the bit or within a bound.
        equal: Those with the same bits.
        open: Results that PTX leaves open.
        open_equal: Those with the same bits.
        ulp: Largest distance from ptxsim's result.
        share: Largest error over the bound; 0 where bits must be equal.
        bound: The bound in words; "equal bits" where there is none.
    """

    family: str
    forms: int
    inputs: int
    defined: int
    equal: int
    open: int
    open_equal: int
    ulp: float
    share: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """What a decode kernel gave.

    Args:
        kernel: Its name.
        cases: Launches.
        outputs: Elements of the output, of all launches together.
        equal: Share of them with the same bits.
        ulp: Largest difference of an output, in units in the last place of its head's largest one.
        out_share: Largest difference of an output over its bound.
        lse: Largest difference of an lse.
        lse_share: The same over its bound.
    """

    kernel: str
    cases: int
    outputs: int
    equal: float
    ulp: float
    out_share: float
    lse: float
    lse_share: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long ptxsim took.

    Args:
        problem: What it computed.
        seconds: Wall-clock time of one call, checks on.
    """

    problem: str
    seconds: float


@dataclass
class Calibration:
    """The record.

    Args:
        run: GPU, driver, CUDA, torch and date of the run that wrote it.
        instructions: In the order of the test suite.
        kernels: In the order of the test suite.
        timings: In the order of the test suite.
    """

    run: dict[str, str] = field(default_factory=dict)
    instructions: list[InstructionRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @classmethod
    def recorded(cls) -> Calibration | None:
        """Read the repository's record, if there is one."""
        return cls.parse(RECORD.read_text()) if RECORD.exists() else None

    @classmethod
    def parse(cls, text: str) -> Calibration:
        """Read what `text` made."""
        stored = json.loads(text)
        return cls(
            run=stored["run"],
            instructions=[InstructionRow(**row) for row in stored["instructions"]],
            kernels=[KernelRow(**row) for row in stored["kernels"]],
            timings=[Timing(**row) for row in stored["timings"]],
        )

    def text(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def add(self, other: Calibration) -> None:
        """Take over the rows of another process, in an order that does not tell processes apart."""
        self.instructions = sorted(self.instructions + other.instructions, key=repr)
        self.kernels = sorted(self.kernels + other.kernels, key=repr)
        self.timings = sorted(self.timings + other.timings, key=repr)

    def write(self, run: dict[str, str]) -> None:
        """Write the repository's record."""
        RECORD.write_text(replace(self, run=run).text())


def render(record: Calibration) -> str:
    """Return the tables of the document, in Markdown."""
    run = record.run
    parts = [
        f"Measured on {run['gpu']}, driver {run['driver']}, {run['date']}.",
        _table(
            ("Instructions", "Forms", "Inputs", "Equal bits", "Largest difference", "Bound"),
            map(_instruction_cells, record.instructions),
        ),
        _table(
            ("Kernel", "Launches", "Equal outputs", "Largest difference", "Largest of lse"),
            map(_kernel_cells, record.kernels),
        ),
        "\n".join(f"{row.problem}: {row.seconds:.1f} s in ptxsim." for row in record.timings),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    numeric = ["---", *["---:"] * (len(head) - 2), "---"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, numeric, *rows))


def _instruction_cells(row: InstructionRow) -> tuple[str, ...]:
    difference = "none"
    if row.ulp or row.share:
        difference = f"{_figure(row.ulp)} ulp"
    if row.share:
        difference += f", {row.share:.2f} of the bound"
    equal = _percent(row.equal, row.defined)
    if row.open:
        equal += f" ({_percent(row.open_equal, row.open)} of {row.open:,} left open)"
    bound = row.bound.replace("|", r"\|")  # which would end the cell
    return f"`{row.family}`", f"{row.forms:,}", f"{row.inputs:,}", equal, difference, bound


def _kernel_cells(row: KernelRow) -> tuple[str, ...]:
    return (
        f"`{row.kernel}`",
        str(row.cases),
        f"{100 * row.equal:.2f}% of {row.outputs:,}",
        f"{_figure(row.ulp)} ulp, {row.out_share:.2f} of the bound",
        f"{row.lse:.1e}, {row.lse_share:.2f} of the bound",
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.2f}"


def _percent(part: int, whole: int) -> str:
    """Write a share that is not rounded up to all of it."""
    if part == whole:
        return "all" if whole else "-"
    return f"{min(100 * part / whole, 99.999):.3f}%"


def replaced(document: str, tables: str) -> str:
    """Return the document with other tables between its markers.

    Raises:
        ValueError: The markers are missing.
    """
    text, count = _TABLE.subn(lambda found: f"{found[1]}\n{tables}\n\n{found[2]}", document)
    if count != 1:
        raise ValueError(
            f"{DOCUMENT.name}: got {count} pairs of calibration markers; needed: one, "
            "<!-- calibration --> and <!-- /calibration -->, each on a line of its own"
        )
    return text


def main() -> None:
    """Bring the document up to date."""
    record = Calibration.recorded()
    if record is None:
        raise SystemExit(f"{RECORD.name}: not found; `make gpu-test` on a GPU machine writes it")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), render(record)))


if __name__ == "__main__":
    main()
