"""The kinds of stages. A new kind is one file here and one line below."""

from llmscale.stages.base import Stage
from llmscale.stages.compare import Compare
from llmscale.stages.dpo import Dpo
from llmscale.stages.evaluate import Evaluate
from llmscale.stages.finetune import Finetune
from llmscale.stages.ppo import Ppo
from llmscale.stages.prepare import Prepare
from llmscale.stages.pretrain import Pretrain
from llmscale.stages.quantize import Quantize
from llmscale.stages.reward import Reward
from llmscale.stages.tokenizer import Tokenizer

KINDS: dict[str, type[Stage]] = {
    "prepare": Prepare,
    "tokenizer": Tokenizer,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "reward": Reward,
    "dpo": Dpo,
    "ppo": Ppo,
    "quantize": Quantize,
    "compare": Compare,
    "evaluate": Evaluate,
}
