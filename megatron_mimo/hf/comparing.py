"""Whether a model computes what the checkpoints of its parts were made for: at import, and again at export."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.build import maker
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf.blueprint import LANGUAGE_MODELS, PROJECTOR, TOWERS, Part
from megatron_mimo.hf.clip import layers_built
from megatron_mimo.hf.family import settings_of
from megatron_mimo.hf.llava import Projector
from megatron_mimo.hf.vision import Select, VisionTower

#: Fields of `TransformerConfig` that are the run's own choice: layout, precision, kernels, memory, graphs, training,
#: serving. Every other field is compared, those of Megatron's next release too.
OF_THE_RUN = frozenset(
    {
        # Initial weights, which are overwritten, and what training alone adds.
        "perform_initialization", "init_method", "output_layer_init_method", "init_method_std", "embedding_init_method",
        "embedding_init_method_std", "init_model_with_meta_device", "hidden_dropout", "attention_dropout",
        "calculate_per_token_loss", "log_max_attention_logit", "qk_clip", "qk_clip_alpha", "qk_clip_threshold",
        "mtp_num_layers", "mtp_loss_scaling_factor", "mtp_use_repeated_layer", "mtp_detach_heads",
        "mtp_hybrid_override_pattern", "mtp_standalone", "test_mode", "num_layers",
        # Numbers: the dtype of weights and what is computed in more.
        "fp16", "bf16", "params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast",
        "attention_softmax_in_fp32",
        "apply_query_key_layer_scaling", "fp32_residual_connection", "disable_bf16_reduced_precision_matmul",
        "fp8", "fp4", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
        "tp_only_amax_red", "activation_func_fp8_input_store", "quant_recipe", "disable_parameter_transpose_cache",
        # Kernels that compute the same.
        "attention_backend", "flash_attention_version", "flash_decode", "bias_activation_fusion",
        "masked_softmax_fusion", "persist_layer_norm", "memory_efficient_layer_norm", "bias_dropout_fusion",
        "apply_rope_fusion", "fused_single_qkv_rope", "fused_residual_rmsnorm", "use_fused_weighted_squared_relu",
        "use_transformer_engine_op_fuser", "use_te_activation_func", "use_te_rng_tracker", "inference_rng_tracker",
        "gradient_accumulation_fusion", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "transformer_impl",
        "use_kitchen", "use_kitchen_attention", "kitchen_attention_backend", "batch_invariant_mode",
        "deterministic_mode", "use_grouped_gemm_for_dense_mlp", "use_grouped_gemm_for_shared_expert",
        "clone_scatter_output_in_embedding", "mlp_chunks_for_prefill", "mlp_chunks_for_training",
        "use_inference_optimized_layers", "symmetric_ar_type", "nccl_all_reduce_for_prefill",
        # Layout, and when what is sent.
        "tensor_model_parallel_size", "tensor_parallel_num_weight_shards", "gtp_weight_remat_size",
        "pipeline_model_parallel_comm_backend", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
        "sequence_parallel", "context_parallel_size", "hierarchical_context_parallel_sizes",
        "max_seqlen_per_dp_cp_rank", "hybrid_context_parallel", "expert_model_parallel_size",
        "expert_tensor_parallel_size", "expert_tensor_parallel_num_weight_shards", "expert_gtp_weight_remat_size",
        "cp_comm_type",
        "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "variable_seq_lengths",
        "overlap_p2p_comm", "batch_p2p_comm", "batch_p2p_sync", "use_ring_exchange_p2p", "deallocate_pipeline_outputs",
        "defer_embedding_wgrad_compute", "wgrad_deferral_limit", "overlap_p2p_comm_warmup_flush",
        "microbatch_group_size_per_vp_stage", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute",
        "overlap_dispatch_backward_with_experts_wgrad", "ep_overlap_early_attn_memory_release",
        "high_priority_a2a_comm_stream", "barrier_with_L1_time", "timers", "config_logger_dir",
        "use_cpu_initialization", "hetereogenous_dist_checkpoint",
        # Functions of the loop.
        "finalize_model_grads_func", "grad_scale_func", "moe_grad_scale_func", "mtp_grad_scale_func", "no_sync_func",
        "grad_sync_func", "param_sync_func",
        # Memory.
        "num_microbatches_with_partial_activation_checkpoints", "recompute_granularity", "recompute_method",
        "recompute_num_layers", "distribute_saved_activations", "recompute_modules",
        "fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size",
        "delay_offload_until_cuda_graph",
        "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction",
        "fine_grained_offloading_max_inflight_offloads",
        # Graphs.
        "enable_cuda_graph", "external_cuda_graph",
        # Of other kinds of layers; `experimental_attention_variant`, `num_moe_experts`, `use_mup` are compared.
        "is_hybrid_model", "use_mamba_mem_eff_path", "experimental_attention_variant_loss_scale_func",
    }
)  # fmt: skip
#: And those whose names begin so, for one of the reasons above.
OF_THE_RUN_BY_PREFIX = (
    "fp8_", "fp4_", "tp_comm_", "cpu_offloading", "_cpu_offloading", "cuda_graph_", "inference_", "moe_", "mup_",
    "dsa_", "linear_", "mamba_",
)  # fmt: skip
#: Which Megatron derives where a checkpoint's settings leave them out.
_DERIVED = ("num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "hidden_size")
#: Settings of the language model beside its layers'.
_OF_MODEL = {
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling": False,
    "rope_scaling_factor": None,  # compared where there is scaling
    "seq_len_interpolation_factor": None,
    "share_embeddings_and_output_weights": False,
}


def compared(name: str) -> bool:
    """Whether a field of `TransformerConfig` changes what is computed."""
    return name not in OF_THE_RUN and not name.startswith(OF_THE_RUN_BY_PREFIX)


def unlike(config: MimoModelConfig, part: Part) -> list[str]:
    """One line for each setting in which a model differs from what a checkpoint of one of its parts was made with.

    Args:
        config: of the model.
        part: of the checkpoint. Of encoders and projections that are not the library's nothing is compared.
    """
    if part.path == "language_model":
        settings, _ = settings_of(LANGUAGE_MODELS[part.model_type], part.config)
        params = config.language_model.params
        layers = {**settings, "num_layers": part.config.num_hidden_layers}
        own = vars(config.language_config) | {"num_layers": _attention_layers(config)}
        return [
            *_layers(own, layers),
            *_model(config.language_model, params, settings),
            *_vocabulary(config, part.config.vocab_size),
        ]
    modality, kind, name = part.path.split("/")
    if modality not in config.modality_submodules:
        return []
    held: Any = config.submodule_specs(modality).get(kind) or {}
    spec = held.get(name) if isinstance(held, Mapping) else held[int(name)] if int(name) < len(held) else None
    if not isinstance(spec, ModuleSpec):
        return []
    if part.model_type == PROJECTOR:
        return list(_projector(spec, part)) if spec.module is Projector else []
    return list(_tower(spec, part)) if part.model_type in TOWERS else []


def states_of(config: MimoModelConfig, path: str) -> tuple[int | None, Select]:
    """Which states a model takes of the vision tower at `path`: `layer` and `select` as `read_tower` has them.

    Those that LLaVA takes, where its tower is no `VisionTower`.
    """
    modality, kind, name = path.split("/")
    parts: Any = config.submodule_specs(modality).get(kind) if modality in config.modality_submodules else None
    spec = parts.get(name) if isinstance(parts, Mapping) else None
    if not isinstance(spec, ModuleSpec) or spec.module is not VisionTower:
        return -2, "patch"
    params: Mapping[str, Any] = spec.params or {}
    layer = None if params.get("final_norm", True) else params["transformer_config"].num_layers
    return layer, params.get("select", "patch")


def vocabulary_of(config: MimoModelConfig) -> int:
    """Tokens of a model, padding for tensor-parallel ranks not among them."""
    params = config.language_model.params
    return params.get("vocabulary", params["vocab_size"])


def _attention_layers(config: MimoModelConfig) -> int:
    """Layers as `GPTModel` counts them: of a hybrid model those with attention."""
    pattern = config.language_model.params.get("hybrid_layer_pattern")
    return config.language_config.num_layers if pattern is None else str(pattern).count("*")


def _vocabulary(config: MimoModelConfig, tokens: int) -> Iterator[str]:
    if (own := vocabulary_of(config)) < tokens:
        yield f"setting: vocab_size is {own} in the model, expected at least {tokens}, the rows that the checkpoint has"


def _projector(spec: ModuleSpec, part: Part) -> Iterator[str]:
    own: Mapping[str, object] = spec.params or {}
    yield from _one("projector_hidden_act", own.get("activation", "gelu"), part.config.activation)
    yield from _one("multimodal_projector_bias", own.get("bias", True), part.config.bias)


def _tower(spec: ModuleSpec, part: Part) -> Iterator[str]:
    params: Mapping[str, Any] = spec.params or {}
    if "transformer_config" not in params:
        return
    settings, _ = settings_of(TOWERS[part.model_type], part.config)
    layers = {**settings, "num_layers": layers_built(part.config, part.layer)}
    yield from _layers(vars(params["transformer_config"]), layers)
    for name, setting in (("patch_dim", "patch_size"), ("img_h", "image_size"), ("img_w", "image_size")):
        if name in params:
            yield from _one(setting, params[name], settings[setting])
    if spec.module is VisionTower:
        yield from _one("select", params.get("select", "patch"), part.select)
        if part.model_type != "clip_vision_model":  # whose tower has none after its layers
            yield from _one("final_norm", params.get("final_norm", True), part.layer is None)


def _layers(own: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    yield from _one("num_layers", own["num_layers"], settings["num_layers"])
    for field in dataclasses.fields(TransformerConfig):
        if not compared(field.name):
            continue
        if field.name in settings:
            yield from _one(field.name, own[field.name], settings[field.name])
        elif field.default is not dataclasses.MISSING and field.name not in _DERIVED:
            yield from _one(field.name, own[field.name], field.default)


def _model(spec: ModuleSpec, params: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    defaults = {name: one.default for name, one in inspect.signature(maker(spec)).parameters.items()}
    for name, plain in _OF_MODEL.items():
        if name == "rope_scaling_factor" and not settings.get("rope_scaling"):
            continue
        yield from _one(name, params.get(name, defaults.get(name, plain)), settings.get(name, plain))


def _one(name: str, own: object, expected: object) -> Iterator[str]:
    if _comparable(own) != _comparable(expected):
        yield f"setting: {name} is {own!r} in the model, expected {expected!r}, as the checkpoint was made with"


def _comparable(value: object) -> object:
    if isinstance(value, partial):
        return value.func, value.args, tuple(sorted(value.keywords.items()))
    return tuple(value) if isinstance(value, list) else value
