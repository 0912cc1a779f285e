"""Megatron models that read and write several modalities.

Names are imported at first use, so that integer-only parts never wait for Megatron-Core.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from megatron_mimo.compat.notices import Answered

if TYPE_CHECKING:
    from megatron_mimo.config import MimoModelConfig
    from megatron_mimo.generation.in_the_loop import sample_flow, sample_one_by_one
    from megatron_mimo.hf.codec import HFCodec
    from megatron_mimo.hf.encoder import HFEncoder
    from megatron_mimo.hf.image_codec import HFImageCodec
    from megatron_mimo.launch import exit_on_error, initialize, shutdown
    from megatron_mimo.losses import LossTerm, global_counts, total_loss
    from megatron_mimo.modality.encoding import EncodedRows
    from megatron_mimo.modality.kinds import AudioModalitySubmodules, VisionModalitySubmodules
    from megatron_mimo.modality.submodules import ModalitySubmodules
    from megatron_mimo.model import MimoModel
    from megatron_mimo.output import MimoOutput, ModalityOutput, loss_terms
    from megatron_mimo.placement import Placement, build_placement
    from megatron_mimo.pretrained import (
        from_pretrained,
        load_pretrained,
        load_processor,
        pretrained_config,
        save_pretrained,
    )

    __version__: str

_HOMES = {
    "AudioModalitySubmodules": "modality.kinds",
    "EncodedRows": "modality.encoding",
    "HFCodec": "hf.codec",
    "HFEncoder": "hf.encoder",
    "HFImageCodec": "hf.image_codec",
    "LossTerm": "losses",
    "MimoModel": "model",
    "MimoModelConfig": "config",
    "MimoOutput": "output",
    "ModalityOutput": "output",
    "ModalitySubmodules": "modality.submodules",
    "Placement": "placement",
    "VisionModalitySubmodules": "modality.kinds",
    "build_placement": "placement",
    "exit_on_error": "launch",
    "from_pretrained": "pretrained",
    "global_counts": "losses",
    "initialize": "launch",
    "load_pretrained": "pretrained",
    "load_processor": "pretrained",
    "loss_terms": "output",
    "pretrained_config": "pretrained",
    "sample_flow": "generation.in_the_loop",
    "sample_one_by_one": "generation.in_the_loop",
    "save_pretrained": "pretrained",
    "shutdown": "launch",
    "total_loss": "losses",
}

__all__ = sorted(_HOMES)

# Modules of version 0.1 that are gone; the last place that is looked into.
__path__.append(f"{__path__[0]}/moved")

# `from megatron_mimo import specs` comes here first, so that Megatron is imported within `Answered`.
_ROOMS = ("data", "decoders", "generation", "modality", "specs", "training")


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("megatron-mimo")
    with Answered():
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
