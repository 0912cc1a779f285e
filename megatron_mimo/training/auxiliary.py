"""Losses that Megatron's layers add by themselves: their coefficients, and their values by name.

Experts' losses enter the gradient in the middle of the model, times the positions that a router saw; multi-token
prediction's times the labels that its microbatch learned. With `calculate_per_token_loss` Megatron then divides by the
tokens that the microbatches report. We report the positions that hold something, which every pipeline stage knows
of any batch, so that experts' coefficients are what they are without the flag; multi-token prediction is told the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_logging import MetricEntry, get_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo.compat.megatron import forget_scale_of_expert_losses
from megatron_mimo.launch import Run

_BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


#: Name -> what Megatron's layers add up under it.
Reports = dict[str, MetricEntry]


@dataclass(frozen=True)
class MtpScale:
    """What multi-token prediction's loss is multiplied by: the loss scale, and what makes its divisor its own count.

    Args:
        config: of the language model, whose `grad_scale_func` Megatron leaves to this function.
        ratio: tokens reported in the step over labels learned in it; a float32 scalar on the device where a CUDA graph
            finds that of each step.
    """

    config: TransformerConfig
    ratio: float | Tensor

    def __call__(self) -> Tensor | float:
        scale = self.config.grad_scale_func
        return self.ratio if scale is None else scale(torch.as_tensor(self.ratio))


def scale_mtp(config: TransformerConfig, tokens: float | Tensor, learned: float | Tensor) -> None:
    """Has multi-token prediction weigh as its factor says, in the step that begins. A function of the user's own wins.

    Args:
        config: of the language model.
        tokens: that the step's microbatches report to Megatron.
        learned: sum of the step's loss masks; both as numbers, or both as float64 scalars on the device.
    """
    if config.mtp_num_layers is None or not config.calculate_per_token_loss:
        return
    if not scales_mtp(config):
        return
    if isinstance(tokens, Tensor) and isinstance(learned, Tensor):
        ratio: float | Tensor = (tokens.clamp(min=1.0) / learned.clamp(min=1.0)).float()
    else:
        ratio = max(float(tokens), 1.0) / max(float(learned), 1.0)
    config.mtp_grad_scale_func = MtpScale(config, ratio)


def scales_mtp(config: TransformerConfig) -> bool:
    """Whether no function of the user's own says what multi-token prediction's loss is multiplied by."""
    return config.mtp_grad_scale_func is None or isinstance(config.mtp_grad_scale_func, MtpScale)


def names_of(config: TransformerConfig) -> list[str]:
    """The auxiliary losses of a model with experts, as Megatron calls them; empty without experts or coefficients.

    Example:
        >>> config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=2)
        >>> config.moe_aux_loss_coeff, config.moe_z_loss_coeff = 0.01, 0.001
        >>> names_of(config)
        ['load_balancing_loss', 'z_loss']
    """
    if config.num_moe_experts is None:
        return []
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    coefficients = config.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients] * len(kinds)
    found = [_BALANCING[kind] for kind, factor in zip(kinds, coefficients) if factor and kind in _BALANCING]
    return found + (["z_loss"] if config.moe_z_loss_coeff is not None else [])


def start_step(config: TransformerConfig) -> None:
    """Forgets what earlier passes reported, of this model or of another one in the process with other layers.

    Before each step of training and of evaluation: both report.
    """
    forget_scale_of_expert_losses()
    MTPLossLoggingHelper.tracker.clear()  # sized by the first model's layers too
    if config.num_moe_experts is not None:
        get_moe_metrics_tracker().metrics.clear()  # its own `clear` keeps as many values as the first model had layers


def reports() -> Reports:
    """What experts' layers have reported since `start_step`; empty without experts."""
    return dict(get_moe_metrics_tracker().metrics)


def report_again(found: Reports) -> None:
    """Has the layers report what they did in another pass: a replay writes its own values there, and calls nothing."""
    get_moe_metrics_tracker().metrics.update(found)


def reported(config: TransformerConfig, run: Run, microbatches: int) -> dict[str, float]:
    """Each auxiliary loss of the step, without its coefficient: the mean over expert layers, microbatches and ranks.

    Collective over all ranks, for models with experts.
    """
    names = names_of(config)
    if not names:
        return {}
    values: dict[str, Tensor] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1 / microbatches,
        iteration=0,
        force_initialize=True,
        track_names=names,
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
        mtp_num_layers=config.mtp_num_layers,
        total_loss_dict=values,
        pg_collection=run.groups,
    )
    return {name: value.item() for name, value in values.items()}
