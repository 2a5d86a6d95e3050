"""Strides, alignments and shared memory: which layouts are accepted, and how wide they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import call_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gqa_cutlass.call.addresses import check_aliases
from gqa_cutlass.call.given import see
from gqa_cutlass.call.layout import problem_of
from gqa_cutlass.codegen.schema.problem import Problem
from gqa_cutlass.errors import InputError


def validated(**tensors: Tensor | None) -> Problem:
    """The problem that a call poses."""
    return problem_of(see([*map(tensors.get, NAMES), 0]))


def vec_width(**changes: Tensor) -> int:
    """Width of a valid call with some tensors replaced."""
    return validated(**call_tensors() | changes).vec_width


def shifted(shape: tuple[int, ...], offset: int) -> Tensor:
    """A contiguous tensor that starts `offset` elements past an aligned address."""
    numel = torch.Size(shape).numel()
    return torch.ones(numel + 8, dtype=torch.float16)[offset : offset + numel].view(shape)


def padded(shape: tuple[int, ...], pad: int) -> Tensor:
    """A tensor whose rows lie `pad` elements apart."""
    return torch.ones(*shape[:-1], shape[-1] + pad, dtype=torch.float16)[..., : shape[-1]]


def hnd(batch: int = 2, max_seq_len: int = 16, kv_heads: int = 2, head_dim: int = 64) -> Tensor:
    """A cache in HND order, as a transposed view."""
    return torch.ones(batch, kv_heads, max_seq_len, head_dim, dtype=torch.float16).transpose(1, 2)


NAMES = "q", "k_cache", "v_cache", "k", "v", "out"
WIDTHS = [(8, 8), (4, 4), (2, 2), (6, 2), (1, 1), (3, 1), (12, 4)]


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "out"])
@pytest.mark.parametrize(("offset", "width"), [(o, w) for o, w in WIDTHS if o <= 8])
def test_width_follows_the_address(name: str, offset: int, width: int) -> None:
    tensor = shifted(tuple(call_tensors()[name].shape), offset)
    assert vec_width(**{name: tensor}) == width


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "out"])
@pytest.mark.parametrize(("pad", "width"), WIDTHS)
def test_width_follows_the_strides(name: str, pad: int, width: int) -> None:
    tensor = padded(tuple(call_tensors()[name].shape), pad)
    assert vec_width(**{name: tensor}) == width


def test_stride_of_a_single_element_does_not_matter() -> None:
    one = call_tensors(batch=1)
    odd = torch.ones(1 * 8 * 64 + 3, dtype=torch.float16).as_strided((1, 8, 64), (515, 64, 1))
    assert validated(**one | {"q": odd}).vec_width == 8


def test_tensors_without_memory_count_as_aligned() -> None:
    tensors = call_tensors(device="meta")
    assert validated(**tensors).vec_width == 8


def test_hnd_caches_are_accepted_at_full_width() -> None:
    assert vec_width(k_cache=hnd(), v_cache=hnd()) == 8


def test_caches_may_differ_in_layout() -> None:
    assert vec_width(k_cache=hnd()) == 8


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dim", range(5))
def test_caches_may_lie_side_by_side_in_one_buffer(batch: int, dim: int) -> None:
    shape = [batch, 16, 2, 64]
    shape.insert(dim, 2)
    if dim == 4:  # last: K and V of a head follow each other
        fused = torch.ones(batch, 16, 2, 128, dtype=torch.float16)
        k_cache, v_cache = fused[..., :64], fused[..., 64:]
    else:
        k_cache, v_cache = torch.ones(shape, dtype=torch.float16).unbind(dim)
    tensors = call_tensors(batch=batch) | {"k_cache": k_cache, "v_cache": v_cache}
    assert validated(**tensors).vec_width == 8


@pytest.mark.parametrize("batch", [1, 2])
def test_slices_of_a_fused_projection_are_accepted(batch: int) -> None:
    fused = torch.ones(batch, 8 + 2 + 2 + 8, 64, dtype=torch.float16)
    q, k, v, out = fused.split((8, 2, 2, 8), dim=1)
    tensors = call_tensors(batch=batch) | {"q": q, "k": k, "v": v, "out": out}
    validated(**tensors)
    check_aliases(tensors, 0)


def test_output_over_the_lengths_is_refused() -> None:
    tensors: dict[str, Any] = call_tensors()
    lengths = torch.zeros(tensors["out"].numel() // 2, dtype=torch.int32)
    tensors["out"] = lengths.view(torch.float16).view(tensors["q"].shape)
    with pytest.raises(InputError, match="out: got memory that cache_seqlens also uses"):
        check_aliases(tensors | {"cache_seqlens": lengths[:2]}, lengths[:2])


def test_inputs_that_are_only_read_may_repeat() -> None:
    tensors: dict[str, Any] = call_tensors()
    one_token = tensors["k"][:, :1].expand(-1, 2, -1)
    validated(**tensors | {"k": one_token, "v": one_token})
    shared = tensors["k_cache"][:1].expand(2, -1, -1, -1)
    validated(**tensors | {"k_cache": shared, "v_cache": shared, "k": None, "v": None})


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A view of a small buffer that no two of its elements share."""
    sizes = [draw(st.integers(1, 3)) for _ in range(3)]
    order = draw(st.permutations(range(2)))
    strides, reach = [0, 0, 1], sizes[2]
    for dim in order:
        strides[dim] = reach + draw(st.integers(0, 6))
        reach += strides[dim] * (sizes[dim] - 1)
    return _BUFFER.as_strided(sizes, strides, draw(st.integers(0, 40)))


_BUFFER = torch.zeros(400, dtype=torch.float16)


def _addresses(tensor: Tensor) -> set[int]:
    index = torch.arange(_BUFFER.numel())
    view = index.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return set(view.flatten().tolist())


@settings(deadline=None, max_examples=500)
@given(views(), views())
def test_output_that_shares_an_element_is_refused(out: Tensor, other: Tensor) -> None:
    apart = torch.zeros(1)
    tensors = {"q": other, "k_cache": apart, "v_cache": apart, "out": out}
    mine, theirs = _addresses(out), _addresses(other)
    if mine & theirs:
        with pytest.raises(InputError, match="out: got memory that q also uses"):
            check_aliases(tensors, 0)
    elif max(mine) < min(theirs) or max(theirs) < min(mine):
        check_aliases(tensors, 0)


@st.composite
def caches(draw: st.DrawFn) -> Tensor:
    """A cache [batch, tokens, heads, dim] in a small buffer, its dimensions in any order."""
    sizes = [draw(st.integers(1, 3)) for _ in range(4)]
    strides, reach = [0, 0, 0, 1], sizes[3]
    for dim in draw(st.permutations(range(3))):
        strides[dim] = reach + draw(st.integers(0, 3))
        reach += strides[dim] * (sizes[dim] - 1)
    return _BUFFER.as_strided(sizes, strides, draw(st.integers(0, 40)))


@settings(deadline=None, max_examples=500)
@given(caches(), views())
def test_reading_an_element_of_the_row_that_is_written_is_refused(
    cache: Tensor, read: Tensor
) -> None:
    apart, token = torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1)
    tensors = {"q": read, "k_cache": apart, "v_cache": cache, "k": token, "v": token}
    mine = _addresses(read)
    for length in range(cache.shape[1]):
        try:
            lasting = check_aliases(tensors, length)
        except InputError:
            continue
        assert not mine & _addresses(cache[:, length])
        assert not (lasting and mine & _addresses(cache))
    lengths = torch.zeros(1, dtype=torch.int32)
    if mine & _addresses(cache):
        with pytest.raises(InputError, match="q: got memory of v_cache"):
            check_aliases(tensors, lengths)
    elif max(mine) < min(_addresses(cache)):
        assert check_aliases(tensors, lengths)
