"""Lets the reference find the folders that pyproject.toml maps into one package: in a copy."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

_COPY = TemporaryDirectory(prefix="gqa_cutlass_docs_")  # griffe would see through links


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay the package out as it is installed, and let mkdocstrings look there."""
    root = Path(config.config_file_path or "").resolve().parent
    with (root / "pyproject.toml").open("rb") as file:
        folders = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    for package, folder in folders.items():
        for module in (root / folder).rglob("*.py"):
            place = Path(_COPY.name, *package.split("."), module.relative_to(root / folder))
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(module, place)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_COPY.name]
    return config
