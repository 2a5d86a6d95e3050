"""The ranks that share a context: a process group, or a dimension of a device mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gqa_cutlass.errors import CollectiveError, InputError, shown

Group = dist.ProcessGroup | DeviceMesh | None

# By their new names where torch has them: it warns of the old ones.
_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., object] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_turns: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # words gathered


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks of a call, and which one this is.

    Args:
        group: Their process group.
        rank: This one's number in the group.
        size: How many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    @property
    def device(self) -> torch.device:
        """Where tensors may be that the group moves."""
        backends = str(dist.get_backend_config(self.group))  # such as "cpu:gloo,cuda:nccl"
        return torch.device("cpu" if "cpu:" in backends else "cuda")

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """Have every rank's tensor, one after the other.

        Raises:
            CollectiveError: A rank did not come.
        """
        self._run("all_gather", lambda: _all_gather(out, own, group=self.group), own)

    def all_to_all(self, out: Tensor, own: Tensor) -> None:
        """Give every rank its part of a tensor, and have the part for this one of theirs.

        Raises:
            CollectiveError: A rank did not come.
        """
        self._run("all_to_all", lambda: dist.all_to_all_single(out, own, group=self.group), own)

    def reduce_scatter(self, out: Tensor, own: Tensor) -> None:
        """Have the sum of the ranks' tensors, this rank's part of it.

        Raises:
            CollectiveError: A rank did not come.
        """
        self._run("reduce_scatter", lambda: _reduce_scatter(out, own, group=self.group), own)

    def gather_words(self, own: str) -> list[str]:
        """Have a word of every rank; waits for all of them.

        By way of the store that the group was made with, and not by a collective: what another rank
        sends meanwhile, which is not at the same point, must not be taken for it.

        Raises:
            CollectiveError: A rank did not come.
        """
        turn = _turns.get(self.group, 0)
        _turns[self.group] = turn + 1
        keys = [f"gqa_cutlass/{turn}/{rank}" for rank in range(self.size)]
        store = self.group.get_group_store()
        found: list[str] = []

        def gather() -> None:
            store.set(keys[self.rank], own)
            store.wait(keys)
            found.extend(store.get(key).decode() for key in keys)

        self._run("agreement", gather)
        return found

    def _run(self, name: str, collective: Callable[[], object], own: Tensor | None = None) -> None:
        try:
            collective()
        except RuntimeError as error:  # torch's, for a timeout or a connection that was closed
            size = "" if own is None else f" of {own.nbytes} bytes"
            told = " ".join(str(error).split())[:300]
            raise CollectiveError(
                f"decode_context_parallel: {name}{size} among {self.size} ranks failed on rank "
                f"{self.rank}: {told}; needed: all ranks, alive, in the same call. Look "
                "for the rank that stopped first, and make the process group anew."
            ) from error


def ranks_of(group: Group) -> Ranks:
    """Resolve a group.

    Raises:
        InputError: There is no process group, or it is not one that this rank belongs to.
    """
    if not dist.is_available() or not dist.is_initialized():
        _fail(
            "none: torch.distributed is not initialised",
            "a process group. Start the ranks with torchrun, and call "
            "torch.distributed.init_process_group first",
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            _fail(
                f"a DeviceMesh of {group.ndim} dimensions",
                "one dimension of it, such as mesh['context']",
            )
        group = group.get_group()
    found: object = dist.group.WORLD if group is None else group
    if not isinstance(found, dist.ProcessGroup):
        outside = found == dist.GroupMember.NON_GROUP_MEMBER
        _fail(
            "one without this rank" if outside else shown(found),
            "a ProcessGroup that the caller is part of, a DeviceMesh of one dimension, or None for "
            "all ranks",
        )
    return Ranks(group=found, rank=dist.get_rank(found), size=dist.get_world_size(found))


def check_backend(ranks: Ranks, device: torch.device) -> None:
    """Raise InputError unless the group's backend moves tensors of a device."""
    config = str(dist.get_backend_config(ranks.group))  # such as "cpu:gloo,cuda:nccl"
    if f"{device.type}:" not in config:
        remedy = (
            "init_process_group('cpu:gloo,cuda:nccl') has one for each"
            if device.type in ("cpu", "cuda")
            else "move the tensors to a GPU, or to the CPU"
        )
        _fail(
            f"one with the backends {config}, and tensors on {device}",
            f"a group for both; {remedy}",
        )


def _fail(got: str, allowed: str) -> NoReturn:
    raise InputError(
        f"decode_context_parallel: group: got {got}; allowed: {allowed}. Nothing was launched."
    )
