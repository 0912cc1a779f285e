"""What Megatron's schedules, optimizers and checkpoints ask of a model."""

from __future__ import annotations

from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_mimo.modality.marks import expect_new_weights
from megatron_mimo.sharded_state import sharded_state_dict


class MegatronModel(MegatronModule):
    """A language model and modules beside it, as one of Megatron's models.

    A subclass sets `language_model` and `modality_submodules`.
    """

    language_model: MegatronModule
    modality_submodules: nn.ModuleDict

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states `[S_local, B, H]` from the previous pipeline stage."""
        self.language_model.set_input_tensor(input_tensor)

    def set_is_first_microbatch(self) -> None:
        """Has modules with fp8 or fp4 weights, of every modality too, make them anew from what the last step changed.

        Called at the first microbatch of a step. `megatron_mimo.training` does so; a schedule with a loop of your own
        asks its outermost wrapper, which looks at the language model's configuration alone: call this one beside it.
        """
        super().set_is_first_microbatch()
        expect_new_weights(self.modality_submodules)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether the language model ties its output layer to its embedding."""
        return self.language_model.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight on the first and last pipeline stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        """Checkpoint form of all parameters, as `megatron.core.dist_checkpointing` takes it."""
        return sharded_state_dict(self, prefix, sharded_offsets, metadata)
