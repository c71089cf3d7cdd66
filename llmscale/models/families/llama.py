"""Llama's weights, and those of Qwen2, Qwen3 and Mixtral, which are named alike."""

from llmscale.models.families.base import Rules
from llmscale.models.weights import Weight

EXPERTS = "mlp.experts.local_experts."


class Llama(Rules):
    """Hugging Face's names for a decoder with rotary positions."""

    def outer(self, name: str) -> Weight:
        embedding = "model.embed_tokens.weight"
        match name:
            case "embedding.word_embeddings.weight":
                return self.table(embedding)
            case "output_layer.weight":
                return self.table(embedding if self.architecture.tied else "lm_head.weight")
            case "decoder.final_layernorm.weight":
                return self.norm("model.norm", "weight")
        raise KeyError(f"no Llama weight for {name}")

    def layer(self, number: int, module: str, kind: str) -> Weight:
        a, prefix = self.architecture, f"model.layers.{number}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        queries, hidden = a.attention_heads * a.head, a.hidden_size
        if module.startswith(EXPERTS):
            expert, part = module.removeprefix(EXPERTS).split(".")
            return self._expert(f"{prefix}.block_sparse_moe.experts.{expert}", part, kind)
        match module:
            case "input_layernorm":
                return self.norm(f"{prefix}.input_layernorm", kind)
            case "pre_mlp_layernorm":
                return self.norm(f"{prefix}.post_attention_layernorm", kind)
            case "self_attention.q_layernorm":
                return self.norm(f"{attention}.q_norm", kind, a.head)
            case "self_attention.k_layernorm":
                return self.norm(f"{attention}.k_norm", kind, a.head)
            case "self_attention.linear_qkv":
                names = f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"
                return self.query_key_value(names, kind)
            case "self_attention.linear_proj":
                return self.rows(f"{attention}.o_proj", kind, hidden, queries)
            case "mlp.linear_fc1":
                return self.gate_and_up((f"{mlp}.gate_proj", f"{mlp}.up_proj"), kind, a.ffn, hidden)
            case "mlp.linear_fc2":
                return self.rows(f"{mlp}.down_proj", kind, hidden, a.ffn)
            case "mlp.router":
                name, shape = f"{prefix}.block_sparse_moe.gate.weight", (a.experts or 0, hidden)
                return self.replicated(name, shape, a.initial_std)
        raise KeyError(f"no Llama weight for {module}.{kind}")

    def _expert(self, prefix: str, part: str, kind: str) -> Weight:
        a = self.architecture
        if part == "linear_fc1":
            return self.gate_and_up((f"{prefix}.w1", f"{prefix}.w3"), kind, a.ffn, a.hidden_size)
        return self.rows(f"{prefix}.w2", kind, a.hidden_size, a.ffn)
