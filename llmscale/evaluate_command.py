"""The command ``evaluate``: a model measured as a recipe's stage does, and told in lines."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from llmscale import runs
from llmscale.data.documents import read_documents
from llmscale.errors import RecipeError
from llmscale.evaluation.packages import require
from llmscale.recipe.explain import explain
from llmscale.settings import Problem, Settings
from llmscale.stages.measures import Classification, Tasks, WrittenTexts

if TYPE_CHECKING:
    from rich.console import Console

OPTIONS = {
    "labels": "--label",
    "perturbations": "--perturb",
    "names": "--tasks",
    "folder": "--task-folder",
}
"""Settings that an option is called otherwise for."""
Set = TypeVar("Set", bound=Settings)


@dataclass(frozen=True)
class Texts:
    """Files whose perplexity is wanted, by windows of which length and stride, in tokens."""

    files: Sequence[Path]
    window: int | None
    stride: int | None


@dataclass(frozen=True)
class Measures:
    """All that is asked for."""

    texts: Texts | None
    classification: Classification | None
    generation: WrittenTexts | None
    tasks: Tasks | None


def measures(
    *,
    perplexity: Mapping[str, Any],
    classification: Mapping[str, Any],
    generation: Mapping[str, Any],
    tasks: Mapping[str, Any],
    max_new_tokens: int,
) -> Measures:
    """What the command's options ask for; None stands for one that is not given.

    Raises:
        RecipeError: names the option that is wrong, or the file and line.
        MachineError: if a package is missing.
    """
    asked = Measures(
        _texts(**perplexity),
        _classification(_given(classification), max_new_tokens),
        _generation(_given(generation), max_new_tokens),
        _tasks(_given(tasks)),
    )
    if not any((asked.texts, asked.classification, asked.generation, asked.tasks)):
        raise RecipeError(
            "nothing to measure; give --text, --classification, --generation or --tasks"
        )
    require(asked.classification, asked.generation, asked.tasks)
    return asked


def evaluate(model: str, asked: Measures, seed: int, console: "Console") -> dict[str, Any]:
    """The figures: of texts by their path, then of each measure, by its file or its task.

    Raises:
        RecipeError: if the model, or a text of a file, is wrong.
    """
    folder = runs.model_folder(model)
    from llmscale.evaluation.models import load_model

    loaded, tokenizer = load_model(folder)
    figures: dict[str, Any] = {}
    with _bar(console) as on_row:
        if asked.texts is not None:
            figures |= _perplexities(loaded, tokenizer, asked.texts, seed)
        if (labelled := asked.classification) is not None:
            from llmscale.evaluation.classification import classify

            found, _ = classify(loaded, tokenizer, labelled, labelled.task(), seed, on_row)
            figures["classification"] = {labelled.path: found}
        if (written := asked.generation) is not None:
            from llmscale.evaluation.references import written_against_references

            records = written.records()
            found, _ = written_against_references(loaded, tokenizer, records, written, seed, on_row)
            figures["generation"] = {written.path: found}
        if asked.tasks is not None:
            from llmscale.evaluation.harness import harness_figures

            where = Path(asked.tasks.folder) if asked.tasks.folder else None
            figures["tasks"] = harness_figures(loaded, tokenizer, asked.tasks.names, where)
    return figures


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: str(own) if isinstance(own, Path) else own for key, own in options.items()}
    return {key: own for key, own in plain.items() if own not in (None, [])}


def _texts(texts: Sequence[Path] | None, window: int | None, stride: int | None) -> Texts | None:
    if not texts:
        for name, own in (("window", window), ("stride", stride)):
            if own is not None:
                raise RecipeError(f"--{name}: goes with --text; give a text file")
        return None
    for text in texts:
        if not text.is_file():
            raise RecipeError(f"--text: {text} is no file; give a text")
    if window and stride and stride > window:
        raise RecipeError(f"--stride: {stride} is above --window {window}; use at most {window}")
    return Texts(texts, window, stride)


def _classification(options: dict[str, Any], max_new_tokens: int) -> Classification | None:
    _alone(options, "path", "--classification", "a file of labelled texts")
    if not options:
        return None
    if "shots" in options and "examples" not in options:
        raise RecipeError("--shots: goes with --examples; give a file of labelled texts")
    if "labels" in options:
        options["labels"] = dict(_label(one) for one in options["labels"])
    return _checked(Classification, "--classification", max_new_tokens=max_new_tokens, **options)


def _label(text: str) -> tuple[str, str]:
    name, sign, own = text.partition("=")
    if not sign or not name:
        raise RecipeError(f"--label: {text!r} is no NAME=TEXT; write one, as 'good= great'")
    return name, own


def _generation(options: dict[str, Any], max_new_tokens: int) -> WrittenTexts | None:
    if not options:
        return None
    return _checked(WrittenTexts, "--generation", max_new_tokens=max_new_tokens, **options)


def _tasks(options: dict[str, Any]) -> Tasks | None:
    _alone(options, "names", "--tasks", "their names")
    if not options:
        return None
    names = tuple(name for name in options.pop("names").split(",") if name)
    return _checked(Tasks, "--tasks", names=names, **options)


def _alone(options: Mapping[str, Any], key: str, option: str, what: str) -> None:
    """Refuses options that go with one that is not given."""
    if options and key not in options:
        raise RecipeError(f"{_option(next(iter(options)), '')}: goes with {option}; give {what}")


def _checked(kind: type[Set], option: str, **settings: Any) -> Set:
    try:
        made = kind(**settings)
    except ValidationError as error:
        path, message = explain(error, kind)
        raise RecipeError(f"{_option(path[0], option)}: {message}") from None
    problems: Callable[[], Iterator[Problem]] = made.problems  # type: ignore[attr-defined]
    for problem in problems():
        raise RecipeError(f"{_option(next(iter(problem.path), 'path'), option)}: {problem.message}")
    return made


def _option(setting: str, file_option: str) -> str:
    if setting == "path":
        return file_option
    return OPTIONS.get(setting, f"--{setting.replace('_', '-')}")


def _perplexities(model: Any, tokenizer: Any, texts: Texts, seed: int) -> dict[str, Any]:
    from llmscale.evaluation.perplexity import Likelihood, likelihood_intervals, likelihoods

    longest = model.config.max_position_embeddings
    length = min(texts.window or longest, longest)
    figures = {}
    for file in texts.files:
        each = likelihoods(
            model,
            tokenizer,
            (document.text for document in read_documents(file)),
            length=length,
            stride=min(texts.stride or length // 2, length),
        )
        total = sum(each, Likelihood())
        if total.tokens == 0:
            raise RecipeError(f"--text: {file} holds no text; give another")
        figures[str(file)] = {**total.metrics(), **likelihood_intervals(each, seed)}
    return figures


@contextmanager
def _bar(console: "Console") -> Iterator[Callable[[int, int], None]]:
    """A progress bar, where there is a terminal."""
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
