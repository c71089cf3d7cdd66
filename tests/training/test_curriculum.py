"""Ramp, blend and curriculum: what each step reads is a function of the recipe and the step."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmscale.artifacts import RunFolder
from llmscale.data.samples import Samples
from llmscale.training.curriculum import Phase, lay_out
from llmscale.training.data import PhaseSamples, TrainingData, ValidationData
from llmscale.training.objectives import Causal
from llmscale.training.settings import Batch, Ramp
from tests.conftest import QUICKSTART
from tests.ranks import cut_off_after, run_recipe
from tests.small import SMALL_MODEL
from tests.training.test_layouts import curve, parameters

CPU = torch.device("cpu")

TEXTS = QUICKSTART.parent / "texts" / "shakespeare"
STEPS, LENGTHS = 12, [16] * 5 + [32] * 4 + [16] * 3
SIZES = [4, 4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8]
CURRICULUM = (
    "[{steps: 5, sequence_length: 16, blend: {comedies: 1, histories: 3}}, {steps: 4}, "
    "{sequence_length: 16, blend: {comedies: 0.5, histories: 0.5}}]"
)
RECIPE = [
    f"stages.comedies={{kind: prepare, sources: [{{path: '{TEXTS}/m[ei]*.txt'}}]}}",
    f"stages.histories={{kind: prepare, sources: [{{path: {TEXTS}/ri*.txt}}]}}",
    "stages.pretrain.corpus=",
    "stages.pretrain.blend={comedies: 0.7, histories: 0.3}",
    f"stages.pretrain.curriculum={CURRICULUM}",
    *SMALL_MODEL,
    f"stages.pretrain.steps={STEPS}",
    "stages.pretrain.batch={global: 8, micro: 1, ramp: {start: 4, increment: 2, samples: 24}}",
    "stages.pretrain.optimizer.warmup_steps=2",
    "stages.pretrain.validation.samples=4",
    "stages.pretrain.checkpoint={every: 3, keep: 4}",
    "stages.evaluation.corpus=corpus",
    "stages.quantized.corpus=corpus",
    "stages.schemes.corpus=corpus",
]


@given(
    start=st.integers(1, 64),
    increment=st.integers(1, 64),
    increments=st.integers(1, 20),
    samples=st.integers(1, 5000),
    steps=st.integers(0, 200),
)
def test_the_batch_grows_by_megatrons_rule(
    start: int, increment: int, increments: int, samples: int, steps: int
) -> None:
    largest = start + increments * increment
    ramp = Ramp(start=start, increment=increment, samples=samples)
    batch = Batch.model_validate({"global": largest, "ramp": ramp})
    a_size = Fraction(samples, increments)
    consumed = 0
    for _ in range(steps):
        size = largest if consumed > samples else start + int(consumed / a_size) * increment
        assert batch.size(consumed) == size
        consumed += size
    assert batch.consumed(steps) == consumed


def test_the_batch_grows_as_megatron_core_has_it() -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    batch = Batch.model_validate(
        {"global": 1536, "ramp": {"start": 32, "increment": 32, "samples": 100_000}}
    )
    theirs = RampupBatchsizeNumMicroBatchesCalculator(1536, 1, 1, False, 1, 32, 32, 100_000)
    consumed = 0
    while batch.size(consumed) < 1536:
        theirs.update(consumed, consistency_check=True)
        assert batch.size(consumed) == theirs.current_global_batch_size
        consumed += batch.size(consumed)
    assert consumed >= 100_000


def test_a_phase_goes_on_where_one_of_its_length_stopped() -> None:
    phases = (
        Phase(steps=10, blend={"web": 0.75, "code": 0.25}),
        Phase(steps=5, sequence_length=64),
        Phase(blend={"code": 1.0}),
    )
    first, longer, last = lay_out(phases, Batch.model_validate({"global": 4}), 32, {"web": 1.0})
    assert [phase.first_step for phase in (first, longer, last)] == [0, 10, 15]
    assert [phase.first_sample for phase in (first, longer, last)] == [0, 40, 60]
    assert [phase.sequence_length for phase in (first, longer, last)] == [32, 64, 32]
    assert first.read == longer.read == {}
    assert last.read == {"web": 30, "code": 10}


class Numbers:
    """A token stream whose tokens are their own places."""

    def __init__(self, tokens: int) -> None:
        self._tokens = np.arange(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        return self._tokens[start : start + length]


def test_no_sample_is_read_twice_before_its_corpus_is_read_whole() -> None:
    streams: dict[str, Any] = {"web": Numbers(16 * 40 + 1), "code": Numbers(16 * 20 + 1)}
    phases = (
        Phase(steps=4, blend={"web": 0.75, "code": 0.25}),
        Phase(steps=2, sequence_length=32),
        Phase(),
    )
    batch = Batch.model_validate({"global": 8, "ramp": {"start": 4, "increment": 2, "samples": 12}})
    placed = lay_out(phases, batch, 16, {"web": 0.5, "code": 0.5})
    samples = [
        {name: Samples(streams[name], phase.sequence_length, seed=7) for name in phase.weights}
        for phase in placed
    ]
    both = zip(placed, samples, strict=True)
    data = TrainingData(batch, [PhaseSamples(*parts, Causal()) for parts in both])
    consumed, read = 0, []
    for step in range(9):
        now = data.at(step, consumed)
        tokens_bs = now.batch(now.places, CPU).tokens_bs
        assert tokens_bs.shape == (now.size, now.row_lengths[0])
        if now.row_lengths[0] == 16:
            read += [now.samples.name(place) for place in now.places]
        consumed += now.size
    assert len(read) == len(set(read)) == 22 + 24
    assert sum(name.startswith("code ") for name in read) == pytest.approx(22 / 4 + 24 / 2, abs=2)


def test_validation_reads_the_first_samples_of_every_corpus() -> None:
    streams: list[Any] = [Numbers(16 * 40 + 1), Numbers(16 * 2 + 1)]
    validation = ValidationData([Samples(stream, 16, 7) for stream in streams], 3, Causal())
    assert len(validation) == 5
    batch = validation.batch(range(6), CPU)
    assert batch.tokens_bs[:, 0].tolist() == [0, 16, 32, 0, 16, 16]
    assert batch.mask_bs.sum(1).tolist() == [16.0] * 5 + [0.0]


@pytest.fixture(scope="module")
def corpora(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose stages before pretraining are finished."""
    folder = tmp_path_factory.mktemp("corpora") / "run"
    shutil.copytree(prepared, folder)
    run_recipe(QUICKSTART, folder, RECIPE, ["comedies", "histories"])
    return folder


def train(folder: Path, parallel: str, ranks: int) -> Path:
    layout = [f"stages.pretrain.parallel={parallel}", f"cluster.ranks_per_node={ranks}"]
    run_recipe(QUICKSTART, folder, [*RECIPE, *layout], ["pretrain"])
    return folder / "pretrain"


@pytest.fixture(scope="module")
def uninterrupted(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return train(Path(shutil.copytree(corpora, folder)), "{data: 1}", 1)


@pytest.mark.ranks
def test_steps_have_their_phases_length_and_the_ramps_size(uninterrupted: Path) -> None:
    read = curve(uninterrupted, "tokens")
    each = [after - before for before, after in zip([0, *read], read, strict=False)]
    assert each == [size * length for size, length in zip(SIZES, LENGTHS, strict=True)]


@pytest.mark.ranks
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_killed_in_any_phase_goes_on_bit_for_bit(
    step: int, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(uninterrupted.parent, tmp_path / "run"))
    stage = folder / "pretrain"
    cut_off_after(RunFolder(folder).stage("pretrain"), step)
    train(folder, "{data: 1}", 1)
    assert not (folder / "superseded").exists()
    for name in ("loss", "gradient_norm", "validation_loss", "tokens"):
        assert curve(stage, name) == curve(uninterrupted, name)
    ours, expected = parameters(stage), parameters(uninterrupted)
    assert all(ours[name].equal(expected[name]) for name in expected)


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", ["{data: 2}", "{pipeline: 2}"])
def test_two_ranks_train_as_one_does(
    parallel: str, corpora: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    stage = train(Path(shutil.copytree(corpora, tmp_path / "run")), parallel, 2)
    assert curve(stage, "tokens") == curve(uninterrupted, "tokens")
    for name in ("loss", "validation_loss"):
        assert curve(stage, name) == pytest.approx(curve(uninterrupted, name), rel=1e-5)
