"""Puts those of CuTe's headers that kernels include into wheels, with nvidia-cutlass's license.

Whoever installs a wheel then needs neither that package nor what it depends on and kernels do not,
such as scipy. An editable install reads the headers where nvidia-cutlass has them.
"""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

_TEMPLATES = Path("templates")
_RELEASE = "cutlass/version.h"  # by which cubins are told apart
_WITHIN = Path("gqa_cutlass", "templates", "cutlass")
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


class BuildWithHeaders(build_py):
    """Also copies the headers."""

    def run(self) -> None:
        """Build what setuptools builds, then add them.

        Raises:
            SetupError: nvidia-cutlass is not there.
        """
        super().run()
        if self.editable_mode:
            return
        try:
            package = distribution("nvidia-cutlass")
        except PackageNotFoundError:
            raise SetupError(
                "nvidia-cutlass: not found; needed: its headers, to build a wheel; remedy: "
                "pip install --no-deps nvidia-cutlass"
            ) from None
        include = Path(str(package.locate_file("cutlass_library/source/include"))).resolve()
        to = Path(self.build_lib, _WITHIN)
        for header in {*_closure(include), include / _RELEASE}:
            self._copy(header, to / "include" / header.relative_to(include))
        for file in package.files or []:
            if file.name == "LICENSE.txt":
                self._copy(Path(str(file.locate())), to / file.name)

    def _copy(self, source: Path, target: Path) -> None:
        self.mkpath(str(target.parent))
        self.copy_file(str(source), str(target))


def _closure(include: Path) -> set[Path]:
    """The headers below a folder that ours include, directly or not, also behind an #if."""
    found: set[Path] = set()
    new = {h for ours in _TEMPLATES.rglob("*.cuh") for h in _included(ours, include)}
    while new:
        found |= new
        new = {h for header in new for h in _included(header, include)} - found
    return found


def _included(file: Path, include: Path) -> Iterator[Path]:
    for name in _INCLUDE.findall(file.read_text(encoding="utf-8")):
        for folder in (file.parent, include):
            header = (folder / name).resolve()
            if header.is_file() and header.is_relative_to(include):
                yield header


setup(cmdclass={"build_py": BuildWithHeaders})
