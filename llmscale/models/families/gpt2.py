"""GPT-2's weights: stored as ``[inputs, outputs]``, query, key and value as one tensor."""

from llmscale.models.families.base import Rules
from llmscale.models.shards import Form, QueryKeyValue, Replicated, Split, Together, Transposed
from llmscale.models.weights import Weight


class Gpt2(Rules):
    """Hugging Face's names for GPT-2."""

    def outer(self, name: str) -> Weight:
        a = self.architecture
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return self.table("transformer.wte.weight")
        if name == "embedding.position_embeddings.weight":
            shape = (a.sequence_length, a.hidden_size)
            return self.replicated("transformer.wpe.weight", shape, a.initial_std)
        return self.norm("transformer.ln_f", name.rsplit(".", 1)[1])

    def layer(self, number: int, module: str, kind: str) -> Weight:
        a, prefix = self.architecture, f"transformer.h.{number}"
        attention = Together(QueryKeyValue(a.groups, a.head))
        row: Form = Replicated() if kind == "bias" else Split(1)
        hidden, std = a.hidden_size, a.initial_std
        match module:
            case "input_layernorm":
                return self.norm(f"{prefix}.ln_1", kind)
            case "pre_mlp_layernorm":
                return self.norm(f"{prefix}.ln_2", kind)
            case "self_attention.linear_qkv":
                name = f"{prefix}.attn.c_attn.{kind}"
                return _stored(name, kind, hidden, 3 * hidden, attention, std)
            case "self_attention.linear_proj":
                name = f"{prefix}.attn.c_proj.{kind}"
                return _stored(name, kind, hidden, hidden, row, self.output_std)
            case "mlp.linear_fc1":
                return _stored(f"{prefix}.mlp.c_fc.{kind}", kind, hidden, a.ffn, Split(0), std)
            case "mlp.linear_fc2":
                name = f"{prefix}.mlp.c_proj.{kind}"
                return _stored(name, kind, a.ffn, hidden, row, self.output_std)
        raise KeyError(f"no GPT-2 weight for {module}.{kind}")


def _stored(name: str, kind: str, inputs: int, outputs: int, form: Form, std: float) -> Weight:
    if kind == "bias":
        return Weight((name,), ((outputs,),), form, 0.0)
    return Weight((name,), ((inputs, outputs),), Transposed(form), std)
