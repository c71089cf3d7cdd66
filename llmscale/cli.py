"""The commands: read arguments, call, print. No logic."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llmscale import __version__, cli_models
from llmscale.cli_answers import Json, Overrides, RecipeFile, RunDir, console, one_line_errors, tell
from llmscale.errors import RecipeError

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
        tell(as_json, *call.dry_run())
    elif detach:
        tell(as_json, *call.detach())
    else:
        tell(as_json, call.run(console(as_json)))


@app.command()
def show(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the recipe as it would run."""
    from llmscale.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    tell(as_json, loaded.model_dump(mode="json", by_alias=True), loaded.to_yaml().rstrip())


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

    shown, wanted = console(as_json), overrides or []
    if validate is not None:
        tell(as_json, command.validate_table(validate, out, shown))
    elif calibrate is not None:
        file = command.required(recipe)
        tell(
            as_json,
            command.calibrate_by_run(
                file, wanted, calibrate, gpu=gpu, calibration=calibration, console=shown
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
            console=shown,
        )
        tell(as_json, answer)


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

    shown, wanted = console(as_json), overrides or []
    if exact_rank is not None:
        tell(as_json, command.verify_exact_rank(recipe, wanted, exact_rank, shown))
    else:
        answer = command.verify(recipe, wanted, steps=steps, ranks=ranks, console=shown)
        tell(as_json, answer)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of recipes."""
    from llmscale.recipe.recipe import json_schema

    text = json.dumps(json_schema(), indent=2)
    tell(as_json, json.loads(text), text)


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
    tell(as_json, answer, "\n".join(lines))


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
        tell(True, {"stage": name, "rank": rank, "lines": told})
        return
    for line in lines:
        sys.stdout.write(line)
        sys.stdout.flush()


@app.command()
def cancel(run_dir: RunDir, as_json: Json = False) -> None:
    """Ask a run to save and stop."""
    from llmscale import runs

    done = runs.cancel(runs.open_run(run_dir))
    tell(as_json, {"done": done}, done)


for command in (
    cli_models.generate,
    cli_models.rank,
    cli_models.evaluate,
    cli_models.quantize,
    cli_models.export,
):
    app.command()(command)
app.command("import")(cli_models.import_)


@app.command()
def report(run_dir: RunDir, as_json: Json = False) -> None:
    """Write RUN_DIR/report.html."""
    from llmscale import runs
    from llmscale.report.report import write_report

    folder = runs.open_run(run_dir)
    file = write_report(folder).name
    folder.push(file)
    tell(as_json, {"report": f"{folder.place}/{file}"}, f"wrote {folder.place}/{file}")


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
    tell(as_json, {"findings": [asdict(f) for f in findings]}, "\n".join(lines))
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(3)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"llmscale {__version__}\n")
        raise typer.Exit


def main() -> None:
    """The entry point of the ``llmscale`` command."""
    as_json = "--json" in sys.argv
    with one_line_errors(as_json):
        try:
            code = app(standalone_mode=False)
        except Exception as error:
            usage: Callable[[], str] | None = getattr(error, "format_message", None)
            if usage is None:
                raise
            raise RecipeError(f"llmscale: {usage()}; see llmscale --help") from None
    sys.exit(code if isinstance(code, int) else 0)
