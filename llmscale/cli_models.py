"""The commands for models at hand: generate, rank, evaluate, quantize, export, import."""

from pathlib import Path
from typing import Annotated

import typer

from llmscale.cli_answers import Json, Model, Out, console, tell
from llmscale.errors import RecipeError


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
    tell(as_json, {"prompt": prompt, "text": text}, text if answered else prompt + text)


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
    tell(as_json, {"prompts": ranked}, "\n".join(lines))


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
    figures = command.evaluate(model, measures, seed, console(as_json))
    tell(as_json, figures, "\n".join(lines(figures)))


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
    observer: Annotated[str, typer.Option(help="How scales are found: mse, minmax.")] = "mse",
    bits: Annotated[
        float | None, typer.Option(min=4.05, max=8, help="A weight on average, of mixed.")
    ] = None,
    key_value_cache: Annotated[
        str | None, typer.Option(help="Scales for a cache in int8, fp8.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Of 4-bit weights: compressed-tensors, gptq.")
    ] = "compressed-tensors",
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
        tell(as_json, {"schemes": rows}, command.table(rows))
        return
    if scheme is None or out is None:
        raise RecipeError(
            f"--{'scheme' if scheme is None else 'out'}: is missing; give --scheme and --out, or "
            "--compare and --text"
        )
    options = {
        "group_size": group_size,
        "symmetric": not asymmetric,
        "observer": observer,
        "bits": bits,
        "key_value_cache": key_value_cache,
        "layout": layout,
    }
    figures = command.quantize_model(model, scheme, out, calibration or [], tokens, options)
    tell(
        as_json,
        figures,
        f"wrote {out}, {figures['megabytes']:,} MB, {figures['bits_per_weight']} bits a weight, "
        f"in {figures['quantize_seconds']:,.0f} s; loaded by {figures['loaded_by']}",
    )


def export(
    run_stage: Annotated[str, typer.Argument(metavar="RUN_DIR[:STAGE]")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write a stage's best checkpoint as a Hugging Face folder."""
    from llmscale import models_at_hand

    answer = models_at_hand.export(run_stage, out)
    tell(as_json, answer, f"wrote {out} from step {answer['step']}")


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
    tell(
        as_json,
        {"out": str(out), "parameters": parameters},
        f"wrote {out}, {parameters:,} parameters",
    )
