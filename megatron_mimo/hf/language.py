"""The spec of a language model with a checkpoint's settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo import specs
from megatron_mimo.hf.shares import check_tensor_size

#: Settings that are the model's own, not its layers'.
_OF_MODEL = (
    "vocab_size", "max_sequence_length", "share_embeddings_and_output_weights", "rotary_base", "rope_scaling",
    "rope_scaling_factor", "seq_len_interpolation_factor", "position_embedding_type",
)  # fmt: skip


class PaddedGPTModel(GPTModel):
    """`GPTModel` whose vocabulary is padded, so that tensor-parallel ranks have equal parts of it.

    The logits of padding are the smallest number there is: no loss and no sampling sees them.

    Args:
        vocabulary: tokens that there are; `vocab_size` counts padding too.
        options: as `GPTModel` takes them.
    """

    def __init__(self, config: TransformerConfig, *, vocabulary: int, **options) -> None:
        super().__init__(config, **options)
        self.vocabulary = vocabulary
        if self.post_process:
            local = self.output_layer.output_size_per_partition
            first = self.pg_collection.tp.rank() * local
            self._tokens = max(0, min(local, vocabulary - first))
            self.output_layer.register_forward_hook(self._hide_padding)

    def _hide_padding(self, module: nn.Module, inputs: object, output: tuple[Tensor, Tensor | None]):
        logits, bias = output
        # Or all of them, gathered over the tensor-parallel ranks.
        tokens = self._tokens if logits.shape[-1] == module.output_size_per_partition else self.vocabulary
        padding = torch.arange(logits.shape[-1], device=logits.device) >= tokens
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min), bias


def language_spec(
    settings: Mapping[str, object],
    *,
    dtype: torch.dtype,
    sizes: Mapping[str, int | None],
    backend: specs.Backend = "auto",
    changes: Mapping[str, object] | None = None,
) -> ModuleSpec:
    """The spec of a `GPTModel` with a family's settings on a layout.

    Args:
        settings: of `hf.family.settings_of`.
        dtype: of the weights.
        sizes: of the layout, as `TransformerConfig` names them.
        backend: what the layers compute with.
        changes: to the `TransformerConfig`, such as `sequence_parallel` or recomputation.

    Raises:
        ValueError: a tensor-parallel size that does not share its layers out, or what `TransformerConfig` refuses.
    """
    check_tensor_size(sizes.get("tensor_model_parallel_size") or 1, "the language model", settings)
    own = {name: settings[name] for name in _OF_MODEL if name in settings}
    layers = {name: value for name, value in settings.items() if name not in _OF_MODEL}
    if "num_moe_experts" not in settings:  # ranks that share out experts elsewhere are data-parallel ones here
        sizes = {**sizes, "expert_model_parallel_size": 1}
    config = TransformerConfig(
        **(
            layers
            | precision(dtype)
            | _COMMON
            | _kernels(layers, backend, changes or {})
            | dict(sizes)
            | _schedule(sizes, dtype)
            | dict(changes or {})
        )
    )
    vocabulary, tensor = int(str(own["vocab_size"])), config.tensor_model_parallel_size
    padded = -(-vocabulary // tensor) * tensor
    own |= {
        "config": config,
        "transformer_layer_spec": partial(specs.language_layer_spec, backend=backend),
        "position_embedding_type": own.get("position_embedding_type", "rope"),
        "vocab_size": padded,
    }
    if padded == vocabulary:
        return ModuleSpec(module=GPTModel, params=own)
    return ModuleSpec(module=PaddedGPTModel, params=own | {"vocabulary": vocabulary})


def precision(dtype: torch.dtype) -> dict[str, object]:
    """`TransformerConfig`'s fields for weights of a dtype."""
    return {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}


_COMMON = {"hidden_dropout": 0.0, "bias_dropout_fusion": False, "calculate_per_token_loss": True}


def gated_silu(settings: Mapping[str, object]) -> bool:
    """Whether fields of a `TransformerConfig` ask for the activation that Megatron has one kernel for."""
    return bool(settings.get("gated_linear_unit")) and settings.get("activation_func") is F.silu


def _kernels(layers: Mapping[str, object], backend: specs.Backend, changes: Mapping[str, object]) -> dict[str, object]:
    """What TransformerEngine and Megatron have one kernel for, on a GPU: rotary angles, gated SiLU."""
    if not torch.cuda.is_available() or specs.choose_backend(backend) != "transformer_engine":
        return {}
    found: dict[str, object] = {"apply_rope_fusion": True}
    if gated_silu(layers) and not changes.get("use_te_activation_func"):  # Megatron has one or the other
        found["bias_activation_fusion"] = True
    return found


def _schedule(sizes: Mapping[str, int | None], dtype: torch.dtype) -> dict[str, object]:
    found: dict[str, object] = {}
    if (sizes.get("pipeline_model_parallel_size") or 1) > 1:
        found["pipeline_dtype"] = dtype
    if sizes.get("virtual_pipeline_model_parallel_size"):  # what two stages need and more can do
        found |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return found
