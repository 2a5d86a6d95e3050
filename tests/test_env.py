"""The environment: where kernels are kept and found, with a home directory and without one."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import REPOSITORY
from instant import ARCH, CONFIG, InstantCompiler

from gqa_cutlass import env
from gqa_cutlass.errors import KernelMissingError, StoreError
from gqa_cutlass.kernels.store import Store


def test_environment_says_where_the_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GQA_CUTLASS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GQA_CUTLASS_KERNEL_DIR", os.pathsep.join(["/a", "", "/b"]))
    assert Store.default() == Store(root=tmp_path, read_only=(Path("/a"), Path("/b")))
    monkeypatch.delenv("GQA_CUTLASS_CACHE_DIR")
    monkeypatch.delenv("GQA_CUTLASS_KERNEL_DIR")
    assert Store.default().root.name == "gqa_cutlass" and Store.default().read_only == ()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No home directory: neither a variable nor an account. Returns the working directory."""

    def unknown(user: int | str) -> None:
        raise KeyError(f"no account of {user}")

    for name in ("HOME", "XDG_CACHE_HOME", env.CACHE_DIR, env.KERNEL_DIR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_home_directory_is_needed_only_for_what_is_to_be_kept_there(
    homeless: Path, compiler: InstantCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Store.default().find(CONFIG, ARCH) is None
    for act in (lambda: Store.default().get(CONFIG, ARCH), Store.default().clean):
        with pytest.raises(StoreError, match="no account.*needed.*GQA_CUTLASS_CACHE_DIR"):
            act()
    with pytest.raises(KernelMissingError, match="no place .see GQA_CUTLASS_CACHE_DIR"):
        Store.default().get(CONFIG, ARCH, jit=False)
    built = Store(root=homeless / "built").get(CONFIG, ARCH)
    monkeypatch.setenv(env.KERNEL_DIR, str(homeless / "built"))
    assert Store.default().get(CONFIG, ARCH).path == built.path
    assert [path.name for path in homeless.iterdir()] == ["built"]


@pytest.mark.parametrize("variable", [env.CACHE_DIR, env.KERNEL_DIR])
@pytest.mark.parametrize("given", ["~", "~/kernels", "~nobody-at-all/kernels"])
def test_a_tilde_without_a_home_directory_names_the_variable(
    homeless: Path, monkeypatch: pytest.MonkeyPatch, variable: str, given: str
) -> None:
    monkeypatch.setenv(variable, given)
    read = env.cache_dir if variable == env.CACHE_DIR else env.kernel_dirs
    with pytest.raises(StoreError, match=f"got '{given}'.*needed.*{variable} to an absolute path"):
        read()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "{home}/.cache/gqa_cutlass"),
        ({env.CACHE_DIR: "~"}, "{home}"),
        ({env.CACHE_DIR: "~/a//b"}, "{home}/a/b"),
        ({env.CACHE_DIR: "~//a"}, "{home}/a"),
        ({env.CACHE_DIR: "a/~"}, "{here}/a/~"),
        ({env.CACHE_DIR: "./~"}, "{here}/~"),
        ({env.CACHE_DIR: "relative"}, "{here}/relative"),
        ({env.CACHE_DIR: "~somebody/a"}, "/home/of/somebody/a"),
        ({env.CACHE_DIR: ""}, "{home}/.cache/gqa_cutlass"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/gqa_cutlass"),
        ({"XDG_CACHE_HOME": "relative"}, "{home}/.cache/gqa_cutlass"),
        ({"XDG_CACHE_HOME": ""}, "{home}/.cache/gqa_cutlass"),
        ({"XDG_CACHE_HOME": "/x", "HOME": ""}, "/x/gqa_cutlass"),
        ({"HOME": ""}, "/home/of/this/.cache/gqa_cutlass"),
        ({"HOME": "relative"}, "/home/of/this/.cache/gqa_cutlass"),
        ({"HOME": "/"}, "/.cache/gqa_cutlass"),
    ],
    ids=str,
)
def test_where_the_cache_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    account = SimpleNamespace
    monkeypatch.setattr(pwd, "getpwuid", lambda _: account(pw_dir="/home/of/this"))
    monkeypatch.setattr(pwd, "getpwnam", lambda name: account(pw_dir=f"/home/of/{name}"))
    for name in (env.CACHE_DIR, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    expected = expected.format(home=tmp_path / "home", here=tmp_path)
    assert env.cache_dir() == Store.default().root == Path(expected)


def test_kernel_folders_are_expanded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/mine")
    monkeypatch.setenv(env.KERNEL_DIR, "~/a:b::/c")
    monkeypatch.chdir(tmp_path)
    assert env.kernel_dirs() == (Path("/home/mine/a"), tmp_path / "b", Path("/c"))


def test_a_working_directory_that_is_gone_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv(env.CACHE_DIR, "relative")
    with pytest.raises(StoreError, match="got 'relative'.*No such file"):
        env.cache_dir()


def test_every_variable_that_is_read_is_in_the_documentation() -> None:
    read = re.findall(r"environ\.get\((\w+)", Path(env.__file__).read_text())
    assert {getattr(env, name) for name in read} == {v.name for v in env.VARIABLES}
    rows = [f"| `{v.name}` | {v.value} | {v.unset} |" for v in env.VARIABLES]
    assert "\n".join(rows) in (REPOSITORY / "docs" / "environment.md").read_text()
