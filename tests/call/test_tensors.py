"""Which tensors a kernel may work on: plain, dense ones, whose memory holds all their elements."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from helpers import run_python
from tensor_kinds import Kind, kinds_for
from torch import Tensor

from gqa_cutlass.errors import shown
from gqa_cutlass.gpu import torch_private
from gqa_cutlass.tensors import Flaw, flaw, memory_flaw

HALF, INT = torch.ones(2, 4, 8, dtype=torch.float16), torch.ones(2, dtype=torch.int32)
KINDS = [
    pytest.param(plain, kind, id=f"{plain.dtype} {name}".removeprefix("torch."))
    for plain in (HALF, INT)
    for name, kind in kinds_for(plain.dtype).items()
    if name != "meta"  # which is plain, and on no device
]


def flaw_of_kind(plain: Tensor, kind: Kind) -> Flaw | None:
    found: list[Flaw | None] = []
    kind(plain, lambda tensor: found.append(flaw(tensor)))
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("plain", "kind"), KINDS)
def test_tensors_that_are_not_what_their_memory_holds_are_told(plain: Tensor, kind: Kind) -> None:
    found = flaw_of_kind(plain, kind)
    assert found is not None and "tensor" in found.allowed.lower()


@pytest.mark.parametrize("name", ["nested", "sparse_csr", "negated", "conjugate"])
def test_kinds_are_named_with_a_remedy(name: str) -> None:
    expected = {
        "nested": ("a nested tensor", "a dense (strided) tensor"),
        "sparse_csr": ("a torch.sparse_csr tensor", "a dense (strided) tensor"),
        "negated": ("a negated view", "call .resolve_neg()"),
        "conjugate": ("a conjugated view", "call .resolve_conj()"),
    }[name]
    found = flaw_of_kind(HALF, kinds_for(HALF.dtype)[name])
    assert found is not None and found.got.startswith(expected[0])
    assert found.allowed.endswith(expected[1])


_SHARDED = """
import torch
from torch.distributed import HashStore, init_process_group
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from gqa_cutlass import gqa_decode
from gqa_cutlass.errors import InputError

init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
q, cache = torch.ones(1, 4, 64).half(), torch.ones(1, 16, 2, 64).half()
q, k, v = (DTensor.from_local(t, mesh, [Shard(t.dim() - 2)]) for t in (q, cache, cache.clone()))
try:
    gqa_decode(q, k, v, cache_seqlens=3)
except InputError as error:
    print(error)
print(gqa_decode(q.to_local(), k.to_local(), v.to_local(), cache_seqlens=3).shape)
"""


def test_tensors_that_several_devices_share_are_refused_with_a_remedy() -> None:
    refused, shape = run_python(_SHARDED).splitlines()
    assert "q: got a DTensor" in refused
    assert "pass each device its own part: .to_local(). Nothing was launched" in refused
    assert shape == "torch.Size([1, 4, 64])"


@pytest.mark.parametrize("name", ["nested", "sparse_csr", "mkldnn", "negated", "conjugate"])
def test_kinds_that_torch_names_are_told_without_its_keys(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch_private, "plain_keys", lambda: (None, 0))
    assert flaw(HALF) is None
    assert flaw_of_kind(HALF, kinds_for(HALF.dtype)[name]) is not None


class Subclass(Tensor):
    """A name of its own for plain memory."""


PLAIN: dict[str, Callable[[], Tensor]] = {
    "tensor": lambda: HALF,
    "view": lambda: HALF.mT[1:],
    "parameter": lambda: torch.nn.Parameter(HALF, requires_grad=False),
    "buffer": lambda: torch.nn.Buffer(HALF),
    "requires grad": lambda: HALF.clone().requires_grad_(),
    "subclass": lambda: HALF.as_subclass(Subclass),
    "meta": lambda: HALF.to("meta"),
    "conjugate of a real tensor": HALF.conj,
    "resolved": lambda: torch._neg_view(HALF).resolve_neg(),
    "frozen": lambda: torch.inference_mode()(HALF.clone)(),
    "empty": lambda: HALF[:0],
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_plain_tensors_have_no_flaw(make: Callable[[], Tensor]) -> None:
    tensor = make()
    assert flaw(tensor) is None
    assert tensor.device.type == "meta" or memory_flaw(tensor) is None


@pytest.mark.parametrize(
    "value",
    [None, 3, "tensor", [1.0], Mock(spec=Tensor)],
    ids=["None", "int", "str", "list", "mock"],
)
def test_what_is_no_tensor_is_named_by_its_type(value: object) -> None:
    assert flaw(value) == Flaw(f"a {type(value).__name__}", "a torch.Tensor")


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda base: base,
    "with an offset": lambda base: base[1:],
    "of another type": lambda base: base.view(torch.int32),
    "transposed": lambda base: base.mT,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memory_that_ends_before_the_tensor_is_missing(view: Callable[[Tensor], Tensor]) -> None:
    base = torch.ones(2, 4, 8, dtype=torch.float16)
    tensor, size = view(base), base.nbytes
    for held in (size + 64, size):
        base.untyped_storage().resize_(held)
        assert memory_flaw(tensor) is None
    for held in (size - 1, 64, 1):
        base.untyped_storage().resize_(held)
        found = memory_flaw(tensor)
        assert found is not None and f"ends {size} bytes into a storage of {held}" in found.got
    base.untyped_storage().resize_(0)
    found = memory_flaw(tensor)
    assert found is not None and found.got.startswith("a tensor without memory")


class Unspeakable:
    """Raises at everything that a message might ask of it."""

    def __repr__(self) -> str:
        raise ArithmeticError


def test_any_value_can_be_said_in_a_message() -> None:
    assert shown("name") == "'name'"
    assert len(shown(10**400)) == 80
    for value in (10**5000, Unspeakable(), [Unspeakable()]):
        assert shown(value) == f"a {type(value).__name__} that cannot be shown"
