"""What a run's page promises."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmscale.artifacts import RunFolder, write_json
from llmscale.errors import RecipeError
from llmscale.report.plots import thin
from llmscale.report.report import format_duration, format_value, write_report

RECIPE = """
name: tiny
cluster: {on: local, ranks_per_node: 1, device: cpu}
stages:
  corpus:
    kind: prepare
    sources: [{path: /texts/*.txt}]
  tokenizer: {kind: tokenizer, corpus: corpus, vocabulary_size: 512}
  pretrain:
    kind: pretrain
    corpus: corpus
    tokenizer: tokenizer
    model: {family: llama, layers: 2, hidden_size: 32, attention_heads: 4, ffn_size: 64,
            sequence_length: 32}
    batch: {global: 4, micro: 4}
    optimizer: {name: adamw, learning_rate: 1.0e-3}
    steps: 10
  evaluation: {kind: evaluate, model: pretrain, perplexity: {split: validation}}
"""
LEARNING = """
  learning:
    kind: ppo
    start_from: pretrain
    data: {prompts: {path: /prompts.jsonl}}
    rewards: {mine: {url: "http://127.0.0.1:1/"}}
    rollout: {prompts: 8, max_new_tokens: 8}
    batch: {global: 8, micro: 8}
    optimizer: {learning_rate: 1.0e-3}
    steps: 30
"""
COMPARING = """
  schemes:
    kind: compare
    model: pretrain
    schemes: [int8-weight]
    measured_on: {split: validation}
"""
VOID = {"meta", "br", "path", "use"}


class Page(HTMLParser):
    """Checks the nesting of tags and gathers what attributes refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.names: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            if name == "id":
                self.names.append(value or "")
            self.references += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of which no stage has begun."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text(RECIPE, encoding="utf-8")
    return run


def begin(run: RunFolder, name: str, **entries: object) -> None:
    """Writes a manifest as the pipeline does."""
    run.stage(name).update_manifest(
        **{
            "stage": name,
            "status": "finished",
            "fingerprint": name * 8,
            "inputs": {},
            "started": "2026-01-02T03:04:05+00:00",
            "finished": "2026-01-02T04:05:06+00:00",
            "error": None,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            **entries,
        }
    )


def log(run: RunFolder, losses: list[float], name: str = "pretrain") -> None:
    """Writes the steps a training stage logs, each with a validation loss after it."""
    lines = []
    for step, loss in enumerate(losses, 1):
        line = {
            "step": step,
            "loss": loss,
            "learning_rate": 1e-3 / step,
            "gradient_norm": abs(math.sin(step)) + 0.5,
            "tokens": step * 128,
            "step_seconds": 0.1,
            "tokens_per_second": 1280.0 + step % 7,
            "mfu": 0.25,
        }
        lines += [line, {"step": step, "validation_loss": loss + 0.1}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    run.stage(name).metrics_file.write_text(text, encoding="utf-8")


def finish(run: RunFolder, losses: list[float]) -> None:
    """Makes it a finished run."""
    begin(run, "corpus", metrics={"train": {"documents": 37}})
    begin(run, "tokenizer")
    begin(
        run,
        "pretrain",
        metrics={"parameters": 1774720, "tokens_seen": 819200, "validation_loss": 4.5678},
    )
    log(run, losses)
    begin(run, "evaluation", metrics={"loss": 4.6, "perplexity": 99.48, "bits_per_byte": 2.345})


def written(run: RunFolder) -> str:
    """The page, its tags in order."""
    text = write_report(run).read_text(encoding="utf-8")
    assert not Page(text).open
    return text


def test_a_run_of_which_no_stage_has_begun_has_a_page(folder: RunFolder) -> None:
    text = written(folder)
    assert "not begun" in text
    assert all(name in text for name in ("corpus", "tokenizer", "pretrain", "evaluation"))


def test_a_finished_run_tells_its_headlines_lineage_metrics_recipe_and_versions(
    folder: RunFolder,
) -> None:
    finish(folder, [5.0, 4.8, 4.6])
    text = written(folder)
    told = ("4.568", "99.48", "2.345", "1.775 M", "819,200", "1,282", "25.0%", "1,774,720")
    assert [figure for figure in told if figure not in text] == []
    assert "1 h 1 min" in text
    assert "corpus, tokenizer" in text
    assert "pretrainpret" in text and "pretrainpretr" not in text
    assert "train, documents" in text
    assert "kind: prepare" in text
    assert "2.13.0" in text


def test_each_plot_names_its_axes_and_units(folder: RunFolder) -> None:
    finish(folder, [5.0, 4.8, 4.6])
    text = written(folder)
    labels = ("step", "loss (nats)", "learning rate", "gradient norm (L2)", "tokens per second")
    drawn = set(re.findall(r"<text[^>]*>([^<]*)</text>", text))
    assert {*labels, "training loss", "validation loss"} <= drawn


def test_a_quantity_only_one_kind_of_stage_logs_is_drawn_too(folder: RunFolder) -> None:
    begin(folder, "pretrain")
    lines = [{"step": step, "reward": step / 7} for step in range(5)]
    folder.stage("pretrain").metrics_file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    assert "<figcaption>Reward</figcaption>" in written(folder)


def test_samples_and_errors_are_text_and_never_markup(folder: RunFolder) -> None:
    finish(folder, [5.0])
    attack = "<script>alert(1)</script>"
    write_json(
        folder.stage("evaluation").path / "samples.json",
        [{"prompt": f"{attack}once", "text": f"\n{attack} & more"}],
    )
    begin(folder, "corpus", status="failed", error=attack, metrics={attack: attack})
    text = written(folder)
    assert "script" not in Page(text).tags
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert "&amp; more" in text


@pytest.fixture
def learning(folder: RunFolder) -> RunFolder:
    """A run with a stage that learns from rewards, and a corpus with files of the same names."""
    folder.recipe_file.write_text(RECIPE + LEARNING.strip("\n"), encoding="utf-8")
    begin(folder, "corpus")
    (folder.stage("corpus").path / "validation.jsonl").write_text('{"text": "To be"}\n')
    return folder


def answered(step: int, prompt: str, answer: str, reward: float) -> str:
    """A line of a stage of kind ppo about one answer."""
    line = {"step": step, "prompt": prompt, "answer": answer, "reward": reward}
    return json.dumps({**line, "reward_people": 2 * reward, "reward_mine": reward - 1}) + "\n"


def test_held_out_prompts_show_their_first_answer_and_their_last(learning: RunFolder) -> None:
    begin(learning, "learning")
    lines = [
        answered(step, f"prompt {number}", f"answer {number} at {step}", step / 7)
        for step in (0, 10, 20)
        for number in range(30)
    ]
    half = answered(30, "prompt 0", "answer 0 at 30", 1.0)
    file = learning.stage("learning").path / "validation.jsonl"
    file.write_text("".join([*lines, half, '{"st']))
    text = written(learning)
    for number in range(8):
        assert f"prompt {number}<" in text
        for step, reward in ((0, "reward 0 · people 0 · mine -1"), (20, "2.857 · people 5.714")):
            assert f"answer {number} at {step}<" in text and reward in text
    assert "prompt 8<" not in text, "few of them"
    assert " at 10<" not in text and " at 30<" not in text, "which is not whole"


def test_schemes_that_were_compared_are_drawn_and_told(folder: RunFolder) -> None:
    folder.recipe_file.write_text(RECIPE + COMPARING.strip("\n"), encoding="utf-8")
    figures = {"original": (538.0, 22.5), "int8-weight": (134.5, 22.75)}
    rows = [
        {"scheme": name, "megabytes": size, "perplexity": perplexity}
        for name, (size, perplexity) in figures.items()
    ]
    begin(folder, "schemes", metrics={row["scheme"]: row for row in rows})
    write_json(folder.stage("schemes").path / "comparison.json", rows)
    text = written(folder)
    assert "<figcaption>Size and perplexity</figcaption>" in text
    assert '<th scope="row">int8-weight</th><td class="number">134.50</td>' in text


def test_the_best_and_the_worst_sampled_answers_are_shown(learning: RunFolder) -> None:
    begin(learning, "learning")
    lines = [
        answered(step, "prompt", f"answer of {step}, {number}", float((number * 7) % 16))
        for step in (10, 20)
        for number in range(16)
    ]
    (learning.stage("learning").path / "samples.jsonl").write_text("".join(lines))
    text = written(learning)
    shown = [int(number) for number in re.findall(r"answer of 20, (\d+)<", text)]
    assert [(number * 7) % 16 for number in shown] == [15, 14, 13, 2, 1, 0]
    assert "answer of 10" not in text


def test_long_answers_are_cut_and_none_is_markup(learning: RunFolder) -> None:
    begin(learning, "learning")
    attack = "<script>alert(1)</script>"
    lines = answered(0, attack, attack + "x" * 100_000, 1.0)
    for name in ("validation.jsonl", "samples.jsonl"):
        (learning.stage("learning").path / name).write_text(lines)
    text = written(learning)
    assert "script" not in Page(text).tags
    assert text.count("&lt;script&gt;") == 4
    assert len(text) < 50_000


def test_what_is_validated_is_drawn_beside_what_is_trained(folder: RunFolder) -> None:
    begin(folder, "pretrain")
    lines: list[dict[str, float]] = [{"step": 0, "validation_reward": 0.1}]
    lines += [{"step": step, "reward": step / 7, "kl": step / 5} for step in range(1, 5)]
    folder.stage("pretrain").metrics_file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    text = written(folder)
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"training reward", "validation reward", "KL to the reference (nats an answer)"} <= {
        *drawn
    }
    assert re.findall(r"<figcaption>([^<]*)</figcaption>", text) == ["Reward", "Kl"]
    assert "held-out reward" in text


def test_a_logged_name_with_markup_cannot_break_a_plot(folder: RunFolder) -> None:
    begin(folder, "pretrain")
    lines = [{"step": step, "$</text><script>": step} for step in range(3)]
    folder.stage("pretrain").metrics_file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    assert "script" not in Page(written(folder)).tags


def test_the_page_refers_to_nothing_outside_itself(folder: RunFolder) -> None:
    finish(folder, [5.0, 4.8, 4.6])
    text = written(folder)
    page = Page(text)
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.names)
    assert len(page.names) == len(set(page.names))
    assert "@import" not in text and "http" not in text


def test_the_same_folder_gives_the_same_bytes(folder: RunFolder, tmp_path: Path) -> None:
    finish(folder, [5.0, 4.8, 4.6])
    copy = RunFolder(Path(shutil.copytree(folder.path, tmp_path / "copy")))
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert write_report(copy).read_bytes() == first


def test_a_failed_stage_shows_its_error(folder: RunFolder) -> None:
    begin(folder, "corpus")
    begin(folder, "tokenizer", status="failed", finished=None, error="rank 0 failed: no room")
    text = written(folder)
    assert "rank 0 failed: no room" in text
    assert "<title>tiny: failed</title>" in text


def test_a_stage_whose_process_is_gone_counts_as_interrupted(folder: RunFolder) -> None:
    begin(folder, "corpus", status="running", finished=None)
    assert "<title>tiny: interrupted</title>" in written(folder)


def test_a_running_stage_tells_how_far_it_is(folder: RunFolder) -> None:
    begin(folder, "pretrain", status="running", finished=None)
    told = {"done": 1200, "total": 5000, "unit": "steps", "text": "loss 4.9"}
    write_json(folder.stage("pretrain").progress_file, told)
    with folder.locked():
        text = written(folder)
    assert "1,200 of 5,000 steps; loss 4.9" in text
    assert "<title>tiny: running</title>" in text


def test_an_input_that_was_made_anew_since_is_marked(folder: RunFolder) -> None:
    begin(folder, "corpus", fingerprint="new")
    old = {"corpus": {"stage": "corpus", "fingerprint": "old"}}
    begin(folder, "tokenizer", inputs=old)
    assert "corpus (changed since)" in written(folder)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_values_that_are_not_finite_leave_the_rest_standing(folder: RunFolder, bad: float) -> None:
    finish(folder, [5.0, bad, 4.6, bad])
    folder.stage("pretrain").add_metrics(validation_loss=bad, parameters=None)
    text = written(folder)
    assert "4 values not finite, left out." in text
    assert text.count("<svg") == 4


def test_a_run_with_no_finite_loss_at_all_has_a_page(folder: RunFolder) -> None:
    finish(folder, [math.nan, math.nan])
    assert written(folder).count("<svg") == 3


def test_five_thousand_steps_stay_under_a_megabyte(folder: RunFolder) -> None:
    finish(folder, [5.0 + math.sin(step) for step in range(5000)])
    assert write_report(folder).stat().st_size < 1_000_000


def test_thinning_keeps_the_order_and_every_spike() -> None:
    points = [(float(step), 0.0) for step in range(10_000)]
    points[1234] = (1234.0, 50.0)
    points[7001] = (7001.0, -50.0)
    kept = list(thin(points, 2000))
    assert len(kept) <= 2000
    assert kept == sorted(kept)
    assert points[1234] in kept and points[7001] in kept


def test_a_folder_without_a_recipe_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        write_report(RunFolder(tmp_path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (4.56789, "4.568"),
        (12345.6, "12,346"),
        (1e-9, "1e-09"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        ([1, 2.5], "1, 2.5"),
        ("text", "text"),
    ],
)
def test_values_are_written_for_people(value: object, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("finished", "text"),
    [("00:00:07", "7 s"), ("00:05:41", "5 min 41 s"), ("03:00:59", "3 h 0 min")],
)
def test_durations_are_told_in_two_units(finished: str, text: str) -> None:
    assert format_duration("2026-01-01T00:00:00+00:00", f"2026-01-01T{finished}+00:00") == text
