"""Tables of published results: read whatever they hold, predicted within the promised error."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmscale.errors import RecipeError
from llmscale.planning.constants import Constants
from llmscale.planning.published import read_row, read_table
from llmscale.planning.step_time import step_time
from llmscale.planning.validate import (
    ADDED,
    Predicted,
    errors,
    errors_by_source,
    predict_row,
    spearman,
    validate,
    write_predictions,
)
from tests.planning.cases import PUBLISHED, UNSEEN

ROW = {
    "source": "somebody",
    "model": "GPT",
    "layers": "24",
    "hidden": "2048",
    "heads": "16",
    "seq": "2048",
    "vocab": "51200",
    "gpu": "A100-80GB",
    "gpus": "8",
    "tp": "1",
    "pp": "1",
    "micro_batch": "4",
    "global_batch": "64",
    "precision": "bf16",
    "iter_s": "2.0",
}


CELLS = [*sorted(ROW), "notes", "vpp", "cp", "dp", "ffn", "params_b"]
VALUES = st.one_of(st.text(), st.integers(-2, 10**20).map(str), st.floats().map(str))


@pytest.fixture(scope="module")
def predicted() -> list[Predicted]:
    return validate(PUBLISHED, Constants())[1]


def test_step_time_is_predicted_within_the_promised_error(predicted: list[Predicted]) -> None:
    found = errors(predicted, "all")
    assert found.compared > 360
    assert found.median is not None and found.median < 0.06
    assert found.ninetieth is not None and found.ninetieth < 0.15


def test_each_source_is_ranked_as_it_was_measured(predicted: list[Predicted]) -> None:
    ranked = {
        each.source: each.rank_correlation
        for each in errors_by_source(predicted)
        if each.rank_correlation is not None
    }
    one_cluster = next(source for source in ranked if "chronicles" in source)
    assert ranked.pop(one_cluster) > 0.90  # near copies of one run, each timed in one iteration
    assert len(ranked) >= 6
    assert min(ranked.values()) > 0.95


def test_a_table_that_no_constant_was_fitted_to_is_predicted_too() -> None:
    found = errors(validate(UNSEEN, Constants())[1], "NeMo 24.12")
    assert found.compared == 12
    assert found.median is not None and found.median < 0.12
    assert found.rank_correlation is not None and found.rank_correlation > 0.95


def test_a_run_whose_launches_block_takes_longer_where_kernels_are_many() -> None:
    """BLOOM's hosts waited for each kernel: smaller micro-batches and wider tensors have more."""
    cells = {**ROW, "hidden": "14336", "heads": "64", "vocab": "250880", "gpus": "384", "pp": "12"}
    added = []
    for tensor, micro in (("4", "4"), ("4", "2"), ("8", "2")):
        one = {**cells, "tp": tensor, "micro_batch": micro, "global_batch": "2048"}
        setups = [read_row({**one, "source": s}).setup for s in ("bigscience-workshop/x", "x")]
        seconds = [
            step_time(
                replace(setup, device=replace(setup.device, network_bandwidth=6.25e9)), Constants()
            )
            for setup in setups
            if setup is not None
        ]
        added.append(seconds[0].total / seconds[1].total - 1)
    assert 0.01 < added[0] < added[1] < added[2] < 0.2


def test_rows_without_a_models_shape_say_so(predicted: list[Predicted]) -> None:
    missing = [one for one in predicted if not one.row.cells["hidden"]]
    assert missing and all(one.why_not == "hidden: empty" for one in missing)
    assert all(one.seconds is None for one in missing)


def test_time_is_taken_as_printed_before_rates(tmp_path: Path) -> None:
    assert read_row({**ROW, "tokens_per_s_per_gpu": "1", "mfu": "0.5"}).seconds == 2.0
    by_tokens = read_row({**ROW, "iter_s": "", "tokens_per_s_per_gpu": "8192"})
    assert by_tokens.seconds == pytest.approx(64 * 2048 / 8 / 8192)


def test_printed_flops_are_counted_as_their_source_does() -> None:
    same = {**ROW, "iter_s": "", "tflops_per_gpu": "150"}
    model = read_row({**same, "notes": "flops=model"}).seconds
    hardware = read_row({**same, "notes": "flops=hardware (4x, full recompute)"}).seconds
    assert model is not None and hardware is not None
    assert 1.2 < hardware / model < 4 / 3


def test_a_model_without_layers_is_sized_by_its_parameters() -> None:
    cells = {**ROW, "layers": "", "params_b": "181", "hidden": "14336", "heads": "64"}
    row = read_row({**cells, "vocab": "250880", "gpus": "384", "tp": "4", "pp": "12"})
    assert row.setup is not None and row.setup.architecture.layers == 72


def test_gated_feed_forward_layers_are_told_by_the_printed_size() -> None:
    llama = {**ROW, "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8"}
    llama |= {"ffn": "14336", "vocab": "128256", "params_b": "8"}
    row = read_row(llama)
    assert row.setup is not None and row.setup.architecture.parameters(128256) == 8_030_261_248


# The first text drawn takes a second where tables of characters are yet to be made.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(CELLS), VALUES))
def test_no_row_stops_the_others(cells: dict[str, str]) -> None:
    one = predict_row(read_row({**ROW, **cells}), Constants())
    assert one.seconds is not None or one.why_not


@pytest.mark.parametrize("column", sorted(set(ROW) - {"source", "model", "hidden"}))
def test_a_missing_column_is_no_error(column: str) -> None:
    row = read_row({key: value for key, value in ROW.items() if key != column})
    assert row.setup is not None or row.why_not.startswith(column) or column in row.why_not


def test_predictions_are_added_to_the_table(tmp_path: Path) -> None:
    columns, rows = read_table(UNSEEN)
    predicted = [predict_row(row, Constants()) for row in rows]
    write_predictions(tmp_path / "out.csv", columns, predicted)
    with (tmp_path / "out.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == [*columns, *ADDED]
    for row, one in zip(written, predicted, strict=True):
        assert float(row["predicted_step_seconds"]) == pytest.approx(one.seconds, rel=1e-4)
        assert float(row["relative_error"]) == pytest.approx(one.relative_error, abs=1e-4)
        assert row["why_not"] == ""


def test_a_file_that_is_no_table_is_one_line(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(RecipeError, match="no table of results"):
        read_table(wrong)
    wrong.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        read_table(wrong)


def test_the_command_prints_the_errors_and_writes_the_table(tmp_path: Path) -> None:
    out = tmp_path / "predicted.csv"
    command = [sys.executable, "-m", "llmscale", "plan", "--validate", UNSEEN, "--out", out]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [each["compared"] for each in answer["sources"]] == [12, 12]
    assert out.read_text().count("\n") == 13


def test_ranks_are_spearmans() -> None:
    """Against the textbook formula, without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    pairs = [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (4.0, 5.0), (5.0, 4.0)]
    assert spearman(pairs) == pytest.approx(1 - 6 * 4 / (5 * 24))
