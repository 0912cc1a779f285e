"""The sizes of the parallel axes, and whether they fit the number of ranks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The size of every parallel axis of `world_size` ranks; building one that does not fit is a ValueError.

    Dense layers: ``world_size = tensor * context * pipeline * data``.
    Expert layers: ``world_size = expert_tensor * expert * pipeline * expert_data``.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or the sizes do not divide the world; the message names the argument to change.

    Example:
        >>> Layout(world_size=8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2).data_parallel_size
        2
    """

    world_size: int
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size is None and name in ("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size"):
                continue
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name}: expected an int, found {size!r} of type {type(size).__name__}.")
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, found {size}.")

        dense = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        if self.world_size % dense:
            raise ValueError(
                f"tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size = "
                f"{self.tensor_model_parallel_size} * {self.pipeline_model_parallel_size} * "
                f"{self.context_parallel_size} = {dense} does not divide the world of {self.world_size} rank(s). "
                f"Lower one of the three, or start a multiple of {dense} ranks (torchrun --nproc-per-node)."
            )
        expert = self.effective_expert_tensor_parallel_size * self.expert_model_parallel_size
        expert *= self.pipeline_model_parallel_size
        if self.world_size % expert:
            raise ValueError(
                f"expert_tensor_parallel_size * expert_model_parallel_size * pipeline_model_parallel_size = "
                f"{self.effective_expert_tensor_parallel_size} * {self.expert_model_parallel_size} * "
                f"{self.pipeline_model_parallel_size} = {expert} does not divide the world of {self.world_size} "
                f"rank(s). Lower expert_model_parallel_size, or set expert_tensor_parallel_size "
                f"(default: tensor_model_parallel_size)."
            )
        if self.virtual_pipeline_model_parallel_size is not None and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} needs a pipeline, "
                "found pipeline_model_parallel_size=1. Set it to at least 2, or leave the virtual size None."
            )

    @property
    def effective_expert_tensor_parallel_size(self) -> int:
        """The tensor-parallel size of expert layers, which is the dense one unless given."""
        if self.expert_tensor_parallel_size is None:
            return self.tensor_model_parallel_size
        return self.expert_tensor_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Ranks that hold the same dense weights and read different samples."""
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )
