"""The encoder in a model of transformers, found by the model's configuration, and read without the rest."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_mimo.hf.files import open_checkpoint
from megatron_mimo.hf.source import resolve

logger = logging.getLogger(__name__)

Modality = Literal["image", "audio"]

# Masks what Wav2Vec 2 hears while it is trained; checkpoints of its finetuned models lack it.
_SPECAUGMENT = "masked_spec_embed"


@dataclass(frozen=True)
class Found:
    """The encoder in a model of transformers.

    Args:
        kind: its class.
        config: its own.
        name: of the module in the whole model; empty where the model is the encoder.
    """

    kind: Any
    config: Any
    name: str

    @property
    def width(self) -> int:
        """Of its rows."""
        own = self.config.to_dict()
        if self.has_grids:
            return int(own["out_hidden_size"] if "out_hidden_size" in own else own["hidden_size"])
        return int(own["output_hidden_size"] if own.get("add_adapter") else self.config.hidden_size)

    @property
    def has_grids(self) -> bool:
        """Whether it takes patches of images of any size, flat, and merges them."""
        return "grid_thw" in self.keywords

    @property
    def tells_rows(self) -> bool:
        """Whether items give unlike numbers of rows, which it says by a mask or a grid."""
        return self.has_grids or self.hears or "spatial_shapes" in self.keywords

    @property
    def keywords(self) -> frozenset[str]:
        """That its forward names."""
        return frozenset(inspect.signature(self.kind.forward).parameters)

    @property
    def hears(self) -> bool:
        """Whether it encodes sound."""
        return bool({"input_features", "input_values"} & self.keywords)


def find(config: Any, modality: Modality | None = None) -> Found:
    """The encoder of images or sound in a model with `config`: of two towers, of encoder and decoder, or the whole.

    Args:
        config: of transformers.
        modality: which, where the model has both.

    Raises:
        ValueError: it has none, or several.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        whole = AutoModel.from_config(config)
    kinds: tuple[Modality, ...] = ("image", "audio")
    inner = {one: encoder for one in kinds if (encoder := whole.get_encoder(one)) is not whole}
    if modality is None and len(inner) > 1:
        raise ValueError(f"{type(whole).__name__} encodes image and audio. Say which: modality='image' or 'audio'.")
    wanted = modality or next(iter(inner), None)
    encoder = inner.get(wanted) if wanted is not None else None
    if encoder is None and not inner:
        encoder = whole.get_encoder() if config.is_encoder_decoder else whole
    name = next((name for name, module in whole.named_modules() if module is encoder), "")
    if encoder is not None:
        found = Found(type(encoder), encoder.config, name)
        if found.hears if wanted == "audio" else found.has_grids or "pixel_values" in found.keywords or found.hears:
            return found
    raise ValueError(
        f"{type(whole).__name__} (model_type {config.model_type!r}): expected an encoder of "
        f"{wanted or 'images or sound'}, found none. Give a vision or audio model."
    )


def source(name: str | Path | None, config: Mapping[str, Any] | None) -> tuple[Path | None, Any]:
    """The directory with the weights, None where they are filled later, and the configuration of the whole model.

    Raises:
        FileNotFoundError, ConnectionError: as `resolve`.
        ValueError: neither a name nor a configuration.
    """
    from transformers import AutoConfig

    if config is not None:
        own = dict(config)
        return None, AutoConfig.for_model(own.pop("model_type"), **own)
    if name is None:
        raise ValueError("expected a name or a directory, or a config, found neither.")
    directory = resolve(name)
    return directory, AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def as_json(config: Any) -> dict[str, Any]:
    """A configuration as a file holds it, for `source` to read again."""
    return json.loads(config.to_json_string(use_diff=False))


def check_options(found: Found, layer: int | None, select: str, both: bool) -> None:
    """Refuses options of an `HFEncoder` that its encoder has no use for.

    Raises:
        ValueError: naming them.
    """
    kind = found.kind.__name__
    if select not in ("all", "patch"):
        raise ValueError(f"select: expected 'all' or 'patch', found {select!r}")
    if select == "patch" and (found.hears or found.has_grids or "patch_size" not in found.config.to_dict()):
        raise ValueError(f"select='patch': {kind} has no class token before its rows. Take select='all'.")
    if select == "patch" and "spatial_shapes" in found.keywords:
        raise ValueError(f"select='patch': {kind} has patches alone. Take select='all'.")
    if layer is not None and found.has_grids:
        raise ValueError(
            f"layer={layer}: the layers of {kind} hold patches in the order of its windows, not of the image. Take "
            "layer=None, the merged rows."
        )
    if layer is not None and not -found.config.num_hidden_layers - 1 <= layer <= found.config.num_hidden_layers:
        raise ValueError(f"layer={layer}: {kind} has hidden_states of 0 to {found.config.num_hidden_layers}")
    if both:
        raise ValueError("frozen and gradient_checkpointing: a frozen encoder keeps no activations. Take one of them.")


def fresh(found: Found, dtype: torch.dtype | None) -> Any:
    """The encoder with weights of its initialisation, in evaluation mode."""
    return found.kind(found.config).to(dtype or torch.float32).eval()


def read(found: Found, directory: Path, dtype: torch.dtype | None) -> Any:
    """The encoder with its weights; of the others no tensor is read, and none at all onto the meta device.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`, and naming tensors that are missing or surplus.
    """
    if torch.empty(0).is_meta:  # where tensors have no memory to read into
        return fresh(found, dtype or open_checkpoint(directory).dtype)
    checkpoint = open_checkpoint(directory)  # refuses what is cut, quantised, or would run code
    renamed = {rf"^(?:model\.)?{found.name}\.(?:vision_model\.)?": ""} if found.name else None
    encoder, report = found.kind.from_pretrained(
        directory,
        config=found.config,
        dtype=dtype or checkpoint.dtype,
        key_mapping=renamed,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = set(report["missing_keys"])
    if _SPECAUGMENT in missing:
        logger.info("%s lacks %s: nothing is masked in training.", directory, _SPECAUGMENT)
        encoder.config.apply_spec_augment = False
        missing.discard(_SPECAUGMENT)
    parts = {name for name, _ in encoder.named_children()}
    surplus = {name for name in report["unexpected_keys"] if name.split(".")[0] in parts}
    told = [f"missing: {name}" for name in sorted(missing)] + [f"surplus: {name}" for name in sorted(surplus)]
    if told:
        lines = "\n  ".join(told)
        raise ValueError(
            f"{directory}: expected the tensors of {found.kind.__name__}, found {len(told)} differences.\n  {lines}"
        )
    return encoder


def checkpoint_layers(encoder: Any) -> None:
    """Has each layer computed again in the backward pass."""
    options = {"use_reentrant": False}
    try:
        enable = encoder.activation_checkpointing_enable
    except AttributeError:  # the name before transformers 5.2x
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        enable(activation_checkpointing_kwargs=options)
