"""What a call may ask for beyond plain attention: options that kernels have policies for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from gqa_cutlass.codegen.schema.launch import NumberType
from gqa_cutlass.codegen.schema.policies import POLICIES, Policy
from gqa_cutlass.errors import InputError, shown
from gqa_cutlass.tensors import byte_reach, flaw, memory_flaw

MAX_SOFTCAP = 1e37  # times log2(e), and a scale over it, are still float32
NUMBER_TYPES = {
    torch.float32: NumberType.FLOAT32,
    torch.float16: NumberType.FLOAT16,
    torch.bfloat16: NumberType.BFLOAT16,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """The features of a call, checked.

    Args:
        softcap: Bound of the scores, cap * tanh(score / cap); 0 for none.
        sinks: One more logit per head, [num_q_heads], or None.
    """

    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def policies(self) -> tuple[Policy, ...]:
        """What the kernel must have in its slots."""
        asked = {"softcap": self.softcap != 0, "sinks": self.sinks is not None}
        return tuple(policy for policy in POLICIES if asked.get(policy.feature, False))

    def fields(self, softmax_scale: float) -> dict[str, float]:
        """What they put into the kernel's argument, by the names of its fields."""
        found: dict[str, float] = {}
        if self.softcap:
            found["softcap_in"] = softmax_scale / self.softcap
            found["softcap_out"] = self.softcap * math.log2(math.e)
        if self.sinks is not None:
            found["sinks"] = self.sinks.data_ptr()
            found["sinks_type"] = NUMBER_TYPES[self.sinks.dtype]
        return found

    def memory(self) -> dict[str, Tensor]:
        """What the kernel reads for them, by the names of the argument's fields."""
        return {} if self.sinks is None else {"sinks": self.sinks}

    def check_apart(self, name: str, address: int, reach: int) -> None:
        """Raise InputError where what a kernel writes shares memory with what it reads for them."""
        for what, tensor in self.memory().items():
            start = tensor.data_ptr()
            if reach and address < start + byte_reach(tensor) and start < address + reach:
                _fail(name, f"memory that {what} also uses", "memory of its own")


NONE = Features()


def check_softcap(softcap: float, softmax_scale: float) -> float:
    """A bound of the scores.

    Raises:
        InputError: No number, negative, not finite, or too small for the scale.
    """
    number = isinstance(softcap, (int, float)) and not isinstance(softcap, bool)
    if not number or not 0 <= softcap <= MAX_SOFTCAP:
        _fail("softcap", shown(softcap), f"0 (none), or a number up to {MAX_SOFTCAP:g}")
    cap = float(softcap)
    least = abs(softmax_scale) / MAX_SOFTCAP
    if cap and (cap < least or not cap >= torch.finfo(torch.float32).tiny):
        least = max(least, torch.finfo(torch.float32).tiny)
        _fail("softcap", shown(softcap), f"0 (none), or {least:.3g} and more with this scale")
    return cap


def check_sinks(sinks: Tensor | None, num_q_heads: int, device: torch.device) -> Tensor | None:
    """Logits per head.

    Raises:
        InputError: No plain tensor, or one of another shape, type or device; not contiguous, not
            aligned, without memory, or requiring grad.
    """
    if sinks is None:
        return None
    if found := flaw(sinks):
        _fail("sinks", found.got, f"{found.allowed} or None")
    if sinks.dtype not in NUMBER_TYPES:
        _fail("sinks", str(sinks.dtype), ", ".join(map(str, NUMBER_TYPES)))
    if tuple(sinks.shape) != (num_q_heads,):
        _fail("sinks", f"shape {list(sinks.shape)}", f"[{num_q_heads}], one per query head")
    if sinks.device != device:
        _fail("sinks", f"a tensor on {sinks.device}", f"q's device, {device}")
    if not sinks.is_contiguous():
        _fail("sinks", f"strides {list(sinks.stride())}", "contiguous memory; call .contiguous()")
    if sinks.requires_grad and torch.is_grad_enabled():
        _fail(
            "sinks",
            "a tensor that requires grad (decode has no backward pass)",
            "tensors without grad; call it under torch.inference_mode() or torch.no_grad()",
        )
    if device.type != "meta":
        if found := memory_flaw(sinks):
            _fail("sinks", *found)
        if sinks.data_ptr() % sinks.element_size():
            allowed = f"an address that is a multiple of {sinks.element_size()}"
            _fail("sinks", f"address {sinks.data_ptr():#x}", allowed)
    return sinks


def identity(sinks: object) -> object:
    """What tells tensors apart that plans are kept for; such a plan keeps its tensor."""
    try:
        return id(sinks), sinks.data_ptr(), sinks.dtype, sinks.shape  # type: ignore[attr-defined]
    except Exception:  # no tensor: `check_sinks` says so
        return id(sinks)


def _fail(what: str, got: str, allowed: str) -> NoReturn:
    raise InputError(f"gqa_decode: {what}: got {got}; allowed: {allowed}. Nothing was launched.")
