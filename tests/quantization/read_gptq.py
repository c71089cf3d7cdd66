"""Loads a folder of GPTQ's layout through Transformers, and writes what it holds.

    python read_gptq.py FOLDER OUT

Needs optimum and gptqmodel, which are in a folder of their own: they ask for another torch.
"""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig

folder, out = sys.argv[1:]
plain = GPTQConfig(bits=4, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, quantization_config=plain
)
tensors = {
    f"{name}.weight": module.dequantize_weight().T.contiguous()
    for name, module in model.named_modules()
    if hasattr(module, "dequantize_weight")
}
with torch.no_grad():
    logits_1sv = model(torch.arange(5, 25)[None]).logits
assert model.generate(torch.arange(5, 10)[None], max_new_tokens=4).shape[1] > 5
save_file({**tensors, "logits": logits_1sv}, out)
