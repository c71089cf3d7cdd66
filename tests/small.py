"""The shipped quickstart made small enough for a test, by overrides."""

FEW_TEXTS = "stages.corpus.sources=[{path: 'texts/shakespeare/m[ae]*.txt'}]"
"""Four plays, a tenth of all: their tokens are made anew in most runs."""
SMALL_MODEL = [
    FEW_TEXTS,
    "stages.pretrain.model.layers=2",
    "stages.pretrain.model.hidden_size=32",
    "stages.pretrain.model.ffn_size=64",
    "stages.pretrain.model.sequence_length=32",
    "stages.pretrain.validation.samples=16",
]


def at(tensor: int, pipeline: int, data: int) -> list[str]:
    """The layout, and as many ranks on one node."""
    layout = f"{{tensor: {tensor}, pipeline: {pipeline}, data: {data}}}"
    return [
        f"cluster.ranks_per_node={tensor * pipeline * data}",
        f"stages.pretrain.parallel={layout}",
    ]
