"""Pages of 8 bits that keep a scale for every token and KV head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiling import GROUP as GROUP_OF_COMPILING
from helpers import diagonal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gqa_cutlass import InputError, OutOfPagesError, PagedKVCache, gqa_decode
from gqa_cutlass.cache.paged.step import DecodeStep
from gqa_cutlass.cache.scales import raw
from gqa_cutlass.proof.reference import same_bits, scale_of_row, stored

HEADS, GROUP, DIM, PAGE = 2, 2, 64, 4
E4M3 = torch.float8_e4m3fn
BY_TOKEN: dict[str, Any] = {"k_scale": "token", "v_scale": "token"}
Pair = tuple[Tensor, Tensor]


def new_cache(device: str, pages: int = 8, layers: int = 1, **options: Any) -> PagedKVCache:
    return PagedKVCache(
        pages, PAGE, HEADS, DIM, E4M3, device, num_layers=layers, **BY_TOKEN | options
    )


def tokens(*shape: int, device: str, seed: int = 0) -> Pair:
    """Keys and values of unlike sizes, [..., heads, dim]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(2, *shape, HEADS, 1, generator=generator).exp()
    k, v = (torch.randn(2, *shape, HEADS, DIM, generator=generator) * sizes).half().to(device)
    return k, v


def queries(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, HEADS * GROUP, DIM, dtype=torch.float32).half().to(device)


def joined(*pieces: Pair) -> Pair:
    k, v = (torch.cat(each) for each in zip(*pieces, strict=True))
    return k, v


def first(pair: Pair, *index: Any) -> Pair:
    return pair[0][index], pair[1][index]


def is_held(found: Pair, scales: Pair, told: Pair) -> bool:
    """Whether these are the tokens that were told, as an append stores them."""
    right = []
    for held, scale, new in zip(found, scales, told, strict=True):
        exact = scale_of_row(new, E4M3)
        right += [same_bits(scale, exact)]
        right += [same_bits(raw(held), raw(stored(new, exact.unsqueeze(-1), E4M3)))]
    return all(right)


def check(cache: PagedKVCache, told: dict[int, Pair], layer: int = 0) -> None:
    for sequence, pair in told.items():
        found = cache.gather(layer, sequence), cache.gather_scales(layer, sequence)
        assert is_held(*found, pair), sequence


def test_scales_are_shared_and_copied_with_pages(device: str) -> None:
    cache = new_cache(device)
    prompt, new = tokens(6, device=device), tokens(8, device=device, seed=1)
    one = cache.allocate()
    cache.prefill(one, *prompt)
    two = cache.fork(one)
    free = cache.free_pages
    cache.append([one], *first(new, slice(0, 1)))  # copies the page that both have
    assert cache.free_pages == free - 1
    told = {one: joined(prompt, first(new, slice(0, 1))), two: prompt}
    check(cache, told)
    cache.decode([two, one], queries(2, device=device), *first(new, slice(1, 3)))
    told[two] = joined(told[two], first(new, slice(1, 2)))
    told[one] = joined(told[one], first(new, slice(2, 3)))
    check(cache, told)
    cache.reorder([one, two], [1, 1])
    cache.decode([two], queries(1, device=device), *first(new, slice(3, 4)))
    told = {one: told[two], two: joined(told[two], first(new, slice(3, 4)))}
    check(cache, told)
    cache.truncate(two, 5)
    cache.prefill(two, *first(new, slice(4, 8)))
    told[two] = joined(first(prompt, slice(0, 5)), first(new, slice(4, 8)))
    check(cache, told)


def test_steps_are_those_of_gqa_decode_with_the_same_scales(device: str) -> None:
    cache = new_cache(device, layers=2)
    sequences = [cache.allocate(), cache.allocate()]
    prompts = [tokens(2, count, device=device, seed=count) for count in (7, 2)]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        cache.prefill(sequence, *prompt)
    new, q = tokens(2, 2, device=device, seed=9), queries(2, device=device)
    with cache.step(sequences) as step:
        for layer in range(2):
            pools = cache.k, cache.v, cache.k_scale, cache.v_scale
            k, v, k_scale, v_scale = (pool[layer].clone() for pool in pools)
            out = step.decode(layer, q, *first(new, layer))
            right = gqa_decode(
                q, k, v, *first(new, layer), cache_seqlens=step.seqlens, k_scale=k_scale,
                v_scale=v_scale, block_table=step.block_table,
            )  # fmt: skip
            assert same_bits(out, right)
            for pool, expected in zip(pools, (k, v, k_scale, v_scale), strict=True):
                assert same_bits(raw(pool[layer]), raw(expected))
    for layer in range(2):
        told = {
            sequence: joined(first(prompt, layer), first(new, layer, slice(i, i + 1)))
            for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True))
        }
        check(cache, told, layer)


def test_drafts_are_stored_as_one_step_after_another_stores_them(device: str) -> None:
    """To the bit, in pages that sequences share as well; those that are accepted stay."""
    caches = several, single = [new_cache(device, 16, layers=2) for _ in range(2)]
    prompts = [tokens(2, count, device=device, seed=count) for count in (7, 2)]
    named = list[list[int]]()
    for cache in caches:
        one, two = cache.allocate(), cache.allocate()
        for sequence, prompt in zip((one, two), prompts, strict=True):
            cache.prefill(sequence, *prompt)
        named.append([one, two, cache.fork(one)])
    told = [{i: first(prompts[b], layer) for i, b in enumerate((0, 1, 0))} for layer in range(2)]
    for seed, accepted in ((20, [1, 3, 0]), (21, [3, 0, 2])):
        q, new = queries(3, 3, device=device), tokens(2, 3, 3, device=device, seed=seed)
        with several.step(named[0], 3) as step:
            found = [step.decode(i, q, *first(new, i)) for i in range(2)]
        outs = list[list[Tensor]]()
        for t in range(3):
            with single.step(named[1]) as step:
                given = [(q[:, t], *first(new, i, slice(None), t)) for i in range(2)]
                outs.append([step.decode(i, *of) for i, of in enumerate(given)])
        largest = max(float(v.abs().max()) for _, v in (*prompts, new))
        for out, *right in zip(found, *outs, strict=True):
            torch.testing.assert_close(out, torch.stack(right, 1), rtol=0, atol=2**-7 * largest)
        for index, pairs in enumerate(told):
            for i in pairs:
                everything = joined(pairs[i], first(new, index, i))
                for cache, names in zip(caches, named, strict=True):
                    check(cache, {names[i]: everything}, index)
                pairs[i] = joined(pairs[i], first(new, index, i, slice(0, accepted[i])))
        several.accept(named[0], accepted)
        for sequence, count in zip(named[1], accepted, strict=True):
            single.truncate(sequence, single.length(sequence) - 3 + count)
        for index, pairs in enumerate(told):
            for cache, names in zip(caches, named, strict=True):
                check(cache, {names[i]: pair for i, pair in pairs.items()}, index)


def test_a_batch_decodes_drafts_and_accepts_some(device: str) -> None:
    """As a cache does, to the bit."""
    cache, other = new_cache(device), new_cache(device)
    prompt, new = tokens(5, device=device), tokens(3, 1, 2, device=device, seed=1)
    sequence, single = cache.allocate(), other.allocate()
    cache.prefill(sequence, *prompt)
    other.prefill(single, *prompt)
    batch = cache.batch(2, 24, tokens=2)
    batch.assign([sequence], steps=3)
    told = prompt
    for i, count in enumerate((2, 0, 1)):
        given = [queries(1, 2, device=device), *first(new, i)]
        with batch.step() as step:
            out = step.decode(0, *(t.expand(2, -1, -1, -1).contiguous() for t in given))
        assert torch.equal(out[:1], other.decode([single], *given)) and not out[1].any()
        batch.accept(count)
        other.accept([single], count)
        told = joined(told, first(new, i, 0, slice(0, count)))
        check(cache, {sequence: told})
        check(other, {single: told})
    batch.check()


@pytest.mark.xdist_group(GROUP_OF_COMPILING)
@pytest.mark.parametrize(("batched", "count"), diagonal([False, True], [None, 3]))
def test_compiled_steps_write_the_scales_of_their_tokens(batched: bool, count: int | None) -> None:
    """In one graph, which serves later steps as well, to the bit as others do."""
    caches = [new_cache("cpu", 16, layers=2) for _ in range(2)]
    prompts = [tokens(2, held, device="cpu", seed=held) for held in (9, 2)]
    named = [[cache.allocate(), cache.allocate()] for cache in caches]
    for cache, sequences in zip(caches, named, strict=True):
        for sequence, prompt in zip(sequences, prompts, strict=True):
            cache.prefill(sequence, *prompt)
    batches = [cache.batch(2, 24, count or 1) for cache in caches if batched]
    for batch, sequences in zip(batches, named, strict=False):
        batch.assign(sequences, steps=2)

    def forward(step: DecodeStep, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in range(2):
            q = step.decode(layer, q, k[layer], v[layer]) * 0.5
        return q

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    told = [{i: first(prompts[i], layer) for i in range(2)} for layer in range(2)]
    for seed in range(2):
        several = () if count is None else (count,)
        q, new = queries(2, *several, device="cpu"), tokens(2, 2, *several, device="cpu", seed=seed)
        outs = list[Tensor]()
        for which, each in enumerate((compiled, forward)):
            with (
                batches[which].step() if batched else caches[which].step(named[which], count or 1)
            ) as step:
                outs.append(each(step, q, *new))
        assert same_bits(*outs)
        for layer, pairs in enumerate(told):
            for i, pair in pairs.items():
                rows = first(new, layer, i) if count else first(new, layer, slice(i, i + 1))
                pairs[i] = joined(pair, rows)
                for cache, sequences in zip(caches, named, strict=True):
                    check(cache, {sequences[i]: pairs[i]}, layer)
    assert counter.frame_count == 1


def test_prompts_in_a_step_are_gathered_with_their_scales(device: str) -> None:
    cache = new_cache(device)
    one, two = cache.allocate(), cache.allocate()
    held, new = tokens(3, device=device), tokens(7, device=device, seed=1)
    cache.prefill(two, *held)
    with cache.step([one, two], [5, 2]) as step:
        assert is_held(step.gather(0, two), step.gather_scales(0, two), held)
        step.append(0, *new)
        told = joined(held, first(new, slice(5, 7)))
        assert is_held(step.gather(0, two), step.gather_scales(0, two), told)
    check(cache, {one: first(new, slice(0, 5)), two: told})
    with pytest.raises(OutOfPagesError):
        cache.prefill(one, *tokens(40, device=device))
    check(cache, {one: first(new, slice(0, 5)), two: told})


def test_a_batch_and_a_window_have_them_too(device: str) -> None:
    cache = new_cache(device, window=6)
    prompt, new = tokens(11, device=device), tokens(3, 1, device=device, seed=1)
    sequence, other = cache.allocate(), new_cache(device)
    cache.prefill(sequence, *prompt)
    whole = other.allocate()
    other.prefill(whole, *prompt)
    batch = cache.batch(2, 24)
    batch.assign([sequence], steps=3)
    for i in range(3):
        q = queries(1, device=device)
        both = [t.expand(2, -1, -1).contiguous() for t in (q, *first(new, i))]
        with batch.step() as step:
            out = step.decode(0, *both, window_size=(5, 0))
        right = other.decode([whole], q, *first(new, i), window_size=(5, 0))
        assert torch.equal(out[:1], right) and not out[1].any()
    batch.check()
    freed = cache.freed(sequence)
    told = joined(prompt, (new[0][:, 0], new[1][:, 0]))
    assert freed > 0
    check(cache, {sequence: first(told, slice(freed, None))})
    check(other, {whole: told})


def test_copies_go_on_alone() -> None:
    cache = new_cache("cpu")
    sequence, prompt = cache.allocate(), tokens(6, device="cpu")
    cache.prefill(sequence, *prompt)
    other, new = copy.deepcopy(cache), tokens(1, device="cpu", seed=1)
    twin = other.fork(sequence)
    other.append([twin], *new)  # which copies a page, scales included
    check(other, {sequence: prompt, twin: joined(prompt, new)})
    check(cache, {sequence: prompt})


def test_there_are_scales_to_gather_only_where_they_are_of_tokens() -> None:
    cache = PagedKVCache(4, PAGE, HEADS, DIM, E4M3, "cpu", k_scale=0.5)
    sequence = cache.allocate()
    told = "scales: got none of tokens; allowed: a cache with k_scale='token'; others have"
    with pytest.raises(InputError, match=f"PagedKVCache.gather_scales: {told}"):
        cache.gather_scales(0, sequence)
    with cache.step([sequence], 0) as step, pytest.raises(InputError, match=told):
        step.gather_scales(0, sequence)
    scaled = new_cache("cpu")
    with pytest.raises(InputError, match="PagedKVCache.gather_scales: layer: got 1; allowed"):
        scaled.gather_scales(1, scaled.allocate())
    scale = scaled.v_scale[0]
    assert isinstance(scale, Tensor)
    scale.untyped_storage().resize_(0)
    with pytest.raises(InputError, match="the cache's scales: got "):
        scaled.gather(0, scaled.allocate())


@pytest.mark.gpu
def test_graphs_of_batches_write_the_scales_of_their_tokens() -> None:
    graph, cache = torch.cuda.CUDAGraph(), new_cache("cuda")
    sequence, prompt = cache.allocate(), tokens(3, device="cuda")
    new = tokens(6, 1, device="cuda", seed=1)
    cache.prefill(sequence, *prompt)
    batch, q = cache.batch(1, 16), queries(1, device="cuda")
    given = [t[0].clone() for t in new]
    batch.assign([sequence], steps=6)

    def step() -> None:
        with batch.step() as opened:
            opened.decode(0, q, *given)

    batch.run(step)
    with torch.cuda.graph(graph):
        step()
    for i in range(1, 6):
        for t, of_all in zip(given, new, strict=True):
            t.copy_(of_all[i])
        batch.run(graph.replay)
    batch.check()
    check(cache, {sequence: joined(prompt, (new[0][:, 0], new[1][:, 0]))})
