"""What is proven: a recipe's stage, scaled down to a few CPU ranks with its structure kept."""

from collections.abc import Mapping
from itertools import combinations

from pydantic import PositiveInt

from llmscale.models.architecture import Architecture
from llmscale.parallel.layout import Layout
from llmscale.rlhf.settings import AlgorithmName, Expectation, Kl, Rollout, Update
from llmscale.settings import Settings
from llmscale.stages.ppo import Ppo
from llmscale.stages.pretrain import Pretrain
from llmscale.stages.trained import TrainedStage
from llmscale.training.settings import Batch, Optimizer, Precision, Recompute

DEGREES = ("tensor", "pipeline", "context", "data")
HEADS, HEAD_SIZE, OWN_HEAD_SIZE = 4, 8, 12
FFN_SIZE = 48
EXPERTS = 4
SEQUENCE_LENGTH = 32
VOCABULARY = 250
MICRO_BATCH = 2
LEARNING_RATE = 1e-3
LARGEST_LAYERS_OF_A_STAGE = 2
SMALLEST_EPSILON = 1e-5
"""AdamW with a smaller one moves weights by the rounding noise of gradients that are zero."""
INITIAL_STD = 0.15
"""Wide enough for attention to be far from uniform in so small a model."""
PASSES, ANSWERS = 2, 2
"""Of learning from rewards: passes over an iteration's answers, and answers to a prompt."""
ANSWER_TOKENS = SEQUENCE_LENGTH // 2


class Learning(Settings):
    """How the model of a proof learns from rewards: as a stage of kind ppo has it."""

    algorithm: AlgorithmName
    rollout: Rollout
    kl: Kl
    expectation: Expectation
    update: Update
    critic_optimizer: Optimizer


class Proof(Settings):
    """A small training run, done once at a layout and once at one rank."""

    model: Architecture
    vocabulary: PositiveInt
    parallel: Layout
    batch: Batch
    optimizer: Optimizer
    precision: Precision = "fp32"
    recompute: Recompute = "none"
    separate_documents: bool = False
    learning: Learning | None = None
    steps: PositiveInt
    seed: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks the layout has."""
        return self.parallel.model_ranks * self.parallel.data_ranks(1)

    def at_one_rank(self) -> "Proof":
        """The same run as plainly as can be."""
        optimizer = self.optimizer.model_copy(update={"distributed": False})
        plain = {"parallel": Layout(), "recompute": "none", "optimizer": optimizer}
        return self.model_copy(update=plain)


def proofs(stage: Pretrain, cluster_ranks: int, *, steps: int, most_ranks: int) -> list[Proof]:
    """The stage at every degree that is above one set to two.

    If these are too many for ``most_ranks``, each largest choice of them that fits is a proof
    of its own, so that all pairs and triples of degrees still are proven together.
    """
    return [
        _proof(stage, stage.architecture(), degrees, steps).model_copy(
            update={"separate_documents": stage.separate_documents}
        )
        for degrees in _choices(stage.parallel, cluster_ranks, most_ranks)
    ]


def learning_proofs(
    stage: Ppo, model: Architecture, ranks: int, *, steps: int, most_ranks: int
) -> list[Proof]:
    """The same of a stage that learns from rewards.

    Args:
        model: the policy's.
        ranks: the policy's; those of other groups play roles that learn nothing.
    """
    found = []
    for degrees in _choices(stage.parallel, ranks, most_ranks):
        proof = _proof(stage, model, degrees, steps)
        update = {"learning": _learning(stage, proof), "optimizer": _steady(proof.optimizer)}
        found.append(proof.model_copy(update=update))
    return found


def _choices(layout: Layout, cluster_ranks: int, most_ranks: int) -> list[dict[str, int]]:
    room = most_ranks.bit_length() - 1
    degrees = {name: getattr(layout, name) for name in DEGREES}
    degrees["data"] = layout.data_ranks(cluster_ranks)
    split = [name for name, degree in degrees.items() if degree > 1]
    return [dict.fromkeys(chosen, 2) for chosen in combinations(split, min(room, len(split)))]


def _proof(
    stage: TrainedStage, model: Architecture, degrees: Mapping[str, int], steps: int
) -> Proof:
    layout = _small_layout(stage.parallel, degrees)
    pipeline = layout.pipeline
    micro = min(stage.batch.micro, MICRO_BATCH)
    samples = micro * (layout.data or 1) * 2 * pipeline
    return Proof(
        model=_small_model(model, layout),
        vocabulary=VOCABULARY,
        parallel=layout,
        batch=Batch.model_validate({"global": samples, "micro": micro}),
        optimizer=_plain_optimizer(stage.optimizer),
        recompute=stage.recompute,
        steps=steps,
    )


def _plain_optimizer(optimizer: Optimizer) -> Optimizer:
    epsilon = max(optimizer.epsilon, SMALLEST_EPSILON)
    return optimizer.model_copy(update={"learning_rate": LEARNING_RATE, "epsilon": epsilon})


def _learning(stage: Ppo, proof: Proof) -> Learning:
    """As many updates a pass as the stage has, up to two, and its rules of learning.

    ``target_kl`` is left out: whether a pass is left out could depend on the last bit.
    """
    own = stage.critic_settings()
    answers = min(stage.rollout.answers, ANSWERS)
    samples = proof.batch.global_ * min(2, stage.rollout.samples // stage.batch.global_)
    passes = min(stage.update.passes, PASSES)
    return Learning(
        algorithm=stage.algorithm,
        rollout=Rollout(
            prompts=samples // answers,
            answers=answers,
            max_new_tokens=ANSWER_TOKENS,
            temperature=stage.rollout.temperature,
        ),
        kl=stage.kl,
        expectation=Expectation(clip=own.clip, discount=own.discount, smoothing=own.smoothing),
        update=stage.update.model_copy(update={"passes": passes, "target_kl": None}),
        critic_optimizer=_steady(_plain_optimizer(own.optimizer or stage.optimizer)),
    )


def _steady(optimizer: Optimizer) -> Optimizer:
    """Without a schedule, which would have the first steps change nothing."""
    steady = {"schedule": "constant", "warmup_steps": 0, "decay_steps": None}
    return optimizer.model_copy(update=steady)


def _small_layout(layout: Layout, degrees: Mapping[str, int]) -> Layout:
    tensor, pipeline = degrees.get("tensor", 1), degrees.get("pipeline", 1)
    virtual = 2 if layout.virtual_pipeline > 1 and pipeline > 1 else 1
    sharing = tensor * degrees.get("context", 1) * degrees.get("data", 1)
    return Layout(
        tensor=tensor,
        pipeline=pipeline,
        context=degrees.get("context", 1),
        data=degrees.get("data", 1),
        expert=2 if layout.expert > 1 and sharing > 1 else 1,
        virtual_pipeline=virtual,
        layers_per_stage=_small_stages(layout, pipeline * virtual),
        sequence=layout.sequence and tensor > 1,
    )


def _small_stages(layout: Layout, chunks: int) -> tuple[int, ...] | None:
    """The first and last stages' layers, and those between: small where they are smaller."""
    stages = layout.layers_per_stage
    if stages is None or chunks == 1:
        return None
    smallest = min(stages)
    inner = stages[len(stages) // 2]
    wanted = (stages[0], *([inner] * (chunks - 2)), stages[-1])
    return tuple(1 if count == smallest else LARGEST_LAYERS_OF_A_STAGE for count in wanted)


def _small_model(model: Architecture, layout: Layout) -> Architecture:
    own_head = model.head * model.attention_heads != model.hidden_size
    update: dict[str, object] = {
        **_small_layers(model, layout),
        "hidden_size": HEADS * HEAD_SIZE,
        "attention_heads": HEADS,
        "key_value_heads": _small_groups(model, layout),
        "head_size": OWN_HEAD_SIZE if own_head else None,
        "ffn_size": FFN_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
    }
    if model.family != "t5":  # which has spreads of its own
        update["initial_std"] = INITIAL_STD
    if model.experts:
        update["experts"] = EXPERTS if layout.expert > 1 else min(model.experts, EXPERTS)
        update["experts_per_token"] = min(model.experts_per_token, model.experts, EXPERTS - 1)
    return model.model_copy(update=update)


def _small_layers(model: Architecture, layout: Layout) -> dict[str, int | None]:
    chunks = layout.pipeline * layout.virtual_pipeline
    layers = sum(layout.layers_per_stage) if layout.layers_per_stage else max(2, chunks)
    if not model.decoders:
        return {"layers": layers, "decoder_layers": None}
    return {"layers": layers - layers // 2, "decoder_layers": layers // 2}


def _small_groups(model: Architecture, layout: Layout) -> int | None:
    """All heads, half of them, or one, as the model has it and the layout can split it."""
    if model.groups == model.attention_heads:
        return None
    return 1 if model.groups == 1 and layout.tensor == 1 else HEADS // 2
