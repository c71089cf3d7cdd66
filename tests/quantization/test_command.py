"""llmscale quantize: resumed after a kill, and one line for what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmscale.artifacts import checksum
from llmscale.quantization.quantize import quantize
from llmscale.quantization.schemes import Quantization, SchemeName
from llmscale.quantize_command import compare_schemes, table
from tests.quantization.small import TEXT, small_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=6)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "llmscale", "quantize", *map(str, words)]


def sums(folder: Path) -> dict[str, str]:
    return {file.name: checksum(file) for file in folder.iterdir()}


def test_a_killed_call_goes_on_and_gives_the_same_files(model: Path, tmp_path: Path) -> None:
    def call(out: Path) -> list[str]:
        how = ("--scheme", "int4-awq-gptq", "--calibration", TEXT, "--tokens", 1024)
        return command(model, *how, "--out", out, "--json")

    whole = subprocess.run(call(tmp_path / "whole"), check=True, capture_output=True, text=True)
    assert json.loads(whole.stdout)["group_size"] == 64

    out, beside = tmp_path / "killed", tmp_path / "killed.quantizing"
    process = subprocess.Popen(call(out), start_new_session=True)
    end = time.monotonic() + 600
    while not (beside / "block-00001.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists(), "the kill came too late to prove anything"
    kept = {f.name: f.stat().st_mtime_ns for f in beside.glob("block-*.safetensors")}
    assert len(kept) >= 2

    again = subprocess.run(call(out), check=True, capture_output=True, text=True)

    assert json.loads(again.stdout)["bits_per_weight"] < 4.6
    assert sums(out) == sums(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not beside.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--scheme", "int5", "--out", "OUT"], "'int5' is no scheme; use int8-weight, "),
        (["--scheme", "int4-gptq", "--out", "OUT"], "--calibration: int4-gptq is calibrated with"),
        (["--scheme", "int4-gptq", "--out", "OUT", "--calibration", "no.txt"], "is no file"),
        (["--scheme", "int4-gptq", "--out", "OUT", "--calibration", "EMPTY"], "holds no text"),
        (["--scheme", "int4-gptq", "--out", "OUT", "--calibration", "SHORT"], "is too short to"),
        (["--scheme", "int4-gptq", "--out", "OUT", "--calibration", "BINARY"], "is not UTF-8"),
        (["--scheme", "int4-gptq", "--out", "OUT", "--calibration", "ZEROS"], "is no text"),
        (["--scheme", "int8-weight", "--out", "MODEL"], "exists; choose a new folder"),
        (["--scheme", "int8-weight"], "--out: is missing"),
        (["--scheme", "int4-weight", "--out", "OUT", "--group-size", "48"], "does not divide 64"),
        (["--scheme", "nf4", "--out", "OUT", "--group-size", "32"], "--group-size: nf4 has no"),
        (["--scheme", "int8-weight", "--out", "OUT", "--asymmetric"], "--asymmetric: int8-weight"),
        (["--scheme", "mixed", "--out", "OUT"], "--calibration: mixed is calibrated with"),
        (["--scheme", "int4-weight", "--out", "OUT", "--bits", "5"], "--bits: int4-weight has"),
        (
            ["--scheme", "nf4", "--out", "OUT", "--key-value-cache", "fp8"],
            "--key-value-cache: nf4 has no scales for it",
        ),
        (
            ["--scheme", "int8-weight", "--out", "OUT", "--key-value-cache", "int4"],
            "--key-value-cache: ",
        ),
        (
            ["--scheme", "int8-weight", "--out", "OUT", "--key-value-cache", "fp8"],
            "--calibration: key_value_cache fp8 is calibrated with",
        ),
        (["--compare", "int8-weight"], "--text: a comparison needs texts"),
    ],
)
def test_a_malformed_call_is_one_line(
    words: list[str],
    line: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llmscale.cli import main

    files = {"EMPTY": b" \n", "SHORT": b"To be", "BINARY": b"\x80\xff" * 99, "ZEROS": b"a\0" * 999}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    places = {"OUT": tmp_path / "out", "MODEL": model} | {name: tmp_path / name for name in files}
    argv = ["quantize", str(model), *(str(places.get(word, word)) for word in words)]
    monkeypatch.setattr(sys, "argv", ["llmscale", *argv])

    with pytest.raises(SystemExit) as exit_:
        main()

    told = capsys.readouterr().err
    assert exit_.value.code == 2
    assert line in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_comparison_sets_each_scheme_beside_the_model(model: Path) -> None:
    rows = compare_schemes(
        str(model), "int8-weight,int4-weight,int4-gptq", [TEXT], [TEXT], 1024, None
    )

    original, int8, int4, gptq = rows
    assert original["scheme"] == "original"
    assert (original["divergence"], original["agreement"]) == (0, 1)
    assert 0 < int8["divergence"] < gptq["divergence"]
    assert int8["agreement"] > int4["agreement"]
    assert original["megabytes"] > int8["megabytes"] > int4["megabytes"]
    assert abs(int8["perplexity"] / original["perplexity"] - 1) < 0.02
    assert all(row["decode_tokens_per_second"] > 0 for row in rows)
    lines = table(rows).splitlines()
    assert lines[0].split()[:4] == ["scheme", "MB", "bits", "perplexity"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [
        ("int8-weight", "compressed_tensors", "compressed_tensors"),
        ("nf4", "bitsandbytes", "bitsandbytes"),
        ("nf4", "accelerate", "accelerate"),
    ],
)
def test_a_folder_whose_package_is_missing_is_one_line(
    scheme: SchemeName,
    module: str,
    package: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llmscale import packages
    from llmscale.cli import main

    quantized, prompts = tmp_path / "quantized", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "To be"}\n')
    quantize(model, quantized, Quantization(scheme=scheme))
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == module else True)
    calls = [
        ["generate", quantized, "--prompt", "To be"],
        ["evaluate", quantized, "--text", TEXT],
        ["quantize", quantized, "--compare", "int8-weight", "--text", TEXT],
        ["rank", quantized, "--prompts", prompts, "--reward", model],
    ]
    for call in calls:
        monkeypatch.setattr(sys, "argv", ["llmscale", *map(str, call)])
        with pytest.raises(SystemExit) as exit_:
            main()
        told = capsys.readouterr().err
        mend = "pip install 'llmscale[quantization]'"
        assert (exit_.value.code, told.count("\n")) == (3, 1), told
        assert f"{quantized}: the package {package} is missing; {mend}" in told
