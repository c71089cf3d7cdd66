"""The commands: read arguments, call, print. No logic."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmscale import __version__
from llmscale.errors import LlmscaleError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

# Looking for pydantic's plugins reads every installed package: a tenth of a second a command.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

app = typer.Typer(
    name="llmscale",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One recipe from raw text to an evaluated model, at any layout, on any cluster.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace its own.")
]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="The folder or URL of a run.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or RUN_DIR:STAGE.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to write.")]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[str | None, typer.Option(help="local, slurm or ray.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster: http://HEAD:8265.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Or a URL. Default: runs/NAME.")] = None,
    stages: Annotated[str | None, typer.Option(help="Only these, separated by commas.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start the stages over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe's stages, or go on where they were."""
    from llmscale.launch import launch

    chosen = stages.split(",") if stages else None
    call = launch(
        recipe,
        overrides or [],
        on=on,
        address=address,
        run_dir=run_dir,
        stages=chosen,
        fresh=fresh,
    )
    if dry_run:
        _answer(as_json, *call.dry_run())
    elif detach:
        _answer(as_json, *call.detach())
    else:
        _answer(as_json, call.run(_console(as_json)))


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the recipe as it would run."""
    from llmscale.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _answer(as_json, loaded.model_dump(mode="json", by_alias=True), loaded.to_yaml().rstrip())


@app.command()
def plan(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="The recipe, a YAML file.")
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="Such as h100; or cpu, measured now.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's ranks.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Each number's formula and source.")] = False,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the recipe with the best layout that fits here.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Refine the constants by a run's metrics.jsonl.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="The name of refined constants. Default: the GPU's.")
    ] = None,
    validate: Annotated[
        Path | None, typer.Option(help="Predict each row of a table of published results.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The table with predictions, as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """Predict a recipe's memory, step time and MFU, and search for better layouts."""
    from llmscale import plan_command as command

    console, wanted = _console(as_json), overrides or []
    if validate is not None:
        _answer(as_json, command.validate_table(validate, out, console))
    elif calibrate is not None:
        file = command.required(recipe)
        _answer(
            as_json,
            command.calibrate_by_run(
                file, wanted, calibrate, gpu=gpu, calibration=calibration, console=console
            ),
        )
    else:
        answer = command.plan(
            command.required(recipe),
            wanted,
            gpu=gpu,
            gpus=gpus,
            price=price,
            why=why,
            write=write,
            calibration=calibration,
            console=console,
        )
        _answer(as_json, answer)


@app.command()
def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare.")] = 3,
    ranks: Annotated[int, typer.Option(help="CPU ranks at most: 8 or 16.")] = 8,
    exact_rank: Annotated[
        int | None, typer.Option(help="Build this rank at its true size instead; proves nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a recipe's layout equal to one rank, scaled down to this machine's CPU."""
    from llmscale.verify import command

    console, wanted = _console(as_json), overrides or []
    if exact_rank is not None:
        _answer(as_json, command.verify_exact_rank(recipe, wanted, exact_rank, console))
    else:
        answer = command.verify(recipe, wanted, steps=steps, ranks=ranks, console=console)
        _answer(as_json, answer)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of recipes."""
    from llmscale.recipe.recipe import json_schema

    text = json.dumps(json_schema(), indent=2)
    _answer(as_json, json.loads(text), text)


@app.command()
def status(run_dir: RunDir, as_json: Json = False) -> None:
    """Tell how far a run is."""
    from llmscale.runs import open_run
    from llmscale.status import member_lines
    from llmscale.status import status as status_of

    answer = status_of(open_run(run_dir))
    lines = [f"{answer['recipe']} in {answer['run']}: {answer['running'] or 'not running'}"]
    for stage in answer["stages"]:
        progress = stage["progress"]
        how_far = f"{progress['done']}/{progress['total']} {progress['unit']}" if progress else ""
        detail = stage["error"] or (f"{how_far} {progress['text']}" if progress else "")
        lines.append(f"  {stage['stage']:<16} {stage['status']:<12} {detail}".rstrip())
    lines += member_lines(answer.get("sweep", []))
    lines += [
        f"  {event['time']}  job {event['job']}: {event['outcome']}" for event in answer["events"]
    ]
    if answer["bad_nodes"]:
        lines.append(f"  kept off {', '.join(answer['bad_nodes'])}: failed more than once")
    _answer(as_json, answer, "\n".join(lines))


@app.command()
def logs(
    run_dir: RunDir,
    stage: Annotated[str | None, typer.Option(help="Default: the one begun last.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as it grows.")] = False,
    as_json: Json = False,
) -> None:
    """Print a rank's log."""
    from llmscale import runs

    folder = runs.open_run(run_dir)
    lines = runs.log_lines(folder, rank, stage)
    if follow:
        lines = runs.followed_lines(folder, rank, stage, runs.Activity(folder))
    if as_json:
        told = [line.rstrip("\n") for line in lines]
        name = stage or runs.latest_stage(folder)
        _answer(True, {"stage": name, "rank": rank, "lines": told})
        return
    for line in lines:
        sys.stdout.write(line)
        sys.stdout.flush()


@app.command()
def cancel(run_dir: RunDir, as_json: Json = False) -> None:
    """Ask a run to save and stop."""
    from llmscale import runs

    done = runs.cancel(runs.open_run(run_dir))
    _answer(as_json, {"done": done}, done)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    decoding: Annotated[str, typer.Option(help="greedy, beam or sample.")] = "greedy",
    max_new_tokens: Annotated[int, typer.Option(help="How long, in tokens.")] = 100,
    beams: Annotated[int, typer.Option(help="Of beam search.")] = 4,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Sample within this probability.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 1234,
    raw: Annotated[bool, typer.Option("--raw", help="Without the model's chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Let a model go on from a text, or answer it, if it has a chat template."""
    from llmscale import models_at_hand

    settings = {
        "decoding": decoding,
        "max_new_tokens": max_new_tokens,
        "beams": beams,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
    }
    text, answered = models_at_hand.generate_text(model, prompt, settings, seed, raw)
    _answer(as_json, {"prompt": prompt, "text": text}, text if answered else prompt + text)


@app.command()
def rank(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="A prompt a line, or records with one each.")],
    reward: Annotated[list[str], typer.Option(help="A model that scores; again for an ensemble.")],
    best_of: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="How long, in tokens.")] = 100,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Sample within this probability.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 1234,
    out: Annotated[Path | None, typer.Option(help="A file of rankings to write.")] = None,
    as_json: Json = False,
) -> None:
    """Let a model answer prompts several times, and rank the answers by a reward model."""
    from llmscale import ranking

    settings = {
        "max_new_tokens": max_new_tokens,
        "top_k": top_k,
        "top_p": top_p,
        "temperature": temperature,
    }
    ranked = ranking.rank(model, prompts, reward, best_of, settings, seed, out)
    lines = [
        f"{one['prompt']}\n"
        + "\n".join(
            f"  {score:8.3f}  {' '.join(text.split())}"
            for text, score in zip(one["responses"], one["scores"], strict=True)
        )
        for one in ranked
    ]
    _answer(as_json, {"prompts": ranked}, "\n".join(lines))


@app.command()
def evaluate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option(help="Perplexity of a text file; can be given again.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens from window to window.")] = None,
    classification: Annotated[
        Path | None, typer.Option(help="A file of JSON lines with texts and their label.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="The prompt; a record's fields in braces. Default: {text}")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="What stands for a label.")
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help="Of a label's log-probability: none, tokens or bytes.")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="likelihood, greedy, chain_of_thought or self_consistency."),
    ] = None,
    votes: Annotated[int | None, typer.Option(help="Of self_consistency.")] = None,
    examples: Annotated[Path | None, typer.Option(help="A file of examples to show.")] = None,
    shots: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    perturb: Annotated[
        list[str] | None, typer.Option(help="typos, case, punctuation or word_swaps; again.")
    ] = None,
    group: Annotated[str | None, typer.Option(help="The field with the group of a text.")] = None,
    generation: Annotated[
        Path | None, typer.Option(help="A file of JSON lines with prompts and references.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of a generated text.")] = 100,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-evaluation-harness, separated by commas.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="With YAML files of tasks.")] = None,
    seed: Annotated[int, typer.Option(help="Of examples, sampling and intervals.")] = 1234,
    as_json: Json = False,
) -> None:
    """Measure a model: on texts, labelled texts, prompts with references, or tasks."""
    from llmscale import evaluate_command as command
    from llmscale.evaluate_display import lines

    measures = command.measures(
        perplexity={"texts": text, "window": window, "stride": stride},
        classification={
            "path": classification,
            "template": template,
            "labels": label,
            "normalization": normalization,
            "answer": answer,
            "votes": votes,
            "examples": examples,
            "shots": shots,
            "perturbations": perturb,
            "group": group,
        },
        generation={"path": generation},
        tasks={"names": tasks, "folder": task_folder},
        max_new_tokens=max_new_tokens,
    )
    figures = command.evaluate(model, measures, seed, _console(as_json))
    _answer(as_json, figures, "\n".join(lines(figures)))


@app.command()
def quantize(
    model: Model,
    scheme: Annotated[str | None, typer.Option(help="Such as int4-gptq; see the docs.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="A text file to calibrate with; again for more.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of it.")] = 32768,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="Columns that share a scale, in 4 bits.")
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="With zero points, in 4 bits.")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="Schemes to compare, separated by commas.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file to compare on; again for more.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model with quantized weights, or compare schemes."""
    from llmscale import quantize_command as command

    if compare is not None:
        rows = command.compare_schemes(
            model, compare, text or [], calibration or [], tokens, window
        )
        _answer(as_json, {"schemes": rows}, command.table(rows))
        return
    if scheme is None or out is None:
        raise RecipeError(
            f"--{'scheme' if scheme is None else 'out'}: is missing; give --scheme and --out, or "
            "--compare and --text"
        )
    figures = command.quantize_model(
        model, scheme, out, calibration or [], tokens, group_size, not asymmetric
    )
    _answer(
        as_json,
        figures,
        f"wrote {out}, {figures['megabytes']:,} MB, {figures['bits_per_weight']} bits a weight, "
        f"in {figures['quantize_seconds']:,.0f} s",
    )


@app.command()
def export(
    run_stage: Annotated[str, typer.Argument(metavar="RUN_DIR[:STAGE]")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write a stage's best checkpoint as a Hugging Face folder."""
    from llmscale import models_at_hand

    answer = models_at_hand.export(run_stage, out)
    _answer(as_json, answer, f"wrote {out} from step {answer['step']}")


@app.command("import")
def import_(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a .gguf file.")
    ],
    out: Out,
    as_json: Json = False,
) -> None:
    """Make a Hugging Face model ready to go on from, at any layout; a folder of a GGUF file."""
    from llmscale import models_at_hand

    parameters = models_at_hand.import_model(model, out)
    _answer(
        as_json,
        {"out": str(out), "parameters": parameters},
        f"wrote {out}, {parameters:,} parameters",
    )


@app.command()
def report(run_dir: RunDir, as_json: Json = False) -> None:
    """Write RUN_DIR/report.html."""
    from llmscale import runs
    from llmscale.report.report import write_report

    folder = runs.open_run(run_dir)
    file = write_report(folder).name
    folder.push(file)
    _answer(as_json, {"report": f"{folder.place}/{file}"}, f"wrote {folder.place}/{file}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what this machine has and lacks, and what would mend it."""
    from dataclasses import asdict

    from llmscale.doctor import examine

    findings = examine()
    lines = [
        f"{f.state:<8} {f.name}: {f.detail}" + (f"  ->  {f.mend}" if f.mend else "")
        for f in findings
    ]
    _answer(as_json, {"findings": [asdict(f) for f in findings]}, "\n".join(lines))
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(3)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"llmscale {__version__}\n")
        raise typer.Exit


def _console(as_json: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=as_json, highlight=False, soft_wrap=True)


def _answer(as_json: bool, answer: Any, text: str = "") -> None:
    if as_json:
        sys.stdout.write(json.dumps(answer, default=str) + "\n")
    elif text:
        sys.stdout.write(text + "\n")


@contextmanager
def _one_line_errors(as_json: bool) -> Iterator[None]:
    """An error is one line on standard error; with ``--json`` an object on standard output too."""
    try:
        yield
    except LlmscaleError as error:
        _fail(as_json, str(error), error.exit_code, error.answer)
    except typer.Abort:
        _fail(as_json, "interrupted", 130)
    except KeyboardInterrupt:
        _fail(as_json, "interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(as_json, f"{where}{error.strerror or error}; free or mend it and run again", 4)


def _fail(as_json: bool, line: str, code: int, answer: dict[str, Any] | None = None) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")
    _answer(as_json, {"error": line, "exit_code": code, **(answer or {})})
    sys.exit(code)


def main() -> None:
    """The entry point of the ``llmscale`` command."""
    as_json = "--json" in sys.argv
    with _one_line_errors(as_json):
        try:
            code = app(standalone_mode=False)
        except Exception as error:
            usage: Callable[[], str] | None = getattr(error, "format_message", None)
            if usage is None:
                raise
            raise RecipeError(f"llmscale: {usage()}; see llmscale --help") from None
    sys.exit(code if isinstance(code, int) else 0)
