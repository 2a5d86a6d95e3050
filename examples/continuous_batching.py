"""An engine loop: requests come and go, and those that run are decoded as one batch.

All of them begin with the same tokens, whose pages they share. What is missing when the pool is
full is told before anything is written, so that the loop can let a request wait, or put one off.
Checked against a model without a cache.

Runs on the GPU; where there is none, in the simulator, at toy sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gqa_cutlass import OutOfPagesError, PagedKVCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = (4, 32, 8, 128) if GPU else (2, 4, 1, 64)
PAGES, PAGE_SIZE = (100, 16) if GPU else (8, 4)
PREFIX, REQUESTS, MOST = (500, 40, 16) if GPU else (10, 4, 3)  # tokens shared; requests; at a time
LONGER = 10 if GPU else 1  # what each request has of its own
VOCABULARY, WIDTH = 1000, Q_HEADS * HEAD_DIM
KIND = {"dtype": torch.float16, "device": DEVICE}

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v


@dataclass(eq=False)
class Request:
    """Tokens so far, of which the cache has all but the last, and how many there are to be."""

    tokens: list[int]
    until: int
    sequence: int = -1
    states: list[Tensor] = field(default_factory=list)  # that the new tokens were taken from


class Model:
    """Attention with residuals, and weights that mean nothing."""

    def __init__(self) -> None:
        self.embedding = torch.randn(VOCABULARY, WIDTH, **KIND)
        rows = WIDTH + 2 * KV_HEADS * HEAD_DIM
        self.into = torch.randn(LAYERS, rows, WIDTH, **KIND) / WIDTH**0.5
        self.back = torch.randn(LAYERS, WIDTH, WIDTH, **KIND) / WIDTH**0.5

    def __call__(self, tokens: list[int], attend: Attend) -> Tensor:
        """States of tokens, which may be of one sequence or of several."""
        x = self.embedding[tokens]
        for layer in range(LAYERS):
            qkv = F.linear(x, self.into[layer]).view(len(tokens), -1, HEAD_DIM)
            q, k, v = qkv.split([Q_HEADS, KV_HEADS, KV_HEADS], dim=1)
            out = attend(layer, q, k, v).flatten(1)
            x = F.rms_norm(x + F.linear(out, self.back[layer]), (WIDTH,))
        return x

    def next(self, states: Tensor) -> list[int]:
        """The likeliest next tokens."""
        return (states @ self.embedding.T).argmax(-1).tolist()


class Engine:
    """Lets as many requests run as there are pages for."""

    def __init__(self, model: Model, prefix: list[int]) -> None:
        self.model, self.prefix = model, prefix
        self.cache = PagedKVCache(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, **KIND, num_layers=LAYERS)
        self.shared = self.cache.allocate()
        self.prompt(self.shared, prefix)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.put_off = 0

    def turn(self) -> list[Request]:
        """A token for every running request; returns those that are done."""
        while self.waiting and len(self.running) < MOST and self.begin(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        while self.running and not self.decode():
            self.put_off += 1
            request = self.running.pop()  # the youngest; it begins again when there are pages
            self.cache.free(request.sequence)
            self.waiting.appendleft(request)
        done = [request for request in self.running if len(request.tokens) >= request.until]
        self.running = [request for request in self.running if request not in done]
        self.cache.free([request.sequence for request in done])
        return done

    def begin(self, request: Request) -> bool:
        """Run a request's prompt behind the shared one, if there are the pages."""
        request.sequence = self.cache.fork(self.shared)  # takes no page, copies nothing
        try:
            state = self.prompt(request.sequence, request.tokens[len(self.prefix) :])
        except OutOfPagesError:
            self.cache.free(request.sequence)
            return False
        self.extend([request], state)
        return True

    def prompt(self, sequence: int, tokens: list[int]) -> Tensor:
        """Store a prompt, and attend to it by SDPA; returns the last token's state."""
        with self.cache.step([sequence], len(tokens)) as step:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                step.append(layer, k, v)
                return causal(q, *step.gather(layer, sequence))

            return self.model(tokens, attend)[-1:]

    def decode(self) -> bool:
        """One step of all running requests, if there are the pages."""
        try:
            with self.cache.step([request.sequence for request in self.running]) as step:
                states = self.model([r.tokens[-1] for r in self.running], step.decode)
        except OutOfPagesError as error:
            print(f"{error.missing} pages missing: the youngest of {len(self.running)} waits")
            return False
        self.extend(self.running, states)
        return True

    def extend(self, requests: list[Request], states: Tensor) -> None:
        for request, state, token in zip(requests, states, self.model.next(states), strict=True):
            request.states.append(state)
            request.tokens.append(token)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last tokens' attention to all of a sequence, [tokens, heads, head_dim]."""
    seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    heads = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
    return out[0].transpose(0, 1)


def main() -> float:
    """Serve requests; returns the largest difference from the model without a cache."""
    torch.manual_seed(0)
    model, draw = Model(), partial(torch.randint, VOCABULARY)
    prefix = draw((PREFIX,)).tolist()
    engine, done = Engine(model, prefix), []
    for number in range(REQUESTS):
        own = draw((LONGER * (1 + 3 * number % 7),)).tolist()
        until = PREFIX + len(own) + LONGER * (4 + number % 3)
        engine.waiting.append(Request(prefix + own, until))
        done += engine.turn()
    while engine.waiting or engine.running:
        done += engine.turn()

    worst = 0.0
    for request in done:
        alone = model(request.tokens[:-1], lambda _, q, k, v: causal(q, k, v))
        states = torch.stack(request.states)
        worst = max(worst, (states - alone[-len(states) :]).abs().max().item())
    engine.cache.free(engine.shared)
    print(f"{len(done)} requests served, {engine.put_off} times one was put off")
    print(f"{engine.cache.free_pages} of {PAGES} pages are free; difference up to {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
