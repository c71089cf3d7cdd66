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


def stage_parameters(setup: Setup) -> list[StageParameters]:
    """Of one rank of each stage.

    Norms and other small ones are counted as split among tensor ranks, too; they are below a
    thousandth. A tied embedding is on the first stage and, copied, on the last.
    """
    model, t, p = setup.architecture, setup.tensor, setup.pipeline
    norms = 2 * model.hidden_size
    attention, mlp = model.attention_parameters() + norms, model.mlp_parameters()
    router = (model.experts or 0) * model.hidden_size
    table = model.padded_vocabulary(setup.vocabulary, t) * model.hidden_size
    positions = 0
    if model.traits.positions == "learned":
        positions = model.sequence_length * model.hidden_size
    found = []
    for stage in range(p):
        layers = sum(setup.stage_layers[stage::p])
        tables = (stage == 0) + (stage == p - 1)
        if p == 1 and model.tied:
            tables = 1
        outer = tables * table + (stage == 0) * positions
        shared = layers * attention
        if model.decoders:
            before = sum(sum(setup.stage_layers[s::p]) for s in range(stage))
            decoders = min(layers, max(0, before + layers - model.layers))
            shared += decoders * attention
        experts = 0.0
        if model.experts:
            shared += layers * router
            experts = layers * (mlp - router) / setup.expert
        else:
            shared += layers * mlp
        found.append(StageParameters(shared / t, outer / t, experts))
    return found
