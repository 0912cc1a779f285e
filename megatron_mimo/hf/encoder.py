"""Any encoder of transformers as it is: its own classes and weights, and rows that are told item by item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_mimo.compat.torch import KeepsDtype
from megatron_mimo.hf.towers import (
    Found,
    Modality,
    as_json,
    check_options,
    checkpoint_layers,
    find,
    fresh,
    read,
    source,
)
from megatron_mimo.modality.encoding import EncodedRows

# What users call an input -> what a tower of Qwen-VL's calls it.
_OF_GRIDS = {"pixel_values": "hidden_states", "image_grid_thw": "grid_thw"}


def encoder_of(spec: ModuleSpec) -> Found:
    """The encoder that the spec of an `HFEncoder` means; no tensor is read.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `HFEncoder`.
    """
    params = spec.params or {}
    _, config = source(params.get("name_or_path"), params.get("config"))
    return find(config, params.get("modality"))


class HFEncoder(KeepsDtype):
    """A vision or audio encoder of transformers, as it is: `pixel_values`, `input_features` or `input_values` to rows.

    Every tensor-parallel rank has all of it. Of a model with two towers, of a vision-language model and of an encoder
    with a decoder the encoder alone is read. It takes what the model's processor gives; a mask or grid beside it says
    which rows are padding, and they are left out.

    Args:
        name_or_path: a directory, or a name on the hub.
        layer: whose states are taken, as transformers counts `hidden_states` (LLaVA takes -2); None for
            `last_hidden_state`, which has the final norm where transformers has one there, and of Qwen-VL's towers the
            merged rows.
        select: ``patch`` leaves out the class and register tokens that stand before an image's patches.
        modality: which encoder, of a model that has one for images and one for sound.
        dtype: of the weights; None for the files'. Where it is `frozen` they keep it whatever the model is cast to.
        frozen: takes no gradient, stays in evaluation mode, and keeps no activations.
        gradient_checkpointing: computes each layer again in the backward pass instead of keeping its activations.
        config: of the whole model, as `to_dict` gives it: builds the encoder with fresh weights that are filled
            afterwards, and reads nothing. `save_pretrained` notes it.

    Attributes:
        width: of its rows.
        source_config: of the whole model.

    Raises:
        FileNotFoundError, ConnectionError: as `megatron_mimo.from_pretrained`.
        ValueError: a model without such an encoder, a layer that it lacks, tensors that are missing or surplus, or
            options that exclude each other.

    Example:
        >>> spec = ModuleSpec(HFEncoder, params={"name_or_path": "facebook/dinov2-base"})       # doctest: +SKIP
    """

    def __init__(
        self,
        name_or_path: str | Path | None = None,
        layer: int | None = None,
        select: Literal["all", "patch"] = "all",
        *,
        modality: Modality | None = None,
        dtype: torch.dtype | None = None,
        frozen: bool = False,
        gradient_checkpointing: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        directory, self.source_config = source(name_or_path, config)
        found = find(self.source_config, modality)
        check_options(found, layer, select, frozen and gradient_checkpointing)
        self.layer, self.select, self.frozen, self.width = layer, select, frozen, found.width
        self._keywords, self._has_grids = found.keywords, found.has_grids
        self.encoder = read(found, directory, dtype) if directory else fresh(found, dtype)
        self.casts_parameters = not frozen
        self._modality, self._checkpoints = modality, gradient_checkpointing
        if frozen:
            self.requires_grad_(False)
            self.eval()
        if gradient_checkpointing:
            checkpoint_layers(self.encoder)

    def saved_params(self) -> dict[str, Any]:
        """What a file has to say beside the weights for this encoder to be built again."""
        return {
            "layer": self.layer,
            "select": self.select,
            "modality": self._modality,
            "dtype": next(self.encoder.parameters()).dtype if self.frozen else None,
            "frozen": self.frozen,
            "gradient_checkpointing": self._checkpoints,
            "config": as_json(self.source_config),
        }

    def train(self, mode: bool = True) -> Self:
        """As any module; a frozen one stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows_per_item: Sequence[int] | None = None,
    ) -> EncodedRows:
        """Rows of images or sounds, rank-local to the data-parallel rank.

        Args:
            pixel_values: images `[n, 3, height, width]`; of SigLIP 2 `[n, patches, values]`, of Qwen-VL's towers
                `[patches, values]`.
            pixel_attention_mask, spatial_shapes: of SigLIP 2, `[n, patches]` and `[n, 2]` rows and columns.
            image_grid_thw: of Qwen-VL's towers, `[n, 3]` patches in time, height and width.
            input_features: of Whisper, `[n, mels, frames]`.
            input_values: of Wav2Vec 2, `[n, samples]`.
            attention_mask: `[n, frames]` or `[n, samples]`, which of them are no padding.
            rows_per_item: how many rows each item gives, on the host. Without it they are told from the mask or the
                grids, which waits for a device that holds them.

        Returns:
            `[n, s, width]`, or `[N, width]` where items differ or have padding, and the rows of each item.

        Raises:
            TypeError: an input that the encoder does not take.
            ValueError: rows of items that do not fit; ``patch`` of an image without class token in front.
        """
        given: dict[str, Tensor | None] = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "image_grid_thw": image_grid_thw,
            "input_features": input_features,
            "input_values": input_values,
            "attention_mask": attention_mask,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        states = self._states(inputs)
        if self.select == "patch":
            assert pixel_values is not None  # or the encoder had refused
            states = _patches(states, pixel_values, self.encoder.config)
        counts = list(rows_per_item) if rows_per_item is not None else self.told(inputs)
        if states.dim() == 2:
            return EncodedRows(states, counts)
        return _without_padding(states, counts)

    def _states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        own = {(_OF_GRIDS.get(name, name) if self._has_grids else name): value for name, value in inputs.items()}
        if not self._hears_mask:
            own.pop("attention_mask", None)
        surplus = sorted(own.keys() - self._keywords)
        if surplus:
            takes = sorted(self._keywords - {"self", "kwargs"})
            raise TypeError(f"{type(self.encoder).__name__} takes {takes}, found {surplus}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.encoder(**own, output_hidden_states=self.layer is not None)
        if self.layer is not None:
            return output.hidden_states[self.layer]
        return output.pooler_output if self._has_grids else output.last_hidden_state

    @property
    def _hears_mask(self) -> bool:
        """Whether the encoder leaves padding out of its attention; Whisper hears it as silence."""
        return self.encoder.config.model_type != "whisper"

    def told(self, inputs: Mapping[str, Tensor]) -> list[int] | None:
        """Rows of each item, from its mask or grid; None where every item has all of them."""
        own = self.encoder.config.to_dict()
        if "image_grid_thw" in inputs:
            return [math.prod(grid) // own["spatial_merge_size"] ** 2 for grid in inputs["image_grid_thw"].tolist()]
        if "spatial_shapes" in inputs:
            return [math.prod(shape) for shape in inputs["spatial_shapes"].tolist()]
        if "attention_mask" not in inputs:
            return None
        return [rows_of_sound(length, own) for length in inputs["attention_mask"].long().sum(1).tolist()]


def rows_of_sound(length: int, config: Mapping[str, Any]) -> int:
    """How many rows a sound gives.

    Args:
        length: frames of its spectrogram (Whisper), or samples (Wav2Vec 2 and its kind).
        config: of the encoder.

    Raises:
        ValueError: an encoder whose convolutions are not known here.

    Example:
        >>> rows_of_sound(16000, {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]})
        49
    """
    if config.get("model_type") == "whisper":
        return (length - 1) // 2 + 1
    if "conv_kernel" not in config:
        raise ValueError(
            f"{config.get('model_type')!r}: how many rows its sounds give is not known. Give rows_per_item beside the "
            "inputs, ints on the host."
        )
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        length = (length - kernel) // stride + 1
    for _ in range(config["num_adapter_layers"] if config.get("add_adapter") else 0):
        length = (length - 1) // config["adapter_stride"] + 1
    return max(length, 0)


def _patches(states: Tensor, pixels: Tensor, config: Any) -> Tensor:
    """Rows after the class and register tokens, which stand in front."""
    size = config.patch_size
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    if not 0 <= states.shape[1] - patches <= 32:
        raise ValueError(
            f"{type(config).__name__}: select='patch' expected {patches} patches and the tokens in front of them, "
            f"found {states.shape[1]} rows. Take select='all'."
        )
    return states[:, states.shape[1] - patches :]


def _without_padding(states: Tensor, counts: list[int] | None) -> EncodedRows:
    items, length = states.shape[:2]
    if counts is None:
        return EncodedRows(states, [length] * items)
    if len(counts) != items or not all(0 <= count <= length for count in counts):
        raise ValueError(
            f"rows_per_item: expected {items} counts of at most {length} rows, found {counts}. Count rows of the "
            "encoder, after its convolutions."
        )
    if all(count == length for count in counts):
        return EncodedRows(states, counts)
    return EncodedRows(torch.cat([item[:count] for item, count in zip(states, counts, strict=True)]), counts)
