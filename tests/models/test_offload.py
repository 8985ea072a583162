"""The planner of layers on GPUs: numbers by hand, and what holds for all numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.models.choice import BUFFER_BYTES, Room, best, fit
from emlocal.models.gguf import read_header
from emlocal.models.offload import SPARE_BYTES, Sizes, divided, even_sizes, placed, plan, sizes_of
from emlocal.models.resolve import candidates, catalog
from tests.tiny_gguf import write_tiny_gguf

FOUR = Sizes((10, 10, 10, 10, 7), (2, 2, 2, 2, 0))
"""Four layers of 10 bytes and 2 of cache, and the output of 7."""


@pytest.mark.parametrize(
    ("free", "counts", "held"),
    [
        ([0], (0,), (0,)),
        ([6], (0,), (0,)),
        ([7], (1,), (7,)),
        ([18], (1,), (7,)),
        ([19], (2,), (19,)),
        ([54], (4,), (43,)),
        ([55], (5,), (55,)),
        ([1000], (5,), (55,)),
        ([12, 7], (1, 1), (12, 7)),
        ([24, 31], (2, 3), (24, 31)),
        ([31, 24], (2, 2), (24, 19)),  # the last layer does not fit beside the output
        ([7, 24], (0, 2), (0, 19)),  # the first has no room for the layer before the output
        ([], (), ()),
    ],
)
def test_layers_by_hand(free: list[int], counts: tuple[int, ...], held: tuple[int, ...]) -> None:
    found = plan(FOUR, free)
    assert (found.counts, found.held) == (counts, held)


def test_shares_are_divided_as_llama_cpp_divides_them() -> None:
    assert divided(FOUR, 5, [1, 1]).counts == (3, 2)
    assert divided(FOUR, 5, [3, 1]).counts == (4, 1)
    assert divided(FOUR, 4, [1, 0]).counts == (4, 0)
    assert divided(FOUR, 99, [0, 1]).counts == (0, 5)
    assert plan(FOUR, [24, 100], [1, 1]).counts == (2, 2)  # 3 of 5 would be 36 on the first


def test_planned_counts_given_as_shares_come_back() -> None:
    sizes = even_sizes(330, 32, 64)
    for free in ([100, 100, 200], [57, 91, 33], [0, 120, 40], [400, 1, 1]):
        found = plan(sizes, free)
        assert divided(sizes, found.layers, found.counts).counts == found.counts


NUMBERS = st.integers(0, 50)
SIZES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12).map(
    lambda pairs: Sizes((*(a for a, _ in pairs), 9), (*(b for _, b in pairs), 0))
)
FREE = st.lists(st.integers(0, 400), max_size=4)


@given(SIZES, FREE)
def test_no_gpu_takes_more_than_it_has(sizes: Sizes, free: list[int]) -> None:
    found = plan(sizes, free)
    assert all(held <= room for held, room in zip(found.held, free, strict=True))
    assert sum(found.held) == sizes.of_last(found.layers)
    assert found.layers <= len(sizes.layers)


@given(SIZES, FREE, st.data())
def test_more_memory_never_gives_fewer_layers(sizes: Sizes, free: list[int], data: st.DataObject) -> None:
    more = [room + data.draw(st.integers(0, 200)) for room in free]
    shares = data.draw(st.lists(st.integers(1, 5), min_size=len(free), max_size=len(free)))
    assert plan(sizes, more).layers >= plan(sizes, free).layers
    assert plan(sizes, more, shares).layers >= plan(sizes, free, shares).layers


@given(SIZES, st.integers(0, 400))
def test_one_layer_more_would_not_fit_on_one_gpu(sizes: Sizes, free: int) -> None:
    found = plan(sizes, [free])
    if found.layers < len(sizes.layers):
        # zeros may make several numbers of layers equally large; the planner takes the most
        assert sizes.of_last(found.layers + 1) > free


@given(SIZES, FREE.filter(bool))
def test_a_longer_cache_never_gives_more_layers(sizes: Sizes, free: list[int]) -> None:
    longer = replace(sizes, cache=tuple(2 * each for each in sizes.cache))
    assert plan(longer, free).layers <= plan(sizes, free).layers


def test_sizes_of_a_file(tmp_path: Path) -> None:
    header = read_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    sizes = sizes_of(header, list(header.tensors.items()), 100, 2.0)
    of = {name: tensor.nbytes for name, tensor in header.tensors.items()}
    assert sizes.layers[0] == sum(n for name, n in of.items() if name.startswith("blk.0."))
    output = of.get("output.weight", of["token_embd.weight"]) + of["output_norm.weight"]
    assert sizes.layers[1:] == (output,)
    assert sizes.cache == (100 * 2 * (8 + 8) * 2, 0)


# ------------------------------------------------------------------- the catalogue


def test_what_fits_by_hand() -> None:
    entry = catalog()["qwen3:8b"]
    cache = 147_456 * 8192
    needed = entry.bytes + cache + BUFFER_BYTES + 80_000_000
    assert fit(entry, Room(needed)).describe() == "yes"
    assert fit(entry, Room(needed - 1)).describe() == "no"
    layer = placed(even_sizes(entry.bytes, 36, cache), (1,)).held[0]  # the output, as large as a layer
    with_gpu = fit(entry, Room(needed - layer, (SPARE_BYTES + BUFFER_BYTES + layer,)))
    assert with_gpu.describe() == "yes, 1 of 37 layers on the GPU"
    assert fit(entry, Room(10**9, (24 * 10**9,))).describe() == "on the GPU"


def test_auto_takes_the_first_that_fits() -> None:
    assert best(Room(0)) is None
    chosen = [best(Room(n * 10**9)) for n in range(1, 64)]
    order = [candidates().index(entry) for entry in chosen if entry is not None]
    assert order == sorted(order, reverse=True), "more memory never gives a lower place"
    assert order[-1] == 0
    assert all(entry.license in ("Apache-2.0", "MIT") for entry in candidates())
    assert candidates()[-1].alias == "smollm2:135m"
