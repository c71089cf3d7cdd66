"""BERT's weights, with its head for masked tokens."""

from llmscale.models.architecture import TOKEN_TYPES
from llmscale.models.families.base import Rules
from llmscale.models.shards import Replicated, Vocabulary
from llmscale.models.weights import Weight


class Bert(Rules):
    """Hugging Face's names for ``BertForMaskedLM``."""

    @property
    def output_std(self) -> float:
        """All matrices begin with the same spread."""
        return self.architecture.initial_std

    def outer(self, name: str) -> Weight:
        a, embeddings, head = self.architecture, "bert.embeddings", "cls.predictions"
        module, kind = name.rsplit(".", 1)
        match module:
            case "embedding.word_embeddings":
                return self.table(f"{embeddings}.word_embeddings.weight")
            case "embedding.position_embeddings":
                shape = (a.sequence_length, a.hidden_size)
                name = f"{embeddings}.position_embeddings.weight"
                return self.replicated(name, shape, a.initial_std)
            case "embedding_end":
                shape = (TOKEN_TYPES, a.hidden_size)
                name = f"{embeddings}.token_type_embeddings.weight"
                return self.replicated(name, shape, a.initial_std)
            case "embedding_end.layernorm":
                return self.norm(f"{embeddings}.LayerNorm", kind)
            case "decoder.final_layernorm.dense":
                names, size = (f"{head}.transform.dense.{kind}",), a.hidden_size
                return self.linear(names, kind, (size,), size, Replicated())
            case "decoder.final_layernorm.layernorm":
                return self.norm(f"{head}.transform.LayerNorm", kind)
            case "output_layer" if kind == "weight":
                return self.table(f"{embeddings}.word_embeddings.weight")
            case "output_layer":
                form = Vocabulary(self.vocabulary, self.padded)
                return Weight((f"{head}.bias",), ((self.vocabulary,),), form, 0.0)
        raise KeyError(f"no BERT weight for {name}")

    def layer(self, number: int, module: str, kind: str) -> Weight:
        a, prefix = self.architecture, f"bert.encoder.layer.{number}"
        attention, hidden = f"{prefix}.attention", a.hidden_size
        match module:
            case "self_attention.linear_qkv":
                query, key, value = (
                    f"{attention}.self.{part}" for part in ("query", "key", "value")
                )
                return self.query_key_value((query, key, value), kind)
            case "self_attention.linear_proj":
                return self.rows(f"{attention}.output.dense", kind, hidden, hidden)
            case "post_attention_layernorm":
                return self.norm(f"{attention}.output.LayerNorm", kind)
            case "mlp.linear_fc1":
                return self.columns(f"{prefix}.intermediate.dense", kind, a.ffn, hidden)
            case "mlp.linear_fc2":
                return self.rows(f"{prefix}.output.dense", kind, hidden, a.ffn)
            case "post_mlp_layernorm":
                return self.norm(f"{prefix}.output.LayerNorm", kind)
        raise KeyError(f"no BERT weight for {module}.{kind}")
