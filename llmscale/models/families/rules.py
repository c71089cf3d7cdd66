"""Which rules a family's weights follow."""

from llmscale.models.architecture import Architecture
from llmscale.models.families.base import Rules
from llmscale.models.families.bert import Bert
from llmscale.models.families.gpt2 import Gpt2
from llmscale.models.families.llama import Llama
from llmscale.models.families.t5 import T5

FAMILIES: dict[str, type[Rules]] = {
    "llama": Llama,
    "qwen2": Llama,
    "qwen3": Llama,
    "mixtral": Llama,
    "gpt2": Gpt2,
    "bert": Bert,
    "t5": T5,
}


def weight_rules(architecture: Architecture, vocabulary: int, tensor_ranks: int) -> Rules:
    """The rules for an architecture whose parameters are split over tensor-parallel ranks."""
    padded = architecture.padded_vocabulary(vocabulary, tensor_ranks)
    return FAMILIES[architecture.family](architecture, vocabulary, padded)
