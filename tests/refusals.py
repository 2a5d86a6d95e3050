"""Calls with every kind of tensor as every argument; run in a process of its own, for some kinds
have ended it. Prints what was not refused as it should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from executors import Notes, running_on
from helpers import call_tensors
from tensor_kinds import Kind, kinds_for
from torch import Tensor
from torch._subclasses import FakeTensorMode

import gqa_cutlass
from gqa_cutlass import (
    GQADecodeConfig,
    explain,
    flash_attn_with_kvcache,
    gqa_attention_decode,
    gqa_decode,
)
from gqa_cutlass.cpu import executor as cpu
from gqa_cutlass.errors import InputError
from gqa_cutlass.ptxsim.memory.spaces import Region

Call = Callable[..., object]
Arguments = dict[str, Any]
NOTES = Notes()


def calls() -> Iterator[tuple[str, Call, Arguments]]:
    """Every public call: before a plan for its layout is at hand, and after."""
    tensors: Arguments = call_tensors()
    valid = tensors | {"cache_seqlens": torch.full((2,), 3, dtype=torch.int32)}
    yield "explain", explain, tensors
    yield "plan", gqa_cutlass.plan, valid
    yield "gqa_decode, first", gqa_decode, valid
    gqa_decode(**valid)
    yield "gqa_decode, second", gqa_decode, valid
    the_plan = gqa_cutlass.plan(**valid)
    yield "the plan, first", the_plan, valid
    the_plan(**valid)
    yield "the plan, second", the_plan, valid
    some = {name: valid[name] for name in ("q", "k_cache", "v_cache")}
    attends = gqa_cutlass.plan(**some, cache_seqlens=3)
    attends(**some, k=None, v=None, cache_seqlens=3)
    yield "a plan that appends nothing", partial(attends, k=None, v=None, cache_seqlens=3), some
    config = GQADecodeConfig(
        batch_size=2, cache_len=3, num_q_heads=8, num_kv_heads=2, head_dim=64, scale=0.125,
        max_seq_len=16,
    )  # fmt: skip
    story = {name: tensors[name].unsqueeze(1) for name in ("q", "k", "v")}
    story |= {"kv_cache_k": tensors["k_cache"], "kv_cache_v": tensors["v_cache"]}
    story |= {"output": tensors["out"].view(2, 1, 512)}
    token = {name: valid[name].unsqueeze(1) for name in ("q", "k", "v", "out")}
    yield "flash_attn_with_kvcache", flash_attn_with_kvcache, valid | token
    yield "gqa_attention_decode", partial(gqa_attention_decode, config=config), story


def outcome(call: Call, arguments: Arguments, name: str, kind: Kind) -> str:
    """What a call did with a kind of tensor as one argument; nothing if it was refused."""
    before = {n: t.clone() for n, t in arguments.items()}
    seen: list[str] = []

    def use(tensor: Tensor) -> None:
        try:
            call(**arguments | {name: tensor})
            seen.append("accepted")
        except InputError:
            seen.append("")
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}"[:200])

    count = len(NOTES.launches)
    kind(arguments[name], use)
    written = [n for n, t in before.items() if not torch.equal(t, arguments[n])]
    seen += [f"wrote {written}"] * bool(written) + ["launched"] * (len(NOTES.launches) > count)
    return ", ".join(filter(None, seen)) if seen else "not called"


def surroundings() -> Iterator[tuple[str, Callable[[Callable[[], object]], object]]]:
    """Modes in which torch makes tensors without memory; each runs what it is given."""

    def fake(work: Callable[[], object]) -> None:
        with FakeTensorMode():
            work()

    yield "FakeTensorMode", fake
    for transform in (torch.func.functionalize, torch.func.grad):
        inside = transform  # bound now

        def run(work: Callable[[], object], inside: Any = inside) -> None:
            inside(lambda x: (work(), x.sum())[1])(torch.zeros(2))

        yield transform.__name__, run


def plans_in(surrounding: Callable[[Callable[[], object]], object]) -> str:
    """Plan, and call a plan made before, where new tensors have no memory; what went wrong."""
    call: Arguments = call_tensors(max_seq_len=300) | {"cache_seqlens": 3, "num_splits": 16}
    a_plan = gqa_cutlass.plan(**call)
    del call["num_splits"]
    wrong: list[str] = []

    def work() -> None:
        a_plan(**call)
        try:
            gqa_cutlass.plan(**call)
            wrong.append("a plan was made")
        except InputError as error:
            wrong.extend([] if "torch's mode: got one in which" in str(error) else [str(error)])

    def run(program: None, shape: Any, params: Any, regions: list[Region], *_: object) -> None:
        wrong.extend(f"no memory for {r.name}" for r in regions if not r.address)
        wrong.extend(
            []
            if params.decode.split_workspace and params.decode.merge_counters
            else ["no workspace"]
        )

    cpu.run = run
    surrounding(work)
    return ", ".join(wrong)


def main() -> None:
    """Try every kind as every argument of every call."""
    warnings.simplefilter("ignore")
    cpu.program_of = lambda config: None  # type: ignore[assignment, return-value]
    for what, surrounding in surroundings():
        print(f"{what}: {plans_in(surrounding) or 'refused'}")
    tried = 0
    with running_on(NOTES):
        for what, call, arguments in calls():
            for name, plain in arguments.items():
                for kind_name, kind in kinds_for(plain.dtype, slow=True).items():
                    print(
                        f"{what}: {name}: {kind_name}: ", end="", flush=True
                    )  # known if it ends us
                    print(outcome(call, arguments, name, kind) or "refused")
                    tried += 1
    print(f"tried {tried}")


if __name__ == "__main__":
    main()
