"""The plans that calls have made, by what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gqa_cutlass.call.asked import check, fields_of
from gqa_cutlass.call.executor import Executor, Task
from gqa_cutlass.call.given import LENGTHS, Given, check_mode, key_of, see, tokens_of
from gqa_cutlass.call.layout import check_lengths, launch_of, problem_of
from gqa_cutlass.call.plan import Plan
from gqa_cutlass.call.tokens import check_tree, with_tokens
from gqa_cutlass.call.turning import check_turning, longest_to_turn

_MAX_PLANS, _LATEST = 4096, 4


class Plans:
    """Makes plans, and keeps those that calls asked for.

    Args:
        executor_of: Where the kernels for tensors on a device run.

    Attributes:
        known: By layout and options.
        latest: The latest few, by what is quickly known of a call.
    """

    def __init__(self, executor_of: Callable[[torch.device], Executor]) -> None:
        self._executor_of = executor_of
        self.known: dict[object, Plan] = {}
        self.latest: dict[object, tuple[Plan, ...]] = {}

    def find(
        self,
        call: str,
        given: Given,
        options: Mapping[str, Any],
        quick: object = None,
        own: bool = False,
    ) -> tuple[Plan, bytes]:
        """The plan for a call, made if there is none, and what it launches.

        Args:
            call: The name of the function that was called.
            given: The tensors of the call.
            options: Its other options.
            quick: By what to find the plan next time.
            own: Whether to make a plan of its own, which keeps the tensors of features.

        Raises:
            GqaError: As for `gqa_decode`.
            TypeError: There is no such option.
        """
        asked, policies = check(call, options, given)
        layout = see(given)
        on_device = LENGTHS in layout
        key = key_of(layout), on_device, asked, torch.is_grad_enabled()
        plan = None if own else self.known.get(key)
        if plan is not None:
            check_lengths(layout, plan.problem.batch_size)
            argument = plan.bind(given)
        else:
            check_mode()
            tokens = tokens_of(layout, asked.max_seqlen_q)
            if tokens.several:
                policies = with_tokens(policies)
            if policies:
                check_tree(tokens, layout)
                check_turning(layout, tokens)
            problem = problem_of(layout, policies, asked.window_size[0], asked.out_dtype, tokens)
            executor = self._executor_of(layout["q"].device)
            ragged = on_device and asked.ragged
            chosen = launch_of(problem, executor.device, asked, ragged=ragged)
            scale = asked.softmax_scale
            scale = problem.head_dim**-0.5 if scale is None else float(scale)
            features = (*policies, *problem.policies)
            special = features or asked.k_scale is not None or asked.v_scale is not None
            task = Task(
                layout=layout,
                problem=problem,
                asked=asked,
                softmax_scale=scale,
                out_dtype=asked.out_dtype or layout["q"].dtype,
                fields=fields_of(asked, layout, scale, features, tokens) if special else {},
                tokens=tokens,
                positions=longest_to_turn(layout, tokens) if policies else None,
                dispatch=chosen,
            )
            plan = Plan(executor, task, given, keeps=own)
            argument = plan.first
        if not own:
            if len(self.known) >= _MAX_PLANS:
                self.known.clear()
                self.latest.clear()
            self.known[key] = plan
            latest = dict.fromkeys((plan, *self.latest.get(quick, ())))  # each once, in this order
            self.latest[quick] = tuple(latest)[:_LATEST]
        return plan, argument
