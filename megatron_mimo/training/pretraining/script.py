"""What a script that calls `megatron.training.pretrain` itself puts in the place of its own functions.

`docs/training.md` has such a script.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mimo.compat.megatron_training import optimizer_config_function
from megatron_mimo.data.step import Batch
from megatron_mimo.layout import check_layout
from megatron_mimo.model import MimoModel
from megatron_mimo.training.forward import ForwardStep
from megatron_mimo.training.pretraining.arguments import control_from_args, layout_from_args
from megatron_mimo.training.pretraining.loop import (
    ModelConfig,
    PartOverrides,
    build_stage,
    check_resumed,
    check_supported,
    with_loss_weights,
)


def model_provider(
    model_config: ModelConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> MimoModel:
    """The model of one stage, or of one chunk of an interleaved pipeline; all but the first argument are Megatron's.

    Args:
        model_config: gives the configuration for Megatron's arguments, as a recipe's does.

    Raises:
        ValueError: an argument that would be ignored, a layout that cannot work, a part or modality that the
            model does not have, or a checkpoint to go on from in whose run other parts trained.

    Example:
        >>> provider = partial(model_provider, model_config)                      # doctest: +SKIP
        >>> pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step, provider)  # doctest: +SKIP
    """
    from megatron.training import get_args

    args = get_args()
    check_in_effect(args)
    check_supported(args)
    model, control = with_loss_weights(model_config(args), args), control_from_args(args)
    check_layout(layout_from_args(args), model, args.seq_length)
    control.check(model)
    check_resumed(args, control, model)
    return build_stage(model, control, args.seed, pre_process, post_process, vp_stage, config, pg_collection)


def forward_step(data_iterator: Iterator[Batch] | None, model: nn.Module):
    """`(outputs, loss_func)` of one microbatch; see `ForwardStep`.

    Args:
        data_iterator: gives keyword arguments of `MimoModel.forward`, as CPU tensors.
        model: of `model_provider`, as Megatron wrapped it.
    """
    from megatron.training import get_args

    global _running
    args = get_args()
    if _running is None or _running[0] is not args:
        _running = (
            args,
            ForwardStep(microbatches=get_num_microbatches, step=lambda: args.curr_iteration, seed=args.seed),
        )
    return _running[1](data_iterator, model)


# Megatron's arguments, of which a run has one object, and the run's forward step, which keeps its microbatches.
_running: tuple[Namespace, ForwardStep] | None = None


def check_in_effect(args: Namespace) -> None:
    """Refuses arguments of `add_mimo_args` that nothing would follow.

    Raises:
        ValueError: naming the arguments and what to call.
    """
    if "freeze" not in vars(args):
        raise ValueError(
            "model_provider: Megatron's parser lacks the arguments of multimodal training. Call "
            "parse_and_validate_args(add_mimo_args), or call add_mimo_args in the script's own extra_args_provider."
        )
    factors = [name for name in ("lr_factor", "weight_decay_factor", "train_embedding_rows") if getattr(args, name)]
    if factors and not isinstance(optimizer_config_function(), PartOverrides):
        raise ValueError(
            f"{', '.join(map(_option, factors))}: Megatron makes its parameter groups without them. Parse the "
            "arguments and call pretrain() within `with megatron_mimo.training.adapt_megatron(model_config):`, or "
            "leave them out."
        )
    if args.device_peak_tflops is not None:
        raise ValueError(
            "--device-peak-tflops: only megatron_mimo.training.pretrain logs the MFU. Train with it, or leave the "
            "argument out."
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
