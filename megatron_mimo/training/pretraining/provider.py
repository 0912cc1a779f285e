"""What a script passes to `megatron.training.pretrain` in place of its own functions; `pretrain` passes it too.

`docs/training.md` has such a script.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mimo.batch import Batch
from megatron_mimo.draws import STATE, seed_draws
from megatron_mimo.model import MimoModel
from megatron_mimo.training.chunks import build_stage
from megatron_mimo.training.forward import Forwarded
from megatron_mimo.training.pretraining.arguments import ModelConfig
from megatron_mimo.training.pretraining.session import session_of


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
        FileNotFoundError, ConnectionError: as `load_pretrained`, with --pretrained.
        ValueError: a `config` of the caller's, an argument that would be ignored, a layout that cannot work, a part
            or modality that the model does not have, or a checkpoint to go on from in whose run other parts trained.

    Example:
        >>> provider = partial(model_provider, model_config)                      # doctest: +SKIP
        >>> pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step, provider)  # doctest: +SKIP
    """
    from megatron.training import get_args

    if config is not None:
        raise ValueError(
            "model_provider got a TransformerConfig, expected None: the recipe's model_config makes the "
            "configuration of every part. Set what it shall hold by Megatron's arguments."
        )
    args = get_args()
    session = session_of(args)
    asked = session.ask(model_config)
    seed_draws_once(args.seed)
    model = build_stage(
        asked.model,
        asked.control,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
        pretrained=args.pretrained,
    )
    session.built(model)
    return model


def forward_step(data_iterator: Iterator[Batch] | None, model: nn.Module) -> Forwarded:
    """`(outputs, loss_func)` of one microbatch; see `ForwardStep`.

    Args:
        data_iterator: gives keyword arguments of `MimoModel.forward`, as CPU tensors.
        model: of `model_provider`, as Megatron wrapped it.
    """
    from megatron.training import get_args

    return session_of(get_args()).forward_step(data_iterator, model)


def seed_draws_once(seed: int) -> None:
    """Seeds the decoders' draws after Megatron has seeded its own numbers, once a process."""
    if STATE not in get_cuda_rng_tracker().get_states():
        seed_draws(seed, parallel_state.get_data_parallel_rank())
