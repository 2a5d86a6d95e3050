"""Lets the reference see what decorators make of public functions.

`gqa_cutlass.call.options.listed` puts the options that calls share into their signatures and
docstrings when they are defined; reading the source alone finds `**options` there.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from griffe import Extension, Function, Parameter, ParameterKind, Parameters


class Listed(Extension):
    """Takes signatures and docstrings of decorated functions from the imported package."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        """Look for decorated functions in all that was read."""
        _complete(pkg)


def _complete(thing: Any) -> None:
    for member in list(thing.members.values()):
        if member.is_alias:
            continue
        if member.is_function:
            if any(str(d.value).startswith("listed(") for d in member.decorators):
                _replace(member)
        elif member.is_module or member.is_class:
            _complete(member)


def _replace(function: Function) -> None:
    value: Any = import_module(function.module.path)
    for name in function.path.removeprefix(f"{function.module.path}.").split("."):
        value = getattr(value, name)
    function.overloads = None
    if function.docstring is not None:
        function.docstring.value = inspect.getdoc(value) or ""
    function.parameters = Parameters(*map(_parameter, inspect.signature(value).parameters.values()))


def _parameter(parameter: inspect.Parameter) -> Parameter:
    absent = parameter.default is parameter.empty
    return Parameter(
        parameter.name,
        annotation=None if parameter.annotation is parameter.empty else parameter.annotation,
        kind=ParameterKind(parameter.kind.description),
        default=None if absent else repr(parameter.default),
    )
