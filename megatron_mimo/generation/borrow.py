"""A language model made ready to generate for the time of a call, and every value put back after it.

What changes meanwhile: core attentions keep a cache, rotary embeddings take positions of each sample, sequence
parallelism, fused rotary kernels and fp8 are off, and the model stops before its output layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import Tensor, nn

from megatron_mimo.cached_attention import CachedAttention, Step, Turn, window_of
from megatron_mimo.compat.hybrid import keeps_states
from megatron_mimo.compat.megatron import gather_hooks
from megatron_mimo.specs import core_attention

_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
_RECOMPUTE = ("recompute_input_layernorm", "recompute_pre_mlp_layernorm", "recompute_mlp")
#: What rows of any number cannot go through, and the value that is neutral.
_CONFIG = {"sequence_parallel": False, "apply_rope_fusion": False, "fused_single_qkv_rope": False, "fp8": None}


def attentions_of(stack: nn.Module) -> list[Attention]:
    """The attention layers of a transformer stack, in order."""
    return [module for module in stack.modules() if isinstance(module, Attention)]


def check_cacheable(model: Any) -> None:
    """Refuses a model whose layers the cache does not serve, or a layout on which generation would hang or be wrong.

    Args:
        model: a `MimoModel`, this rank's part.

    Raises:
        ValueError: naming what was found and what to do. Every rank raises it alike.
    """
    language = model.language_model
    config, groups = language.config, model.pg_collection
    stateful = sorted({type(m).__name__ for m in language.decoder.modules() if keeps_states(m)})
    if stateful:
        raise ValueError(
            f"generation: expected a pattern of attention ('*'), MLP ('-') and expert ('E') layers, found {stateful}, "
            "whose states Megatron keeps in an inference context alone. Use Megatron's own inference for them."
        )
    refused = {
        "context_parallel_size=1": groups.cp.size() == 1,
        "expert_model_parallel_size=1": getattr(groups, "ep", None) is None or groups.ep.size() == 1,
        "virtual_pipeline_model_parallel_size=None": config.virtual_pipeline_model_parallel_size is None,
        "multi_latent_attention=False": not config.multi_latent_attention,
        "softmax_type='vanilla'": config.softmax_type == "vanilla",
        "cuda_graph_impl='none'": config.cuda_graph_impl in ("none", "full_iteration"),
        "fp4=None": config.fp4 is None,
    }
    wrong = [wanted for wanted, fits in refused.items() if not fits]
    if wrong:
        found = [f"{name}={_found(name, config, groups)!r}" for name in (one.split("=")[0] for one in wrong)]
        raise ValueError(
            f"generation: expected {', '.join(wrong)}, found {', '.join(found)}. Load the checkpoint on such a layout."
        )
    for attention in attentions_of(language.decoder):
        window_of(attention)
        if isinstance(attention, MultiLatentAttention) or attention.attn_mask_type not in _CAUSAL:
            raise ValueError(
                f"generation: expected causal attention, found {type(attention).__name__} with "
                f"{attention.attn_mask_type} in layer {attention.layer_number}."
            )
    if any(gather_hooks(module) for module in model.modules()):
        raise ValueError(
            "generation: expected whole parameters, found overlap_param_gather, whose gathers the other data-parallel "
            "ranks would have to join. Call Trainer.generate, or the wrapper's disable_forward_pre_hook() before and "
            "enable_forward_pre_hook() after."
        )


_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def _found(name: str, config, groups) -> object:
    sizes = {"context_parallel_size": "cp", "expert_model_parallel_size": "ep"}
    return getattr(groups, sizes[name]).size() if name in sizes else getattr(config, name)


@contextmanager
def borrowed(model: Any, turn: Turn, rows: int, slots: int) -> Iterator[Sequence[CachedAttention]]:
    """Within it, `model` generates; after it, also after an exception, every value is what it was.

    Args:
        model: a `MimoModel`, this rank's part, that `check_cacheable` passed.
        turn: where its layers find the step in progress.
        rows, slots: of the cache.

    Yields:
        The cached attentions of this rank, in order.
    """
    language = model.language_model
    model.set_is_first_microbatch()  # weights kept in fp8 may be older than the last step's
    with ExitStack() as stack:
        stack.callback(model.set_is_first_microbatch)  # what ran here counts as none
        stack.enter_context(evaluating(model))
        for module in language.modules():
            for name in (*_SEQUENCE_PARALLEL, *_RECOMPUTE):
                if getattr(module, name, False):
                    _set(stack, module, name, False)
        for config in {id(c): c for m in language.modules() if (c := getattr(m, "config", None)) is not None}.values():
            for name, value in _CONFIG.items():
                if getattr(config, name, value) != value:
                    _set(stack, config, name, value)
        _set(stack, language, "post_process", False)  # it gives hidden states; `Stage` runs the output layer
        if getattr(language, "mtp_process", False):
            _set(stack, language, "mtp_process", False)
        if language.position_embedding_type in ("rope", "yarn"):
            _set(stack, language, "rotary_pos_emb", RotaryAt(language.rotary_pos_emb, turn, slots))
        cached = []
        make = core_attention(cached=True)
        for attention in attentions_of(language.decoder):
            cached.append(make(attention, turn, rows, slots))
            _set(stack, attention, "core_attention", cached[-1])
        yield cached


def _set(stack: ExitStack, owner: object, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it, `model` is in evaluation mode; after it each module is in its own, where `train()` would set all."""
    with ExitStack() as stack:
        for module in model.modules():
            if module.training:
                _set(stack, module, "training", False)
        yield


class RotaryAt(nn.Module):
    """In place of Megatron's rotary embedding: the angles of the step's positions, of each sample its own.

    Args:
        rotary: whose angles they are.
        turn: where the step in progress is found.
        positions: how many there are.
    """

    def __init__(self, rotary: nn.Module, turn: Turn, positions: int) -> None:
        super().__init__()
        made = rotary(positions)
        self._tuple = isinstance(made, tuple)  # yarn's, with its factor beside
        angles, *beside = made if self._tuple else (made,)
        self._beside: list[Any] = beside
        self._angles = angles.flatten(0, -2)  # [positions, d]
        self._turn = turn

    def get_rotary_seq_len(self, *args: object, **kwargs: object) -> int:
        """What Megatron's own is asked first; `forward` does not read it."""
        return len(self._angles)

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, ...]:
        """Angles `[n, B, 1, d]` of the step's positions."""
        step = self._turn.step
        assert isinstance(step, Step), "a borrowed model runs within a step"
        places = step.positions.transpose(0, 1)
        angles = self._angles.index_select(0, places.reshape(-1)).view(*places.shape, 1, -1)
        return (angles, *self._beside) if self._tuple else angles


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes; on the CPU what can be had without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    import psutil  # type: ignore[import-untyped]

    return psutil.virtual_memory().available
