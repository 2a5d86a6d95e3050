"""Bugs to plant in the kernels' own source, a table for each of their topics."""

from __future__ import annotations

from mutants.arithmetic import ARITHMETIC
from mutants.dependent import DEPENDENT
from mutants.features import FEATURES
from mutants.fp8 import FP8
from mutants.meetings import MEETINGS
from mutants.multistage import MULTISTAGE
from mutants.pages import PAGES
from mutants.tma import TMA

MUTANTS = MULTISTAGE + MEETINGS + ARITHMETIC + TMA + DEPENDENT + FEATURES + PAGES + FP8
