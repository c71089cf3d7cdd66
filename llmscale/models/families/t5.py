"""T5's weights, in both its versions, and the spreads they begin with."""

from llmscale.models.families.base import Rules
from llmscale.models.shards import QueryKeyValue, Split
from llmscale.models.weights import Weight

BIASES = {"encoder_bias.weight": "encoder", "decoder_bias.weight": "decoder"}


class T5(Rules):
    """Hugging Face's names for T5; its layers count those of the encoder first.

    Scores are not divided by the root of the head's size; queries begin that much smaller
    instead, and other spreads are the root of one over a layer's inputs (as in Mesh
    TensorFlow, with which Raffel et al. 2020 trained, and in transformers).
    """

    def outer(self, name: str) -> Weight:
        a = self.architecture
        if name in BIASES:
            bias = f"{BIASES[name]}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            shape = (a.relative_buckets, a.attention_heads)
            return Weight((bias,), (shape,), Split(1), a.hidden_size**-0.5)
        if name == "output_layer.weight" and not a.tied:
            return self.table("lm_head.weight", a.hidden_size**-0.5)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            return self.table("shared.weight", 1.0)
        if name == "decoder.final_layernorm.weight":
            return self.norm("decoder.final_layer_norm", "weight")
        raise KeyError(f"no T5 weight for {name}")

    def layer(self, number: int, module: str, kind: str) -> Weight:
        a = self.architecture
        decoding = number >= a.layers
        stack, number = ("decoder", number - a.layers) if decoding else ("encoder", number)
        prefix = f"{stack}.block.{number}.layer"
        mlp = f"{prefix}.{2 if decoding else 1}"
        match module:
            case "input_layernorm":
                return self.norm(f"{prefix}.0.layer_norm", kind)
            case "pre_cross_attn_layernorm":
                return self.norm(f"{prefix}.1.layer_norm", kind)
            case "pre_mlp_layernorm":
                return self.norm(f"{mlp}.layer_norm", kind)
            case "final_layernorm":
                return self.norm("encoder.final_layer_norm", kind)
        if module.startswith("mlp."):
            return self._mlp(f"{mlp}.DenseReluDense", module, kind)
        kinds = {"self_attention": "0.SelfAttention", "cross_attention": "1.EncDecAttention"}
        attention, part = module.split(".")
        return self._attention(f"{prefix}.{kinds[attention]}", part, kind)

    def _attention(self, prefix: str, part: str, kind: str) -> Weight:
        a = self.architecture
        width, hidden = a.attention_heads * a.head, a.hidden_size
        stds = {"q": (hidden * a.head) ** -0.5, "k": hidden**-0.5, "v": hidden**-0.5}
        if part == "linear_proj":
            return self.rows(f"{prefix}.o", kind, hidden, width, width**-0.5)
        letters = {"linear_qkv": "qkv", "linear_q": "q", "linear_kv": "kv"}[part]
        return Weight(
            tuple(f"{prefix}.{letter}.{kind}" for letter in letters),
            tuple((width, hidden) for _ in letters),
            Split(0) if letters == "q" else QueryKeyValue(a.groups, a.head),
            tuple(stds[letter] for letter in letters),
        )

    def _mlp(self, prefix: str, module: str, kind: str) -> Weight:
        a = self.architecture
        if module == "mlp.linear_fc2":
            return self.rows(f"{prefix}.wo", kind, a.hidden_size, a.ffn, a.ffn**-0.5)
        std = a.hidden_size**-0.5
        if a.gated_ffn:
            names = f"{prefix}.wi_0", f"{prefix}.wi_1"
            return self.gate_and_up(names, kind, a.ffn, a.hidden_size, std)
        return self.columns(f"{prefix}.wi", kind, a.ffn, a.hidden_size, std)
