"""How many parameters a rank of each pipeline stage holds."""

from dataclasses import dataclass

from llmscale.planning.setup import Setup


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank: of layers and of tables, and experts', which have fewer copies."""

    layers: float
    tables: float
    experts: float

    @property
    def total(self) -> float:
        """All."""
        return self.layers + self.tables + self.experts


def telling_stages(setup: Setup) -> tuple[int, ...]:
    """The stages among which the fullest is: the first and the last hold the vocabulary, and the
    second may have a layer more."""
    last = setup.pipeline - 1
    return tuple(sorted({0, min(1, last), last}))


def most_parameters(setup: Setup) -> StageParameters:
    """Of one rank of the stage that has the most."""
    found = (rank_parameters(setup, stage) for stage in telling_stages(setup))
    return max(found, key=lambda held: held.total)


def rank_parameters(setup: Setup, stage: int) -> StageParameters:
    """Of one rank of a stage.

    Norms and other small ones are counted as split among tensor ranks, too; they are below a
    thousandth. A tied embedding is on the first stage and, copied, on the last.
    """
    model, t, p = setup.architecture, setup.tensor, setup.pipeline
    layers = sum(setup.stage_layers[stage::p])
    attention, mlp = model.attention_parameters(), model.mlp_parameters()
    split = layers * (attention + 2 * model.hidden_size)
    experts = 0.0
    if model.experts:
        router = model.experts * model.hidden_size
        split += layers * router
        experts = layers * (mlp - router) / setup.expert
    else:
        split += layers * mlp
    if model.decoders:
        before = sum(sum(setup.stage_layers[s::p]) for s in range(stage))
        split += min(layers, max(0, before + layers - model.layers)) * attention
    return StageParameters(split / t, _table_parameters(setup, stage) / t, experts)


def _table_parameters(setup: Setup, stage: int) -> int:
    """Of the embedding, learned positions and the output layer, where a stage has them.

    A model that scores texts has a head in place of that layer, of a few thousand parameters.
    """
    model, last = setup.architecture, setup.pipeline - 1
    tables = 1 if last == 0 and model.tied else (stage == 0) + (stage == last)
    if model.scored:
        tables = int(stage == 0)
    found = tables * model.padded_vocabulary(setup.vocabulary, setup.tensor) * model.hidden_size
    if stage == 0 and model.traits.positions == "learned":
        found += model.sequence_length * model.hidden_size
    return found
