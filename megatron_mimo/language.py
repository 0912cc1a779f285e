"""The language model: built from its spec, run once, its last hidden states kept on the way."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Self

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo.build import build, constructor_parameters

# GPTModel wants a number even where positions are rotary and nothing has that length. This is
# what Megatron's own multimodal model assumes for a spec without it.
DEFAULT_MAX_SEQUENCE_LENGTH = 4096


def build_language_model(
    spec: ModuleSpec, *, pre_process: bool, post_process: bool, vp_stage: int | None, pg_collection
) -> MegatronModule:
    """The language model's part on this pipeline stage.

    Args:
        spec: of `GPTModel`, `HybridModel` or a model with their interface. Its own params win
            over the stage's. `max_sequence_length`, if left out, is 4096. A `transformer_layer_spec`
            that differs from stage to stage is given as a function, called with the model's
            configuration and `vp_stage` on each of them.
        pre_process, post_process: whether this stage is the first, the last.
        vp_stage: index of the virtual pipeline stage.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        ValueError: an interleaved schedule over two stages that would mix up its messages.
    """
    check_interleaving(spec.params["config"])
    offered = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
    if pg_collection is not None:
        offered["pg_collection"] = pg_collection
    length = constructor_parameters(spec).get("max_sequence_length")
    if length is not None and length.default is inspect.Parameter.empty:
        offered["max_sequence_length"] = DEFAULT_MAX_SEQUENCE_LENGTH
    return build(_with_own_layers(spec, vp_stage), offered)


def _with_own_layers(spec: ModuleSpec, vp_stage: int | None) -> ModuleSpec:
    """`spec` with the layers of this stage in place of the function that gives them."""
    layers = spec.params.get("transformer_layer_spec")
    if not isinstance(layers, (types.FunctionType, functools.partial)):
        return spec
    own = layers(spec.params["config"], vp_stage=vp_stage)
    return dataclasses.replace(spec, params={**spec.params, "transformer_layer_spec": own})


def check_interleaving(config: TransformerConfig) -> None:
    """Refuse what silently trains on the wrong activations.

    With two stages, the one before is also the one behind. Sent in one batch, the two messages are
    told apart by their order alone, and both sides use the same order.
    """
    interleaves = config.virtual_pipeline_model_parallel_size is not None
    if interleaves and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        raise ValueError(
            "virtual_pipeline_model_parallel_size with pipeline_model_parallel_size=2 needs "
            "overlap_p2p_comm=True and batch_p2p_comm=False in the language model's configuration, "
            f"found overlap_p2p_comm={config.overlap_p2p_comm}. Otherwise forward and backward "
            "messages between the two stages are taken for each other."
        )


class HiddenStates:
    """Keeps what the transformer stack gave while the language model ran.

    The decoders read the very states that the logits come from, so the language model runs once.
    A forward hook serves every model class alike; it is there only as long as the `with` block.

    Args:
        stack: the language model's transformer stack, on the last pipeline stage.

    Attributes:
        last: `[S_local, B, H]` of the last forward pass, after the final norm, rank-local.

    Example:
        >>> stack = nn.Linear(2, 2)
        >>> with HiddenStates(stack) as states:
        ...     output = stack(stack.weight)
        >>> states.last is output
        True
    """

    def __init__(self, stack: nn.Module) -> None:
        self._stack = stack
        self.last: Tensor | None = None

    def __enter__(self) -> Self:
        self._hook = self._stack.register_forward_hook(self._keep)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()

    def _keep(self, module, inputs, output) -> None:
        self.last = output[0] if isinstance(output, tuple) else output
