"""Layer specs for Megatron models on TransformerEngine, Apex or plain torch.

Megatron-Core's own specs choose a norm when they are imported: TransformerEngine's or Apex's where installed, otherwise
a wrapper of torch's that refuses sequence parallelism. The specs here are Megatron's, with the norm of the backend that
was asked for in every place, the final norm included.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM, FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.vision import vit_layer_specs
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.attention import FusedAttention
from megatron_mimo.cached_attention import CachedAttention
from megatron_mimo.compat.hybrid import StackWithNorm, stack_layers
from megatron_mimo.compat.megatron import norms_chosen_at_import
from megatron_mimo.packed_rotary import PackedSelfAttention
from megatron_mimo.segments import SegmentAttention, stays_plain

__all__ = [
    "Backend",
    "TorchNorm",
    "choose_backend",
    "clip_vit_spec",
    "core_attention",
    "hybrid_stack_spec",
    "language_layer_spec",
    "norm",
    "projection_spec",
    "vision_layer_spec",
    "with_fused_attention",
]

Backend = Literal["auto", "transformer_engine", "apex", "torch"]


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dim in plain torch, as ``config.normalization`` says.

    Under sequence parallelism each tensor-parallel rank normalises its part of the sequence, so the gradients of the
    weights are partial. The parameters say so in their ``sequence_parallel`` attribute, Megatron's mark for parameters
    whose gradients ``finalize_model_grads`` sums over the tensor-parallel group.

    Args:
        config: gives the normalisation, ``params_dtype``, sequence parallelism and a gamma centred on zero.
        hidden_size: size of the last dim.
        eps: added to the variance.

    Raises:
        ValueError: another normalisation, or a fused kernel is asked for that plain torch does not have.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(
                f"TorchNorm: expected normalization 'LayerNorm' or 'RMSNorm', found {config.normalization!r}. "
                "Set TransformerConfig.normalization."
            )
        for fused in ("persist_layer_norm", "memory_efficient_layer_norm"):
            if getattr(config, fused):
                raise ValueError(
                    f"TorchNorm: {fused} is a fused kernel of Apex or TransformerEngine. Set "
                    f"TransformerConfig.{fused}=False, or install one of them and choose its backend."
                )
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        first = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(first(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives `x [..., hidden_size]` normalised, in its own dtype."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.bias is None:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        return torch.nn.functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)


def choose_backend(backend: Backend = "auto") -> Backend:
    """The backend to build layers with: `backend` itself, or for ``"auto"`` the fastest one that works here.

    Raises:
        ValueError: `backend` is unknown or not installed.

    Example:
        >>> choose_backend("torch")
        'torch'
    """
    if backend not in ("auto", "transformer_engine", "apex", "torch"):
        raise ValueError(f"backend: expected 'auto', 'transformer_engine', 'apex' or 'torch', found {backend!r}.")
    installed: dict[Backend, bool] = {"transformer_engine": HAVE_TE, "apex": HAVE_FUSED_LAYER_NORM, "torch": True}
    if backend == "auto":
        # Both extensions compute on a GPU only.
        if not torch.cuda.is_available():
            return "torch"
        return next(name for name, present in installed.items() if present)
    if not installed[backend]:
        raise ValueError(
            f"backend: {backend!r} cannot be imported here. Install it (the README says how), or pass 'auto' or "
            "'torch'."
        )
    return backend


def norm(backend: Backend = "auto", normalization: str = "LayerNorm") -> type:
    """The norm class of a backend, built as ``cls(config=..., hidden_size=..., eps=...)``.

    Apex has no RMSNorm; plain torch's takes its place.

    Raises:
        ValueError: `backend` is unknown or not installed.

    Example:
        >>> norm("torch").__name__
        'TorchNorm'
    """
    backend = choose_backend(backend)
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if backend == "apex" and normalization == "LayerNorm":
        return FusedLayerNorm
    return TorchNorm


def core_attention(backend: Backend = "auto", config: TransformerConfig | None = None, *, cached: bool = False) -> type:
    """The module between queries, keys and values and what attention gives, in every language layer of a backend.

    `generation.borrow` takes the `cached` one, which is one for all backends. In float32, which TransformerEngine's
    kernels for packed samples lack, it is the plain-torch one but under context parallelism.

    Raises:
        ValueError: `backend` is unknown or not installed.

    Example:
        >>> core_attention("torch").__name__
        'SegmentAttention'
    """
    if cached:
        return CachedAttention
    if choose_backend(backend) == "transformer_engine" and (config is None or not stays_plain(config)):
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return SegmentAttention


def language_layer_spec(
    config: TransformerConfig,
    backend: Backend = "auto",
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> ModuleSpec:
    """The layers of a language model, to pass as ``GPTModel(transformer_layer_spec=...)``; causal attention.

    Dense layers, or experts where ``config.num_moe_experts`` and ``config.moe_layer_freq`` ask for them; queries and
    keys are normalised where ``config.qk_layernorm`` says so. The spec describes the layers of one pipeline stage, so
    under pipeline parallelism it is built on each rank, and once per model chunk under an interleaved schedule.

    Args:
        config: the language model's configuration.
        backend: what the layers compute with.
        vp_stage: the model chunk, under virtual pipeline parallelism.
        pp_rank: the pipeline stage; None: this rank's, from Megatron's parallel state.

    Raises:
        ValueError: `backend` is unknown or not installed.

    Example:
        >>> config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
        >>> len(language_layer_spec(config, backend="torch").submodules.layer_specs)
        2
    """
    backend = choose_backend(backend)
    if pp_rank is None and config.pipeline_model_parallel_size == 1:
        pp_rank = 0
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=backend == "transformer_engine",
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return ModuleSpec(module=TransformerBlock, submodules=_of_backend(block, backend, config))


def hybrid_stack_spec(config: TransformerConfig, backend: Backend = "auto") -> ModuleSpec:
    """The layers of Megatron's `HybridModel`, to pass as ``HybridModel(hybrid_stack_spec=...)``; causal attention.

    The model's ``hybrid_layer_pattern`` says in which order they come: ``*`` attention, ``-`` MLP, ``E`` experts.
    Unlike `language_layer_spec` it is the same on every pipeline stage.

    Args:
        config: the language model's configuration; ``num_moe_experts`` for experts, ``qk_layernorm`` for normalised
            queries and keys.
        backend: what the layers compute with.

    Raises:
        ValueError: `backend` is unknown or not installed, or `config` asks for multi-latent attention.

    Example:
        >>> config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
        >>> hybrid_stack_spec(config, backend="torch").submodules.mlp_layer.module.__name__
        'MLPLayer'
    """
    backend = choose_backend(backend)
    if config.multi_latent_attention:
        raise ValueError(
            "hybrid_stack_spec: expected multi_latent_attention=False, found True. Set it to False, or use GPTModel "
            "with language_layer_spec."
        )
    return ModuleSpec(
        module=StackWithNorm,
        params={"norm": norm(backend, config.normalization)},
        submodules=_of_backend(stack_layers(config, backend == "transformer_engine"), backend, config),
    )


def vision_layer_spec(config: TransformerConfig, backend: Backend = "auto") -> ModuleSpec:
    """The layers of a vision encoder, to pass as its ``transformer_layer_spec``; every patch attends to every other.

    Args:
        config: the encoder's configuration, not split over pipeline stages.
        backend: what the layers compute with.

    Raises:
        ValueError: `backend` is unknown or not installed.

    Example:
        >>> config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
        >>> len(vision_layer_spec(config, backend="torch").submodules.layer_specs)
        2
    """
    backend = choose_backend(backend)
    if backend == "transformer_engine":
        layer = vit_layer_specs.get_vit_layer_with_transformer_engine_spec()
    else:
        layer = vit_layer_specs.get_vit_layer_with_local_spec()
    chosen = norm(backend, config.normalization)
    block = TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=chosen)
    return ModuleSpec(module=TransformerBlock, submodules=_with_norm(block, chosen))


def projection_spec(config: TransformerConfig, backend: Backend = "auto") -> ModuleSpec:
    """A two-layer perceptron; its ``.submodules`` are those that ``MultimodalProjector`` takes.

    Args:
        config: the projection's configuration.
        backend: what it computes with.

    Raises:
        ValueError: `backend` is unknown or not installed, or `config` asks another one for TransformerEngine's
            activation function.

    Example:
        >>> config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=1)
        >>> projection_spec(config, "torch").submodules.linear_fc1.__name__
        'ColumnParallelLinear'
    """
    backend = choose_backend(backend)
    if backend == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        engine = TESpecProvider()
        submodules = MLPSubmodules(
            linear_fc1=engine.column_parallel_linear(),
            linear_fc2=engine.row_parallel_linear(),
            activation_func=engine.activation_func() if config.use_te_activation_func else None,
        )
    elif config.use_te_activation_func:
        raise ValueError(
            f"projection_spec: use_te_activation_func=True needs backend 'transformer_engine', found {backend!r}. "
            "Set TransformerConfig.use_te_activation_func=False, or choose that backend."
        )
    else:
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=MLP, submodules=submodules)


def clip_vit_spec(
    config: TransformerConfig,
    backend: Backend = "auto",
    *,
    patch_dim: int = 14,
    img_h: int = 336,
    img_w: int = 336,
    add_class_token: bool = True,
    class_token_len: int = 1,
    model_subtype: str = "clip",
    pg_collection: ProcessGroupCollection | None = None,
) -> ModuleSpec:
    """Megatron's ``CLIPViTModel`` with layers and norms of one backend, to use as an encoder.

    Args:
        config: the encoder's configuration.
        backend: what it computes with.
        patch_dim: side of a patch; it divides `img_h` and `img_w`.
        img_h: height of the images.
        img_w: width of the images.
        add_class_token: whether class tokens precede the patches.
        class_token_len: how many.
        model_subtype: ``"clip"``, ``"siglip"``, ``"internvit"`` or ``"internvit300M"``.
        pg_collection: the groups of the encoder; None: Megatron's global ones.

    Raises:
        ValueError: `backend` is unknown or not installed, or `config` asks for sequence parallelism, for which
            ``CLIPViTModel`` does not cut its patches.

    Example:
        >>> config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
        >>> clip_vit_spec(config, backend="torch", patch_dim=4, img_h=8, img_w=8).params["img_h"]
        8
    """
    if config.sequence_parallel:
        raise ValueError(
            "clip_vit_spec: CLIPViTModel feeds every patch to every rank, found sequence_parallel=True. Give the "
            "encoder a configuration of its own with sequence_parallel=False; the language model may keep it."
        )
    chosen = norm(backend, config.normalization)
    return ModuleSpec(
        module=CLIPViTModel,
        params={
            "transformer_config": config,
            "transformer_layer_spec": vision_layer_spec(config, backend),
            "ln_pre_impl": chosen,
            "ln_post_impl": chosen,
            "add_class_token": add_class_token,
            "class_token_len": class_token_len,
            "patch_dim": patch_dim,
            "img_h": img_h,
            "img_w": img_w,
            "model_subtype": model_subtype,
            "pg_collection": pg_collection,
        },
    )


def _of_backend(node: Any, backend: Backend, config: TransformerConfig) -> Any:
    """`node`, the specs of a language model's layers, with the backend's norm and attention in their places."""
    attention = core_attention(backend, config)

    def attend(part: Any) -> Any:
        if isinstance(part, ModuleSpec) and part.module is SelfAttention:
            return replace(part, module=PackedSelfAttention)
        return replace(part, core_attention=attention) if isinstance(part, SelfAttentionSubmodules) else part

    return _each(_with_norm(node, norm(backend, config.normalization)), attend)


def with_fused_attention(layers: ModuleSpec) -> ModuleSpec:
    """Plain-torch layers with torch's fused attention, which CUDA graphs can replay; `layers` stay as they are.

    Args:
        layers: of a transformer block, such as `vision_layer_spec(config, "torch")`.

    Example:
        >>> config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
        >>> layers = with_fused_attention(vision_layer_spec(config, "torch"))
        >>> layers.submodules.layer_specs[0].submodules.self_attention.submodules.core_attention.__name__
        'FusedAttention'
    """
    changed = copy.deepcopy(layers)
    for layer in changed.submodules.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = FusedAttention
    return changed


def _with_norm(node: Any, chosen: type) -> Any:
    """`node`, a tree of specs, with `chosen` wherever Megatron put the norm that it found at import."""
    found = norms_chosen_at_import()
    return _each(node, lambda part: chosen if part in found else part)


def _each(node: Any, change: Callable[[Any], Any]) -> Any:
    """`node`, a tree of specs, with `change` applied to every part, children first."""
    if isinstance(node, list):
        node = [_each(item, change) for item in node]
    elif is_dataclass(node) and not isinstance(node, type):
        node = replace(node, **{field.name: _each(getattr(node, field.name), change) for field in fields(node)})
    return change(node)
