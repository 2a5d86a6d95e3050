"""`python -m bench.continuous`: tokens per second of transformers' continuous batching.

Requests of unlike prompts go through transformers' own manager, all of them twice: the first round
compiles kernels and captures graphs, the second is timed, from the first request's submission to
the last one's last token. Every way has the manager's defaults but for sizes, which are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers.integrations import hub_kernels

from bench import checkout, e2e_steps
from bench.e2e_points import SHAPES
from gqa_cutlass.cli.failures import status_of
from gqa_cutlass.codegen.files import update, writing
from gqa_cutlass.integrations import flash_kernel
from gqa_cutlass.integrations.continuous import HAS_PREFIX
from gqa_cutlass.integrations.transformers import continuous_batching
from gqa_cutlass.proof.evidence import provenance

KERNEL = "gqa-cutlass/flash-attn3"  # a name by which transformers loads a kernel
WAYS = {
    "sdpa": "transformers' SDPA",
    "ours": "ours, of keys that transformers gathers",
    "ours-pages": "ours, of transformers' pages; prompts as above",
}
_KNOWN = {field.name for field in fields(transformers.ContinuousBatchingConfig)}
PAGE_SIZE = "page_size" if "page_size" in _KNOWN else "block_size"  # as this version calls it


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, or why there is none."""

    way: str
    seconds: float | None = None
    new_tokens_per_second: float | None = None
    all_tokens_per_second: float | None = None
    agreeing_tokens: float | None = None  # before the first that is not the first row's, mean
    missing: str | None = None


@contextmanager
def kernel_of_ours() -> Iterator[None]:
    """Have transformers find our calls under `KERNEL`, as `kernels` would, which is not needed."""
    with (
        mock.patch.object(hub_kernels, "is_kernels_available", lambda: True),
        mock.patch.object(hub_kernels, "get_kernel", lambda *_, **__: flash_kernel),
    ):
        yield


def configured(model: Any, way: str, **options: Any) -> Any:
    """Have a model attend in one way, and the manager's configuration for it.

    Args:
        model: Of transformers.
        way: One of `WAYS`.
        options: Of the configuration; `max_blocks_per_request` is for "ours-pages" alone.
    """
    if way == "ours-pages":
        model.set_attn_implementation(KERNEL)
        return transformers.ContinuousBatchingConfig(**options)
    options["max_blocks_per_request"] = 0
    if way == "ours":
        return continuous_batching(model, **options)
    model.set_attn_implementation("paged|sdpa" if HAS_PREFIX else "sdpa")
    if "auto_switch_to_flash" in _KNOWN:
        options["auto_switch_to_flash"] = False
    return transformers.ContinuousBatchingConfig(**options)


def serve(
    model: Any, requests: Sequence[Request], config: Any, rounds: int = 1
) -> tuple[list[list[int]], float]:
    """Let the manager answer all requests, a few times.

    Returns:
        The new tokens of each, and how many seconds the last round took.

    Raises:
        RuntimeError: transformers has failed a request.
    """
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    ) as manager:
        for _ in range(rounds):
            begin = time.perf_counter()
            names = [
                manager.add_request(request.prompt, max_new_tokens=request.new_tokens)
                for request in requests
            ]
            answers = _answers(manager, len(names))
            seconds = time.perf_counter() - begin
    return [answers[name] for name in names], seconds


def _answers(manager: Any, count: int) -> dict[str, list[int]]:
    found = {}
    for result in manager:
        if result.error:
            break
        if result.is_finished():
            found[result.request_id] = result.generated_tokens
        if len(found) == count:
            return found
    raise RuntimeError(f"transformers answered {len(found)} of {count} requests")


def requests_of(count: int, prompts: tuple[int, int], new_tokens: int, vocabulary: int) -> Any:
    """Requests with prompts of unlike lengths, always the same ones."""
    chance = random.Random(0)
    return [
        Request(
            prompt=[chance.randrange(1, vocabulary) for _ in range(chance.randint(*prompts))],
            new_tokens=new_tokens,
        )
        for _ in range(count)
    ]


def sizes_for(requests: Sequence[Request], tokens: int, page_size: int = 256) -> dict[str, Any]:
    """The manager's sizes: pages for all requests at once, and so many tokens in a batch."""
    pages = [-(-(len(r.prompt) + r.new_tokens) // page_size) for r in requests]
    return {
        PAGE_SIZE: page_size, "num_blocks": sum(pages) + len(pages), "max_batch_tokens": tokens,
        "max_requests_per_batch": len(requests), "max_blocks_per_request": max(pages) + 1,
        "allow_block_sharing": False,  # or the second round would find the first one's prompts
    }  # fmt: skip


def row_of(way: str, requests: Sequence[Request], answers: Any, seconds: float, first: Any) -> Row:
    """What a way took, and for how long it answered as the first way did.

    With random weights many tokens are about as likely, and answers part where roundings differ.
    """
    new = sum(request.new_tokens for request in requests)
    read = sum(len(request.prompt) for request in requests)
    return Row(
        way=way, seconds=round(seconds, 3), new_tokens_per_second=round(new / seconds, 1),
        all_tokens_per_second=round((new + read) / seconds, 1),
        agreeing_tokens=round(sum(map(_agreeing, answers, first)) / len(requests), 1),
    )  # fmt: skip


def _agreeing(answer: list[int], other: list[int]) -> int:
    """Tokens before the first one that differs."""
    pairs = enumerate(zip(answer, other, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(answer))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    titles = (
        "attention",
        "seconds",
        "new tokens/s",
        "all tokens/s",
        "new tokens as in the first row",
    )
    lines = [titles, ("---",) * len(titles)]
    for row in rows:
        found = row.seconds, row.new_tokens_per_second, row.all_tokens_per_second
        cells = (row.missing, "-", "-", "-") if row.missing else (*found, row.agreeing_tokens)
        lines.append((WAYS[row.way], *map(str, cells)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the options say, and write the record."""
    parser = argparse.ArgumentParser(prog="continuous", description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=8, help="of Llama-3-8B's shape; default: 8")
    add("--requests", type=int, default=64)
    add("--prompts", type=int, nargs=2, default=(200, 2000), metavar=("FROM", "TO"))
    add("--new-tokens", type=int, default=128)
    add("--batch-tokens", type=int, default=2048, help="tokens of a batch at most; default: 2048")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--out", type=Path, help="folder for the record; default: the checkout's results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("continuous: needs a GPU", file=sys.stderr)
        return 1
    model = e2e_steps.build(SHAPES[0], options.layers, "cuda", torch.bfloat16)
    prompts = tuple(options.prompts)
    vocabulary = model.config.vocab_size
    requests = requests_of(options.requests, prompts, options.new_tokens, vocabulary)
    rows = measured(model, options.ways, requests, sizes_for(requests, options.batch_tokens))
    run = provenance() | {
        "transformers": transformers.__version__, "commit": checkout.commit(),
        "model": f"{SHAPES[0].name}, {options.layers} layers, random weights, bfloat16",
        "requests": f"{options.requests}, prompts of {prompts[0]} to {prompts[1]} tokens, "
        f"{options.new_tokens} new ones each, batches of up to {options.batch_tokens} tokens",
    }  # fmt: skip
    content = json.dumps({"run": run, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    folder = options.out or checkout.results_folder()
    name = f"{run['gpu'].lower().replace(' ', '-')}-continuous.json"
    with writing("continuous: --out", folder):
        update(folder, {name: content})
    print(table(rows))
    return 0


def measured(
    model: Any, ways: Sequence[str], requests: Sequence[Request], sizes: dict[str, Any]
) -> list[Row]:
    """A row for every way; one that fails must not lose the others."""
    rows, first = [], None
    for way in ways:
        try:
            with kernel_of_ours():
                config = configured(model, way, **sizes)
                answers, seconds = serve(model, requests, config, rounds=2)
            first = first or answers
            rows.append(row_of(way, requests, answers, seconds, first))
        except Exception as error:
            rows.append(Row(way=way, missing=f"{type(error).__name__}: {error}"[:300]))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(status_of(main))
