"""What Megatron does to parameters by their names and marks, held right for the modules of a modality.

At the end of a step Megatron walks over all parameters of a model and goes by the language model's configuration, by
names and by attributes. It does not know that a modality's modules may mean something else by them.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo.compat.megatron import summed_by_name

#: Megatron's mark of a parameter whose gradient is averaged, and not summed, over tensor-parallel ranks.
_AVERAGED = "average_gradients_across_tp_domain"


def settle(modality: str, submodule: nn.Module, language: TransformerConfig, pg_collection) -> None:
    """Has Megatron's end of a step, whichever loop calls it, do to a modality's modules what they need.

    - Gradients of replicated parameters that only their names have summed over tensor-parallel ranks stay as they are.
    - Parts of gradients (norms of attention heads that are cut over ranks, parameters of a module that splits its
      sequence) are summed, whatever the language model's `qk_layernorm` and `sequence_parallel` say.
    - The language model's `quant_recipe` reaches modules that take one, by `modality_submodules.<modality>.` and their
      path. Weights are stored as they were built.

    Args:
        modality: its name.
        submodule: its modules on this pipeline stage.
        language: the language model's configuration.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        ValueError: marks that say something else than the module does: of sequence parallelism without a layer that
            splits the sequence, of other process groups than the language model's, of experts that only the language
            model's configuration would balance.
    """
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "ep"])
    prefix = f"modality_submodules.{modality}"
    _check_groups(prefix, submodule, groups)
    _check_experts(prefix, submodule, language)
    if groups.tp.size() > 1:
        _check_splits(prefix, submodule)
        _settle_gradients(prefix, submodule, language, groups.tp.size())
    _quantize(prefix, submodule, language)


def expect_new_weights(submodules: nn.Module) -> None:
    """Has modules that keep their weights in fp8 or fp4 from microbatch to microbatch make them anew in the next one.

    Megatron's `set_is_first_microbatch` does so where the configuration of the *language model* has fp8 or fp4.
    """
    for module in submodules.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True  # type: ignore[assignment]  # a flag of Megatron's layers


def check_orthogonalized(submodules: nn.Module, language: TransformerConfig, optimizer: str) -> None:
    """Refuses an optimizer that takes query, key and value weights apart, by the language model's heads, elsewhere too.

    Args:
        submodules: modules of all modalities on this stage.
        language: the language model's configuration.
        optimizer: Megatron's name of it.

    Raises:
        ValueError: Muon beside trainable attention of other heads.
    """
    if "muon" not in optimizer.lower():
        return
    for name, module in submodules.named_modules():
        if not isinstance(module, Attention) or _heads(module.config) == _heads(language):
            continue
        weight = getattr(getattr(module, "linear_qkv", None), "weight", None)
        if weight is not None and weight.requires_grad:
            raise ValueError(
                f"optimizer {optimizer!r}: modality_submodules.{name}.linear_qkv has (heads a group, channels, gate) "
                f"{_heads(module.config)}, but Megatron takes every linear_qkv apart by the language model's "
                f"{_heads(language)}. Freeze that module, give it the same heads, or use another optimizer."
            )


def _heads(config: TransformerConfig) -> tuple[object, ...]:
    """What Megatron takes apart by: heads a group, channels of each, and whether there is a gate."""
    grouped = config.num_attention_heads // (config.num_query_groups or config.num_attention_heads)
    return grouped, config.kv_channels, bool(config.attention_output_gate)


# Gradients ----------------------------------------------------------------------------------------------------------


def _settle_gradients(prefix: str, submodule: nn.Module, language: TransformerConfig, ranks: int) -> None:
    of_heads = set(_norms_of_cut_heads(submodule))
    for name, parameter in submodule.named_parameters():
        marked = getattr(parameter, "sequence_parallel", False)
        summed = (marked and language.sequence_parallel) or summed_by_name(f"{prefix}.{name}", language)
        partial = marked or parameter in of_heads
        if summed == partial or getattr(parameter, _AVERAGED, False):
            continue
        setattr(parameter, _AVERAGED, True)
        if partial:
            _scale_gradient(parameter, ranks)


def _norms_of_cut_heads(submodule: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of q and k norms each of whose ranks sees its own heads; multi-latent attention norms whole rows."""
    for module in submodule.modules():
        if isinstance(module, Attention) and not isinstance(module, MultiLatentAttention):
            for norm in (getattr(module, "q_layernorm", None), getattr(module, "k_layernorm", None)):
                if isinstance(norm, nn.Module):
                    yield from norm.parameters()


def _scale_gradient(parameter: nn.Parameter, factor: int) -> None:
    """The mean over ranks of `factor` times a gradient is the sum."""

    def scaled(gradient: Tensor) -> Tensor:
        return gradient * factor

    trains = parameter.requires_grad
    parameter.requires_grad_(True).register_hook(scaled)
    parameter.requires_grad_(trains)


# What cannot be right -----------------------------------------------------------------------------------------------


def _check_splits(prefix: str, submodule: nn.Module) -> None:
    """Refuses marks of sequence parallelism in a module that nothing splits: its whole gradients would be summed."""
    for name, part in _parts(submodule):
        marked = [key for key, one in part.named_parameters() if getattr(one, "sequence_parallel", False)]
        splits = any(getattr(one, "sequence_parallel", False) and hasattr(one, "tp_group") for one in part.modules())
        if marked and not splits:
            raise ValueError(
                f"{prefix}.{name}: parameters {marked[:3]} ({len(marked)}) are marked as sequence-parallel, but no "
                "layer of it splits the sequence, so that Megatron would sum their whole gradients over "
                "tensor-parallel ranks. Build it from a configuration with sequence_parallel=False; the language "
                "model may keep it."
            )


def _parts(submodule: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Encoders, projections and decoders one by one, with their names; other children as they are."""
    for name, child in submodule.named_children():
        if isinstance(child, (nn.ModuleDict, nn.ModuleList)):
            yield from ((f"{name}.{inner}", one) for inner, one in child.named_children())
        else:
            yield name, child


def _check_groups(prefix: str, submodule: nn.Module, groups: ProcessGroupCollection) -> None:
    """Refuses layers that are cut over other ranks than the language model's: their weights begin, count in the
    gradient's norm and are saved as if they were cut over those."""
    for name, module in submodule.named_modules():
        group = getattr(module, "tp_group", None)
        cut = [one for one in module.parameters(recurse=False) if getattr(one, "tensor_model_parallel", False)]
        expert = getattr(module, "is_expert", False)
        if group is not None and cut and not expert and group.size() != groups.tp.size():
            raise ValueError(
                f"{prefix}.{name} ({type(module).__name__}) is cut over {group.size()} tensor-parallel ranks, the "
                f"language model over {groups.tp.size()}. Leave its process groups out; use torch.nn layers for what "
                "each rank shall hold whole."
            )
        if isinstance(module, Router) and module.config.expert_model_parallel_size != groups.ep.size():
            raise ValueError(
                f"{prefix}.{name}: its configuration has expert_model_parallel_size="
                f"{module.config.expert_model_parallel_size}, the run {groups.ep.size()}. Gradients of different "
                "experts would be averaged. Make them equal."
            )


def _check_experts(prefix: str, submodule: nn.Module, language: TransformerConfig) -> None:
    """Refuses routers whose balance is kept at the end of a step: by the language model's configuration alone."""
    for name, module in submodule.named_modules():
        if language.moe_router_enable_expert_bias and hasattr(module, "expert_bias"):
            raise ValueError(
                f"{prefix}.{name} ({type(module).__name__}) has an expert_bias beside a language model with "
                "moe_router_enable_expert_bias: Megatron updates the biases of all modules as one table of the "
                "language model's experts. Use moe_router_load_balancing_type='aux_loss' for one of them, and another "
                "name or no experts in the modality."
            )
        asked = _kept_at_the_end(module.config) if isinstance(module, Router) else None
        if asked is not None:
            raise ValueError(
                f"{prefix}.{name} ({type(module).__name__}) has {asked}, which Megatron keeps at the end of a step by "
                "the language model's configuration alone, so that it would never change. Use "
                "moe_router_load_balancing_type='aux_loss' there."
            )


def _kept_at_the_end(config: TransformerConfig) -> str | None:
    kinds = config.moe_router_load_balancing_type
    found = [kind for kind in ("global_aux_loss", "quantile_balancing") if kind in kinds]
    if config.moe_router_enable_expert_bias:
        return "moe_router_enable_expert_bias=True"
    return f"moe_router_load_balancing_type={found[0]!r}" if found else None


# Quantization -------------------------------------------------------------------------------------------------------


def _quantize(prefix: str, submodule: nn.Module, language: TransformerConfig) -> None:
    """Gives modules what the language model's recipe has for their names; others keep what they were built with."""
    for name, module in submodule.named_modules() if language.quant_recipe is not None else ():
        if hasattr(module, "finish_init"):
            found = get_quant_config_or_none(f"{prefix}.{name}", language.quant_recipe)
            if found is not None:
                module.finish_init(found)
