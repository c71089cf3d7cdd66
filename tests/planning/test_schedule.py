"""Simulated pipeline schedules against closed forms and against bounds that none can break."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmscale.planning.schedule import Chunk, busiest, pipeline_estimate, pipeline_seconds

SECONDS = st.floats(0.1, 10.0)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 3, 8, 50])
def test_1f1b_of_equal_stages_has_the_known_bubble(stages: int, micro_batches: int) -> None:
    chunks = [Chunk(1.0, 2.0)] * stages
    expected = 3.0 * (micro_batches + stages - 1)  # Narayanan et al. 2021, section 2.2.1
    assert pipeline_seconds(chunks, stages, micro_batches, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize(("stages", "virtual"), [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_interleaving_divides_the_bubble_by_the_chunks(stages: int, virtual: int) -> None:
    micro_batches = 4 * stages
    chunks = [Chunk(1.0, 2.0)] * (stages * virtual)
    bubble = 3.0 * (stages - 1)  # section 2.2.2: (p - 1) / v of a stage's time
    seconds = pipeline_seconds(chunks, stages, micro_batches, 0.0)
    assert seconds == pytest.approx(3.0 * virtual * micro_batches + bubble)


@given(
    st.integers(2, 5),
    st.integers(1, 3),
    st.integers(1, 24),
    st.lists(st.tuples(SECONDS, SECONDS), min_size=15, max_size=15),
    st.floats(0.0, 1.0),
)
def test_no_schedule_beats_its_busiest_stage_or_its_longest_way(
    stages: int, virtual: int, micro_batches: int, times: list[tuple[float, float]], send: float
) -> None:
    chunks = [Chunk(*pair) for pair in times[: stages * virtual]]
    seconds = pipeline_seconds(chunks, stages, micro_batches, send)
    way = sum(chunk.forward + chunk.backward for chunk in chunks)
    assert seconds >= micro_batches * busiest(chunks, stages) - 1e-6
    assert seconds >= way + 2 * (len(chunks) - 1) * send - 1e-6


@given(st.integers(2, 8), st.integers(1, 100), st.lists(SECONDS, min_size=8, max_size=8))
def test_long_schedules_go_on_at_the_busiest_stages_pace(
    stages: int, more: int, times: list[float]
) -> None:
    chunks = [Chunk(seconds, 2 * seconds) for seconds in times[:stages]]
    few = pipeline_seconds(chunks, stages, 3 * stages, 0.0)
    many = pipeline_seconds(chunks, stages, 3 * stages + more, 0.0)
    assert many - few == pytest.approx(more * busiest(chunks, stages))


def test_the_closed_form_is_the_simulation_where_stages_are_equal() -> None:
    for stages, virtual in ((1, 1), (4, 1), (8, 3)):
        chunks = [Chunk(1.0, 2.0)] * (stages * virtual)
        simulated = pipeline_seconds(chunks, stages, 32, 0.0)
        assert pipeline_estimate(chunks, stages, 32, 0.0) == pytest.approx(simulated)
