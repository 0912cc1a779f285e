"""Qwen 2 and 2.5: Llama's layers with biases in queries, keys and values; some layers may see a window."""

from megatron_mimo.hf import llama
from megatron_mimo.hf.family import Family, Field, layer_types

#: `layer_types` says what the three others mean together.
WINDOWS: dict[str, Field] = {
    "layer_types": layer_types,
    "use_sliding_window": None,
    "sliding_window": None,
    "max_window_layers": None,
}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=llama.FIELDS | WINDOWS,
    table=lambda c: llama.language_table(c, [*llama.layer(c), llama.qkv_bias(c)]),
    constants=llama.CONSTANTS | {"add_qkv_bias": True},
)
