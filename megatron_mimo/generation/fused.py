"""One new position a row through dense layers, in few kernels: what `torch.compile` is given of a decode step.

Megatron's layers run some 35 kernels each for one position. Here a layer is two functions of tensors alone, up to its
attention's and up to its MLP's output projection, whose norm, rotation, cache write, activation and residual are left
for the compiler to fuse. Between them lies the sum over tensor-parallel ranks. Layers of another kind run as modules.

Shapes: `B` rows of the cache, `H` hidden width, `D` width of a head, `L` slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mimo.cached_attention import CachedAttention, Step
from megatron_mimo.compat.torch import has_output_hooks
from megatron_mimo.generation.borrow import RotaryAt
from megatron_mimo.packed_rotary import PackedSelfAttention


class Norm(NamedTuple):
    """A norm as tensors; `rms` tells RMSNorm from LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Attend(NamedTuple):
    """An attention as tensors and numbers."""

    norm: Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Norm | None
    key_norm: Norm | None
    projection: Tensor
    groups: int
    scale: float
    rotates: bool


class Feed(NamedTuple):
    """An MLP as tensors and functions."""

    norm: Norm
    first: Tensor
    first_bias: Tensor | None
    second: Tensor
    gated: bool
    activation: Callable[[Tensor], Tensor]


def attend(
    x: Tensor, added: Tensor, bias: Tensor | None, parts: Attend, turned: tuple[Tensor, Tensor] | None,
    keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, hidden: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual stream, and what attention adds to it before its sum over tensor-parallel ranks and its bias.

    Args:
        x: `[B, H]`; `added` and its `bias` join it first.
        parts: of the attention.
        turned: cosines and sines `[B, 1, d]` of the positions; None where nothing rotates.
        keys, values: `[rows, groups, L, D]`, in which the new position is kept at `slots` `[B]` of `rows` `[B]`.
        hidden: `[B, 1, 1, reach]`, 0 where a slot is seen and the least number elsewhere.
    """
    x = x + (added if bias is None else added + bias)
    mixed = F.linear(parts.norm(x), parts.qkv, parts.qkv_bias).view(len(x), parts.groups, -1, keys.shape[-1])
    query, key, value = mixed[:, :, :-2], mixed[:, :, -2], mixed[:, :, -1]
    query = query if parts.query_norm is None else parts.query_norm(query)
    key = key if parts.key_norm is None else parts.key_norm(key)
    if parts.rotates and turned is not None:
        cosines, sines = turned
        query = _turn(query, cosines[:, :, None], sines[:, :, None])
        key = _turn(key, cosines, sines)
    keys[rows, :, slots] = key
    values[rows, :, slots] = value
    reach = hidden.shape[-1]
    scores = (query @ keys[:, :, :reach].transpose(2, 3)).float() * parts.scale + hidden
    found = scores.softmax(dim=-1).to(value.dtype) @ values[:, :, :reach]
    return x, F.linear(found.flatten(1), parts.projection)


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    width = cosines.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosines + torch.cat([-second, first], dim=-1) * sines
    return turned if not rest.shape[-1] else torch.cat([turned, rest], dim=-1)


def feed(x: Tensor, added: Tensor, bias: Tensor | None, parts: Feed) -> tuple[Tensor, Tensor]:
    """The residual stream, and what the MLP adds to it before its sum over tensor-parallel ranks and its bias."""
    x = x + (added if bias is None else added + bias)
    wide = F.linear(parts.norm(x), parts.first, parts.first_bias)
    if parts.gated:
        gate, wide = wide.chunk(2, dim=-1)
        wide = parts.activation(gate) * wide
    else:
        wide = parts.activation(wide)
    return x, F.linear(wide, parts.second)


@dataclass(frozen=True)
class _Layer:
    attention: Attend
    attention_bias: Tensor | None
    mlp: Feed
    mlp_bias: Tensor | None
    cache: CachedAttention


class FusedLayers:
    """A transformer stack's layers for one new position of every row of the cache.

    Args:
        language: a borrowed language model, this rank's part, that `why_not` has nothing against.
        compiled: whether `torch.compile` makes kernels of the two functions, or its backend. Layers share them.
    """

    def __init__(self, language: Any, compiled: bool | str) -> None:
        stack = language.decoder
        self._language, self._group = language, language.pg_collection.tp
        self._layers = [_layer(layer) for layer in stack.layers]
        final = getattr(stack, "final_layernorm", None)
        self._final = None if final is None else _norm(final, language.config)
        self._compiled = compiled
        self._attends: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._feed = self._made(feed)

    def _made(self, function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        """The function compiled, where it is to be, as one of its own.

        The compiler counts what it compiles by code, and stops at 8: other models, batches and lengths in the process
        would use up what a shared one has.
        """
        if not self._compiled:
            return function
        plain = cast(FunctionType, function)
        own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
        options: dict[str, Any] = {} if self._compiled is True else {"backend": self._compiled}
        return torch.compile(own, fullgraph=True, dynamic=False, **options)

    def __call__(self, rows: Tensor, step: Step, positions: Tensor | None = None) -> Tensor:
        """Hidden states `[1, B, H]` as the stack gives them for `rows` `[1, B, H]`.

        Args:
            rows: of one new position each.
            step: where they are kept and what they see.
            positions: `[k, B, 1]` of a model with several sections, or None.

        Collectives: two sums a layer over tensor-parallel ranks, where there are several.
        """
        x, bias = rows[0], None
        added = torch.zeros_like(x)
        slots, turned = step.slots[:, 0], self._turned(step, positions, x.dtype)
        which = torch.arange(len(x), device=x.device)
        masks: dict[int | None, Tensor] = {}
        if step.reach not in self._attends:
            self._attends[step.reach] = self._made(attend)
        attends = self._attends[step.reach]
        for layer in self._layers:
            window = layer.cache.window
            if window not in masks:
                seen = step.mask(window, 1)
                masks[window] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
            keys, values = layer.cache.held()
            x, added = attends(
                x, added, bias, layer.attention, turned, keys, values, which, slots, masks[window]
            )  # fmt: skip
            added = self._summed(added)
            x, added = self._feed(x, added, layer.attention_bias, layer.mlp)
            added, bias = self._summed(added), layer.mlp_bias
        x = x + (added if bias is None else added + bias)
        return (x if self._final is None else self._final(x))[None]

    def _summed(self, partial: Tensor) -> Tensor:
        if self._group.size() > 1:
            dist.all_reduce(partial, group=self._group)
        return partial

    def _turned(self, step: Step, positions: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines `[B, 1, d]`."""
        language = self._language
        if language.position_embedding_type == "rope":
            angles = language.rotary_pos_emb()
        elif language.position_embedding_type == "mrope":
            angles = language.rotary_pos_emb(positions, language.mrope_section)
        else:
            return None
        angles = angles[0]  # [B, 1, d] of the only new position
        return angles.cos().to(dtype), angles.sin().to(dtype)


def why_not(language: Any) -> str | None:
    """What keeps a borrowed language model from `FusedLayers`, or None where nothing does."""
    config, stack = language.config, language.decoder
    if language.position_embedding_type not in ("rope", "mrope", "learned_absolute", "none"):
        return f"position_embedding_type={language.position_embedding_type!r}"
    if language.position_embedding_type == "rope" and not isinstance(language.rotary_pos_emb, RotaryAt):
        return "rotary embeddings that are not borrowed"
    settings = {
        "rotary_interleaved": False,
        "fp32_residual_connection": False,
        "attention_output_gate": False,
        "glu_linear_offset": 0.0,
        "activation_func_clamp_value": None,
        "use_mup": False,
    }
    for name, neutral in settings.items():
        if getattr(config, name, neutral) not in (neutral, None):
            return f"{name}={getattr(config, name)!r}"
    for layer in getattr(stack, "layers", ()):
        problem = _against(layer)
        if problem is not None:
            return problem
    return None


def _against(layer: Any) -> str | None:
    if type(layer) is not TransformerLayer:
        return f"layers of {type(layer).__name__}"
    attention, mlp = layer.self_attention, layer.mlp
    if type(attention) not in (SelfAttention, PackedSelfAttention) or type(mlp) is not MLP:
        return f"{type(attention).__name__} and {type(mlp).__name__}"
    if not isinstance(layer.cross_attention, IdentityOp):
        return "cross attention"
    inner = [attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2]
    # Adapters and quantised layers have weights of their own beside: only these two are what they look like.
    plain = (ColumnParallelLinear, RowParallelLinear)
    engine = "megatron.core.extensions.transformer_engine"
    strange = [type(one).__name__ for one in inner if type(one) not in plain and type(one).__module__ != engine]
    if strange:
        return f"linear layers of {strange}"
    hooked = [name for name, one in layer.named_modules() if has_output_hooks(one)]
    return f"hooks on {hooked}" if hooked else None


def _layer(layer: Any) -> _Layer:
    config, attention, mlp = layer.config, layer.self_attention, layer.mlp
    no_rope = bool(config.no_rope_freq) and bool(config.no_rope_freq[layer.layer_number - 1])
    width = attention.hidden_size_per_attention_head
    cache = attention.core_attention
    parts = Attend(
        _norm_before(layer.input_layernorm, attention.linear_qkv, config),
        attention.linear_qkv.weight,
        _bias(attention.linear_qkv),
        _optional_norm(attention.q_layernorm, config),
        _optional_norm(attention.k_layernorm, config),
        attention.linear_proj.weight,
        attention.num_query_groups_per_partition,
        width**-0.5 if config.softmax_scale is None else config.softmax_scale,
        not no_rope,
    )
    feeds = Feed(
        _norm_before(layer.pre_mlp_layernorm, mlp.linear_fc1, config),
        mlp.linear_fc1.weight,
        _bias(mlp.linear_fc1),
        mlp.linear_fc2.weight,
        config.gated_linear_unit,
        config.activation_func,
    )
    return _Layer(parts, _bias(attention.linear_proj), feeds, _bias(mlp.linear_fc2), cache)


def _bias(linear: Any) -> Tensor | None:
    bias = linear.bias
    return bias if isinstance(bias, Tensor) and bias.numel() else None


def _norm_before(norm: nn.Module, linear: Any, config: Any) -> Norm:
    """The norm in front of a linear layer, which TransformerEngine has within it."""
    if not isinstance(norm, IdentityOp):
        return _norm(norm, config)
    return _as_norm(linear.layer_norm_weight, linear.layer_norm_bias, linear.eps, config)


def _norm(norm: Any, config: Any) -> Norm:
    return _as_norm(norm.weight, getattr(norm, "bias", None), norm.eps, config)


def _optional_norm(norm: nn.Module | None, config: Any) -> Norm | None:
    return None if norm is None or isinstance(norm, IdentityOp) else _norm(norm, config)


def _as_norm(weight: Tensor, bias: Tensor | None, eps: float, config: Any) -> Norm:
    if config.layernorm_zero_centered_gamma:
        weight = weight.detach() + 1
    return Norm(weight, bias, eps, config.normalization == "RMSNorm")
