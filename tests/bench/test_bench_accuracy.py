"""What caches of 8 bits cost in accuracy: the script that says so, run small, and its page."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy import (
    BEGIN,
    DATA,
    DOCUMENT,
    E4M3,
    END,
    GRAINS,
    MOST,
    Sizes,
    attended,
    draw,
    error,
    grains,
    misses,
    percent,
    report,
    stored,
)

SMALL = Sizes(batch=2, tokens=128, head_dim=64)


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, str], list[float]]:
    """By data and type, per tensor, per KV head, and per token and head, in percent."""
    return {(row[0], row[1]): [float(it.removesuffix(" %")) for it in row[2:]]
            for row in grains(SMALL)}  # fmt: skip


def test_what_the_page_says_of_types_and_scales_holds_of_other_sizes(
    errors: dict[tuple[str, str], list[float]],
) -> None:
    for name in DATA:
        of_tensor, of_head, of_token = errors[name, "e4m3"]
        assert 0.25 < of_tensor / errors[name, "e5m2"][0] < 0.8
        assert 0.8 < of_head / of_tensor < 1.25
        assert of_token < 1.1 * of_tensor
    tensor, head, token = errors["heads of unlike sizes", "int8"]
    assert token < head < tensor / 10
    tails = errors["heavy tails (Student t, 3)", "e4m3"]
    assert tails[2] < 0.9 * min(tails[:2])


def test_scales_that_cut_numbers_off_cost_more_than_those_that_are_too_large() -> None:
    found = {
        float(scale): [float(it.removesuffix(" %")) for it in row] for scale, *row in misses(SMALL)
    }
    rows, unlike = ({scale: row[i] for scale, row in found.items()} for i in (0, 2))
    assert rows[0.125] > rows[0.25] > rows[0.5] > 1.3 * rows[1]
    assert rows[16] < 1.1 * rows[1]
    assert unlike[4] > 1.3 * unlike[1] and unlike[16] > 4 * unlike[1]


@pytest.mark.parametrize("kind", MOST, ids=str)
def test_numbers_that_a_type_has_are_stored_as_they_are(kind: torch.dtype) -> None:
    held = torch.tensor([MOST[kind], 1.0, -2.0, 0.0]).half().view(1, 1, 1, 4)
    for grain in GRAINS.values():
        assert torch.equal(stored(held, kind, grain), held.double())
        assert torch.equal(stored(0 * held, kind, grain), 0 * held.double())
    assert not torch.equal(stored(held, kind, (3,), missed=0.5), held.double())


def test_the_page_has_the_tables_of_the_script() -> None:
    """Titles, rows and one number; `python3 -m bench.accuracy --write` writes all."""
    text = DOCUMENT.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    small = report(SMALL).splitlines()
    assert [line.split("|")[1] for line in written if "|" in line] == [
        line.split("|")[1] for line in small if "|" in line
    ]
    drawn = draw("normal", Sizes())
    held = [stored(t, E4M3, GRAINS["per tensor"]) for t in (drawn.k, drawn.v)]
    found = error(attended(drawn, *held), attended(drawn, drawn.k, drawn.v))
    assert f"| normal | e4m3 | {percent(found)} |" in "\n".join(written)
