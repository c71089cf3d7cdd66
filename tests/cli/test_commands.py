"""The commands: fast, one-line errors, one JSON object, the exits docs/commands.md promises."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.called import llmscale
from tests.conftest import PRETRAINING, QUICKSTART


def process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "llmscale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["show", QUICKSTART],
        ["plan", QUICKSTART, "--gpu", "h100"],
        ["run", QUICKSTART, "--dry-run"],
    ],
)
def test_the_light_commands_never_import_torch(arguments: list, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['llmscale', *sys.argv[1:]]\n"
        "from llmscale.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'megatron', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: path.stem)
def test_every_shipped_recipe_shows_and_dry_runs(recipe: Path, tmp_path: Path) -> None:
    shown = llmscale("show", recipe)
    assert shown.returncode == 0, shown.stderr
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout)
    assert llmscale("show", again).stdout == shown.stdout
    dry = llmscale("run", recipe, "--dry-run", "--json", "--run-dir", tmp_path / "run")
    answer = json.loads(dry.stdout)
    assert "train" in [task["task"] for task in answer["tasks"]]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (["bogus"], 2, ["bogus", "--help"]),
        (["run"], 2, ["RECIPE", "--help"]),
        (["show", "absent.yaml"], 2, ["absent.yaml"]),
        (["run", QUICKSTART, "nonsense"], 2, ["nonsense", "KEY=VALUE"]),
        (["run", QUICKSTART, "--stages", "nope"], 2, ["nope", "corpus, tokenizer"]),
        (["run", QUICKSTART, "--on", "moon"], 2, ["moon", "local"]),
        (["run", QUICKSTART, "cluster.device=cuda"], 3, ["GPU", "cluster.device=cpu"]),
        (
            ["run", QUICKSTART, "cluster.device=auto", "stages.pretrain.precision=fp8"],
            3,
            ["stages.pretrain.precision: fp8 needs an NVIDIA GPU", "use bf16"],
        ),
        (["run", QUICKSTART, "--on", "slurm"], 3, ["slurm", "--on local"]),
        (["status", "absent"], 2, ["absent", "run folder"]),
        (["logs", "absent"], 2, ["absent"]),
        (["cancel", "absent"], 2, ["absent"]),
        (["report", "absent"], 2, ["absent"]),
        (["generate", "absent", "--prompt", "x"], 2, ["absent", "RUN_DIR:STAGE"]),
        (["generate", "absent", "--prompt", "x", "--top-p", "2"], 2, ["--top-p", "2"]),
        (["evaluate", "absent", "--text", "absent.txt"], 2, ["absent.txt"]),
        (["export", "absent", "--out", "new"], 2, ["absent"]),
        (["import", "absent", "--out", "new"], 2, ["absent"]),
    ],
    ids=lambda value: "-".join(map(str, value))[:40] if isinstance(value, list) else None,
)
def test_a_wrong_call_gets_one_line_and_writes_nothing(
    arguments: list, code: int, fragments: list[str], tmp_path: Path
) -> None:
    done = llmscale(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert all(fragment in done.stderr for fragment in fragments), done.stderr
    assert not any(tmp_path.iterdir())


def test_json_errors_are_one_object(tmp_path: Path) -> None:
    done = process("run", "absent.yaml", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["exit_code"] == 2
    assert done.stdout.count("\n") == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains in seconds, and its texts."""
    folder = tmp_path_factory.mktemp("small")
    for number in range(40):
        text = f"Play {number}. " + "Fair is foul, and foul is fair. " * (20 + number)
        (folder / f"{number}.txt").write_text(text)
    (folder / "small.yaml").write_text(
        """
name: small
cluster: {ranks_per_node: 2, device: cpu}
stages:
  corpus: {kind: prepare, sources: [{path: "*.txt"}], validation_fraction: 0.1}
  tokenizer: {kind: tokenizer, corpus: corpus, vocabulary_size: 300}
  pretrain:
    kind: pretrain
    corpus: corpus
    tokenizer: tokenizer
    model: {layers: 2, hidden_size: 32, attention_heads: 4, ffn_size: 64, sequence_length: 32}
    parallel: {pipeline: 2}
    batch: {global: 8, micro: 2}
    optimizer: {learning_rate: 1e-2, warmup_steps: 2}
    steps: 12
    checkpoint: {every: 4}
  evaluation:
    kind: evaluate
    model: pretrain
    perplexity: {split: validation}
    samples: {prompts: ["Fair is"], max_new_tokens: 8}
"""
    )
    return folder


@pytest.fixture(scope="module")
def finished(small: Path) -> Path:
    done = process("run", small / "small.yaml", "--run-dir", small / "run", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["metrics"]["evaluation"]["perplexity"] > 1
    return small / "run"


@pytest.mark.ranks
def test_a_run_leaves_what_the_contract_promises(finished: Path) -> None:
    stage = finished / "pretrain"
    manifest = json.loads((stage / "manifest.json").read_text())
    assert {
        "stage",
        "kind",
        "status",
        "fingerprint",
        "inputs",
        "outputs",
        "metrics",
        "started",
    } <= (manifest.keys())
    assert manifest["status"] == "finished"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_per_second"} <= (
        lines[0].keys()
    )
    assert (stage / "checkpoints" / "step-00000012" / "COMPLETE").is_file()
    assert any((stage / "tensorboard").iterdir())
    assert (stage / "hf" / "config.json").is_file()
    assert "Fair is" in (finished / "report.html").read_text()


@pytest.mark.ranks
def test_running_again_does_nothing_and_a_changed_stage_runs_with_those_after_it(
    small: Path, finished: Path
) -> None:
    again = llmscale("run", small / "small.yaml", "--run-dir", finished)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 4
    changed = ["stages.pretrain.optimizer.learning_rate=2e-2"]
    dry = llmscale(
        "run", small / "small.yaml", *changed, "--run-dir", finished, "--dry-run", "--json"
    )
    actions = {task["stage"]: task["action"] for task in json.loads(dry.stdout)["tasks"]}
    assert actions == {
        "corpus": "skip",
        "tokenizer": "skip",
        "pretrain": "rerun",
        "evaluation": "rerun",
    }
    other_layout = ["stages.pretrain.parallel={tensor: 2}", "stages.pretrain.batch.micro=4"]
    dry = llmscale(
        "run", small / "small.yaml", *other_layout, "--run-dir", finished, "--dry-run", "--json"
    )
    assert {task["action"] for task in json.loads(dry.stdout)["tasks"]} == {"skip"}


@pytest.mark.ranks
def test_the_commands_on_models_and_runs_answer(finished: Path, tmp_path: Path) -> None:
    model = f"{finished}:pretrain"
    text = llmscale("generate", model, "--prompt", "Fair is", "--max-new-tokens", 4, "--json")
    assert json.loads(text.stdout)["prompt"] == "Fair is"
    for decoding in ("beam", "sample"):
        done = llmscale("generate", model, "--prompt", "Fair", "--decoding", decoding, "--top-k", 5)
        assert done.returncode == 0, done.stderr
    corpus = tmp_path / "text.txt"
    corpus.write_text("Fair is foul, and foul is fair. ")
    figures = json.loads(llmscale("evaluate", model, "--text", corpus, "--json").stdout)
    assert figures[str(corpus)]["bits_per_byte"] < 4
    exported = llmscale("export", model, "--out", tmp_path / "hf", "--json")
    assert json.loads(exported.stdout)["stage"] == "pretrain"
    weights = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert weights > 0
    imported = llmscale("import", tmp_path / "hf", "--out", tmp_path / "imported", "--json")
    assert json.loads(imported.stdout)["parameters"] > 0, imported.stderr
    state = json.loads(llmscale("status", finished, "--json").stdout)
    assert [stage["status"] for stage in state["stages"]] == ["finished"] * 4
    assert "rank 1 of 2" in llmscale("logs", finished, "--stage", "pretrain", "--rank", 1).stdout


@pytest.mark.ranks
def test_pretraining_goes_on_from_a_folder_and_from_an_import(
    small: Path, finished: Path, tmp_path: Path
) -> None:
    hf = finished / "pretrain" / "hf"
    assert llmscale("import", hf, "--out", tmp_path / "imported").returncode == 0
    losses = []
    for start in (hf, tmp_path / "imported"):
        recipe = tmp_path / "on.yaml"
        text = (small / "small.yaml").read_text().replace("*.txt", f"{small}/*.txt")
        text = "\n".join(line for line in text.splitlines() if " model: {" not in line)
        recipe.write_text(text)
        done = llmscale(
            "run",
            recipe,
            f"stages.pretrain.start_from={start}",
            "--run-dir",
            tmp_path / f"from-{start.name}",
            "--stages",
            "corpus,tokenizer,pretrain",
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"from-{start.name}" / "pretrain" / "metrics.jsonl").read_text()
        losses.append([json.loads(line).get("loss") for line in lines.splitlines()])
    assert losses[0] == losses[1]
    first = json.loads((finished / "pretrain" / "metrics.jsonl").read_text().splitlines()[0])
    assert losses[0][0] < first["loss"] - 1


@pytest.mark.ranks
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_saves_and_twice_ends_at_once(times: int, small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmscale", "run", str(small / "small.yaml")]
    command += ["stages.pretrain.steps=100000", "--run-dir", str(tmp_path / "run")]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "run" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    busy = process("run", small / "small.yaml", "--run-dir", tmp_path / "run")
    assert busy.returncode == 2
    assert "is running in this folder" in busy.stderr
    for _ in range(times):
        os.killpg(launcher.pid, signal.SIGINT)
        time.sleep(0.01)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    manifest = json.loads((tmp_path / "run" / "pretrain" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    if times == 1:
        newest = sorted((tmp_path / "run" / "pretrain" / "checkpoints").glob("step-*"))[-1]
        assert json.loads((newest / "state.json").read_text())["step"] == len(
            [line for line in metrics.read_text().splitlines() if '"loss"' in line]
        )
