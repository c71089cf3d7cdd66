"""What preference training learns from, and the reference's probabilities that it keeps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from safetensors.numpy import load_file, save_file

from llmscale.artifacts import new_folder
from llmscale.data.chat import Example
from llmscale.data.groups import Group, Groups, GroupSamples
from llmscale.data.judgements import Response
from llmscale.data.records import Malformed
from llmscale.models.huggingface_config import read_architecture
from llmscale.stages import tuning
from llmscale.stages.base import Workspace
from llmscale.stages.dpo import Dpo
from llmscale.stages.engines import FirstWeights, built_engine
from llmscale.stages.judgements import (
    Encoded,
    Encoder,
    about_groups,
    group_samples,
    groups_file,
)
from llmscale.stages.train_rank import Course, joined_ranks
from llmscale.stages.tuned import ABOUT_EXAMPLES
from llmscale.training.checkpoint import first_of_folder
from llmscale.training.data_sets import SampleObjective
from llmscale.training.group_scores import answer_probabilities
from llmscale.training.preferences import Completed, Judged, Pairs
from llmscale.training.rows import RowForm

REFERENCES, KEY = "references", "log_probabilities"


def groups_of(stage: Dpo, judged: Sequence[Encoded], encoder: Encoder) -> Iterator[Group]:
    """Pairs; of a ranking every two. For KTO single answers, each with another's as its second."""
    if stage.loss == "kto":
        yield from _single_answers(judged, encoder)
        return
    for one in judged:
        for better in range(len(one.texts)):
            for worse in range(better + 1, len(one.texts)):
                yield Group((one.texts[better], one.texts[worse]))


def _single_answers(judged: Sequence[Encoded], encoder: Encoder) -> Iterator[Group]:
    """Of what is compared the best is desirable, and the others are not."""
    answers = [
        (response, text, one.judgement.target if len(one.texts) == 1 else float(number == 0))
        for one in judged
        for number, (response, text) in enumerate(
            zip(one.judgement.responses, one.texts, strict=True)
        )
    ]
    for number, (response, text, desirable) in enumerate(answers):
        other, _, _ = answers[number - 1]
        yield Group((text, _answered_as(response, other, encoder)), target=desirable)


def _answered_as(response: Response, other: Response, encoder: Encoder) -> Example:
    """A prompt with the answer to another one; where that is too long, only its beginning."""
    last = response.answered(other.answer)
    try:
        return encoder.example(last)
    except Malformed:
        whole = replace(encoder, most=2**31).example(last)
        return Example(whole.tokens_n[: encoder.most], whole.learned_n[: encoder.most])


def keep_references(stage: Dpo, workspace: Workspace) -> None:
    """Writes the reference's log-probabilities of all texts; every rank of the task calls it."""
    target = workspace.folder.path / REFERENCES
    if target.exists():
        return
    wanted = [
        (name, split)
        for name, counts in about_groups(workspace)["examples"].items()
        for split, groups in counts.items()
        if groups
    ]
    known = {}
    model = workspace.inputs["start_from"]
    trained = tuning.tuned_model(stage, workspace.folder, model, read_architecture(model))
    form = tuning.row_form(stage, model, about_groups(workspace)["padding"], workspace.device)
    reference = replace(trained, adapter=None)
    first = FirstWeights(model, workspace.seed)
    with (
        joined_ranks(stage, workspace),
        built_engine(
            stage, reference, first, stage.parallel, workspace.device, frozen=True
        ) as engine,
    ):
        for done, (name, split) in enumerate(wanted):
            workspace.progress.update(done, len(wanted), "data sets", name)
            texts = Groups(_groups_file(workspace, name, split)).texts
            known[name, split] = answer_probabilities(
                engine, [texts[n] for n in range(len(texts))], form, stage.batch.micro
            )
        if first_of_folder(workspace.folder.path):
            with new_folder(target) as beside:
                for (name, split), own in known.items():
                    save_file({KEY: own}, beside / _file_name(name, split))
        dist.barrier()


def preference_training(stage: Dpo, workspace: Workspace) -> Course:
    """What a stage trains."""
    model = workspace.inputs["start_from"]

    def samples(split: str) -> dict[str, GroupSamples]:
        return group_samples(stage, workspace, split, partial(_read, stage, workspace, split))

    sources, held_out = samples("train"), samples("validation")
    padding = about_groups(workspace)["padding"]
    objective = _objective(stage, tuning.row_form(stage, model, padding, workspace.device))
    trained = tuning.tuned_model(stage, workspace.folder, model, read_architecture(model))
    course = tuning.tuned_course(
        stage, workspace, trained, objective, sources, list(held_out.values())
    )
    return replace(course, completing=Completed, alongside=stage.reference == "alongside")


def _objective(stage: Dpo, form: RowForm) -> SampleObjective[Group]:
    if stage.loss == "kto":
        return Judged(form, stage.beta, stage.desirable_weight, stage.undesirable_weight)
    return Pairs(form, stage.loss, stage.beta)


def _read(stage: Dpo, workspace: Workspace, split: str, name: str, file: Path) -> Groups:
    if stage.reference == "alongside":
        return Groups(file)
    kept = load_file(workspace.folder.path / REFERENCES / _file_name(name, split))
    return Groups(file, references=kept[KEY])


def _groups_file(workspace: Workspace, name: str, split: str) -> Path:
    return groups_file(workspace.folder.path / Path(ABOUT_EXAMPLES).parent, name, split)


def _file_name(name: str, split: str) -> str:
    return f"{name}-{split}.safetensors"
