"""Examples: what was written is read, packed or not, each once an epoch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.data.chat import Example
from llmscale.data.examples import Examples, ExampleSamples, write_examples
from llmscale.data.packing import evenly_packed, packed

LENGTHS = st.lists(st.integers(1, 20), max_size=30)


def made(lengths: list[int]) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(0, 99, n).astype(np.int32), random.random(n) < 0.5) for n in lengths
    ]


@pytest.mark.parametrize("lengths", [[], [1], [3, 1, 20, 4, 4]])
def test_examples_are_read_as_they_were_written(lengths: list[int], tmp_path: Path) -> None:
    written = made(lengths)
    write_examples(written, tmp_path / "examples.safetensors")
    read = Examples.read(tmp_path / "examples.safetensors")
    assert len(read) == len(written)
    assert read.lengths.tolist() == lengths
    for number, example in enumerate(written):
        assert np.array_equal(read[number].tokens_n, example.tokens_n)
        assert np.array_equal(read[number].learned_n, example.learned_n)


@given(lengths=LENGTHS, room=st.integers(20, 40))
def test_packing_keeps_every_example_once_within_the_room(lengths: list[int], room: int) -> None:
    samples = packed(lengths, room)
    assert sorted(number for sample in samples for number in sample) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in sample) <= room for sample in samples)
    half_empty = [sample for sample in samples if sum(lengths[n] for n in sample) * 2 <= room]
    assert len(half_empty) <= 1  # two such would have been one


@given(lengths=LENGTHS.filter(bool), room=st.integers(20, 40))
def test_packing_evenly_needs_no_more_samples(lengths: list[int], room: int) -> None:
    samples = evenly_packed(lengths, room)
    assert sorted(number for sample in samples for number in sample) == list(range(len(lengths)))
    assert len(samples) == len(packed(lengths, room))
    assert all(sum(lengths[number] for number in sample) <= room for sample in samples)


def test_packing_evenly_leaves_little_to_pad() -> None:
    samples = evenly_packed([30, 30, 30, 30, 20, 20], 100)
    assert [sum([30, 30, 30, 30, 20, 20][n] for n in one) for one in samples] == [80, 80]


def test_packing_names_an_example_that_has_no_room() -> None:
    with pytest.raises(ValueError, match="example 1 has 9 tokens, above 8"):
        packed([8, 9], 8)


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_every_example_once_and_each_epoch_its_own_order(
    packing: bool, tmp_path: Path
) -> None:
    write_examples(made([5, 3, 7, 2, 2, 8, 1, 4]), tmp_path / "examples.safetensors")
    samples = ExampleSamples(Examples.read(tmp_path / "examples.safetensors"), 8, packing, seed=1)
    orders = [
        [samples.number_at(epoch * len(samples) + place) for place in range(len(samples))]
        for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(len(samples))) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert sum(len(samples.sample(number)) for number in orders[0]) == 8
    for number in range(len(samples)):
        assert samples.tokens(number) == sum(map(len, samples.sample(number)))
