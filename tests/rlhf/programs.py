"""What ranks do in the tests of this folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmscale.artifacts import RunFolder
from llmscale.clusters.base import Job
from llmscale.data.prompts import Prompt
from llmscale.progress import Progress
from llmscale.recipe.recipe import load_recipe
from llmscale.rlhf.answers import Answer
from llmscale.stages.base import Workspace
from llmscale.stages.ppo import Ppo
from tests.ranks import answer, settings


def ppo_workspace(recipe: Path, job: Job, rank: int, rendezvous: str) -> tuple[Ppo, Workspace]:
    """The stage ``ppo`` of a recipe, and a rank's place in it."""
    read = load_recipe(recipe)
    stage = read.stages["ppo"]
    assert isinstance(stage, Ppo)
    folder = RunFolder(job.run_folder).stage("ppo")
    folder.path.mkdir(exist_ok=True)
    inputs = {named.key: Path(named.name) for named in stage.named()}
    workspace = Workspace(
        folder=folder,
        inputs=inputs,
        seed=read.seed,
        device="cpu",
        progress=Progress(folder.progress_file),
        rank=rank,
        ranks=job.task.ranks,
        rendezvous=rendezvous,
    )
    return stage, workspace


class FixedRollout:
    """Gives the same answers, whatever the policy is."""

    def __init__(self, answers: dict[str, list[int]], most: int) -> None:
        self._answers, self._most = answers, most

    def synchronize(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        list(weights)

    def answers(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Answer]:
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Answer:
        tokens = tuple(self._answers[prompt.text])
        text = " ".join(map(str, tokens))
        return Answer(prompt, text, tokens, (0.0,) * len(tokens), len(tokens) < self._most)


def learn_from_answers(job: Job, rank: int, rendezvous: str) -> None:
    """Some iterations, on given answers if there are any; tells of them, exports what learned."""
    from dataclasses import replace

    from llmscale.rlhf.critics import OwnCritic
    from llmscale.rlhf.examine import examined
    from llmscale.rlhf.updates import updated
    from llmscale.stages.ppo_training import built_roles, controller
    from llmscale.stages.prompts import make_prompts
    from llmscale.stages.train_rank import joined_ranks
    from llmscale.training.checkpoint import Checkpoints, TrainingState
    from llmscale.training.signals import StopRequest

    given = settings(job)
    stage, workspace = ppo_workspace(Path(given["recipe"]), job, rank, rendezvous)
    if rank == 0:
        make_prompts(stage, workspace)
    with joined_ranks(stage, workspace), built_roles(stage, workspace, resumed=False) as built:
        roles = built
        if given["answers"] is not None:
            fixed = FixedRollout(given["answers"], stage.rollout.max_new_tokens)
            roles = replace(built, rollout=fixed)
        checkpoints = Checkpoints(workspace.folder.checkpoints, 1)
        loop = controller(stage, workspace, roles, checkpoints, StopRequest(), None)
        told, state = [], TrainingState(kl_coefficient=stage.kl.coefficient)
        for step in range(stage.steps or 0):
            state = replace(state, step=step, consumed_samples=step * stage.rollout.prompts)
            roles.rollout.synchronize(roles.policy.whole_weights())
            answers = loop.answers(state)
            scores = roles.scorers.scores(answers)
            lesson, beta = loop.lesson, stage.kl.coefficient
            experience, expected, figures = examined(
                lesson, roles, loop.form, answers, scores, beta
            )
            figures |= updated(lesson, roles, experience, expected, beta, step)
            asked, said = [one.prompt.text for one in answers], [one.tokens for one in answers]
            told.append({"asked": asked, "said": said, "scores": scores.total_n, **figures})
        learned = {"policy": roles.policy}
        if isinstance(roles.critic, OwnCritic):
            learned["critic"] = roles.critic.engine
        for name, engine in learned.items():
            if rank == 0:
                (job.run_folder / name).mkdir()
            engine.export(job.run_folder / name)
    answer(job, rank, told)


def weighed(prompts: list[str], responses: list[str]) -> list[float]:
    """A score of any answer, given as its tokens' numbers."""
    return [sum(map(int, response.split())) / 100 for response in responses]


def sampled(job: Job, rank: int, rendezvous: str) -> None:
    """Answers of a model of letters, its weights taken from an engine."""
    from llmscale.data.tokenizer import load_tokenizer
    from llmscale.models.huggingface import fill
    from llmscale.models.huggingface_config import read_architecture
    from llmscale.models.stored_weights import HuggingFaceWeights
    from llmscale.parallel.layout import Layout
    from llmscale.rlhf.rollout import AnswerForm, SharedRollout
    from llmscale.stages.ppo_training import ANSWER_ENGINES
    from llmscale.training.megatron_engine import MegatronEngine
    from llmscale.training.settings import Optimizer
    from tests.ranks import joined

    given = settings(job)
    folder, layout = Path(given["model"]), Layout(**given["layout"])
    tokenizer = load_tokenizer(folder)
    form = AnswerForm(
        temperature=given["temperature"],
        most=8,
        ends=(3,),
        padding=0,
        batch=given["batch"],
        length=64,
    )
    prompts = [
        Prompt(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        for text in given["prompts"]
    ]
    with joined(job, rank, rendezvous, layout):
        architecture = read_architecture(folder)
        engine = MegatronEngine(architecture, 30, layout, Optimizer(learning_rate=1.0))
        fill(engine.chunks, architecture, 30, HuggingFaceWeights(folder))
        sampling = ANSWER_ENGINES[given["engine"]](folder, form, torch.float32, "cpu")
        rollout = SharedRollout(sampling, tokenizer, form)
        rollout.synchronize(engine.whole_weights())
        answers = rollout.answers(prompts, given["keys"])
    told = [
        {"tokens": one.tokens, "log_probabilities": one.log_probabilities, "ended": one.ended}
        for one in answers
    ]
    answer(job, rank, told)


def half_fed(job: Job, rank: int, rendezvous: str) -> None:
    """What is said where one of the policy's weights does not come."""
    from llmscale.data.tokenizer import load_tokenizer
    from llmscale.errors import StageError
    from llmscale.models.stored_weights import HuggingFaceWeights
    from llmscale.parallel.layout import Layout
    from llmscale.rlhf.rollout import AnswerForm, SharedRollout
    from llmscale.stages.ppo_training import ANSWER_ENGINES
    from tests.ranks import joined

    given = settings(job)
    folder = Path(given["model"])
    form = AnswerForm(temperature=1.0, most=8, ends=(3,), padding=0, batch=1, length=64)
    with joined(job, rank, rendezvous, Layout()):
        sampling = ANSWER_ENGINES[given["engine"]](folder, form, torch.float32, "cpu")
        rollout = SharedRollout(sampling, load_tokenizer(folder), form)
        weights = HuggingFaceWeights(folder)
        try:
            rollout.synchronize((n, weights[n]) for n in weights if n != given["left_out"])
            answer(job, rank, None)
        except StageError as error:
            answer(job, rank, str(error))


def scored(job: Job, rank: int, rendezvous: str) -> None:
    """Scores of answers by several scorers, or the line that says what is wrong with them."""
    from llmscale.errors import StageError
    from llmscale.parallel.layout import Layout
    from llmscale.rlhf.scoring import CalledScorer, WeighedScorers, function_named
    from tests.ranks import joined

    given = settings(job)
    prompt = Prompt("a b", (4, 5))
    answers = [
        Answer(prompt, text, (), (), ended)
        for text, ended in zip(given["answers"], given["ended"], strict=True)
    ]
    told: list[Any] = []
    with joined(job, rank, rendezvous, Layout()):
        for functions in given["functions"]:
            scorers = {
                name: CalledScorer(function_named(function), 0.5)
                for name, function in functions.items()
            }
            weights = dict.fromkeys(scorers, 2.0)
            weighed_scorers = WeighedScorers(scorers, weights, given["without_end"])
            try:
                found = weighed_scorers.scores(answers)
                told.append([found.total_n, dict(found.parts)])
            except StageError as error:
                told.append(str(error))
    answer(job, rank, told)


def learn_while_weighed(job: Job, rank: int, rendezvous: str) -> None:
    """A whole stage; tells the process's resident memory after each iteration, in bytes."""
    import psutil

    from llmscale.stages import train_rank
    from llmscale.stages.ppo_training import learn_from_rewards
    from llmscale.stages.prompts import make_prompts
    from llmscale.training.log import TrainingLog

    weights: list[int] = []

    class WeighingLog(TrainingLog):
        def step(self, *arguments: Any, **values: Any) -> None:
            super().step(*arguments, **values)
            weights.append(psutil.Process().memory_info().rss)

    train_rank.TrainingLog = WeighingLog  # type: ignore[misc]
    try:
        stage, workspace = ppo_workspace(Path(settings(job)["recipe"]), job, rank, rendezvous)
        make_prompts(stage, workspace)
        learn_from_rewards(stage, workspace)
    finally:
        train_rank.TrainingLog = TrainingLog  # type: ignore[misc]
    answer(job, rank, weights)
