"""A planted bug, and what faults say."""

from __future__ import annotations

from dataclasses import dataclass

from mutants.cases import PLAIN, Case

MAX_STEPS = 10_000  # the longest of the runs that end takes a third of them


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug.

    Args:
        name: What is wrong.
        header: Where, in gqa/.
        old: Text that occurs once there.
        new: What it becomes.
        fault: What the fault says, a regular expression.
        wrong: What else the launch gets wrong, if there is no fault.
        case: What shows it.
    """

    name: str
    header: str
    old: str
    new: str
    fault: str = ""
    wrong: str = ""
    case: Case = PLAIN


UNWRITTEN = "reads what another thread wrote"
STILL_READ = "writes what another thread reads"
TOO_EARLY = "an asynchronous copy has not finished"
UNDER_WAY = "writes where an asynchronous copy is under way"
GLOBAL_RACE = "race in global memory"
NOT_KNOWN = "what an asynchronous copy wrote, which this thread does not know to have finished"
