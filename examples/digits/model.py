"""The model of the demo: a small GPT that reads images and tones, and draws and dials them by flow."""

import math

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from examples.digits.data import AUDIO_ROWS, BAND, CLIP, IMAGE_ROWS, LENGTH, PATCH, TOKEN, VOCABULARY
from megatron_mimo import (
    AudioModalitySubmodules,
    MimoModel,
    MimoModelConfig,
    VisionModalitySubmodules,
)
from megatron_mimo.decoders.flow_transformer import FlowTransformerDecoder
from megatron_mimo.decoders.inputs import QueryInput
from megatron_mimo.decoders.tokenizers import LatentTokenizer
from megatron_mimo.specs import language_layer_spec

HIDDEN = 128


class Eye(nn.Module):
    """Reads an image: three convolutions, four rows."""

    width = 64

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GELU(),
            nn.Conv2d(64, self.width, 3, padding=1, stride=2), nn.GELU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """`[n, 1, 8, 8] -> [n, IMAGE_ROWS, width]`."""
        return self.layers(images).flatten(2).transpose(1, 2)


class Ear(nn.Module):
    """Hears a clip: the log power spectrum of eight overlapping frames of 30 ms, nothing learned."""

    frame, hop = 240, 112
    width = frame // 2 + 1

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[n, CLIP] -> [n, AUDIO_ROWS, width]`."""
        frames = waveforms.unfold(1, self.frame, self.hop)
        window = torch.hann_window(self.frame, device=waveforms.device)
        power = torch.fft.rfft(frames * window).abs().square()
        return torch.log(power + 1e-3) / 4


class CosineBands(nn.Module):
    """A codec of clips: their cosine transform (DCT-II, orthonormal), cut into bands of 250 Hz.

    A tone of any phase is a few neighbouring coefficients, where in the waveform it is all samples. The
    eight bands below 2 kHz hold every DTMF frequency; what lies above is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        k = torch.arange(AUDIO_ROWS * BAND, dtype=torch.float64)[:, None]
        time = torch.arange(CLIP, dtype=torch.float64) + 0.5
        basis = torch.cos(math.pi / CLIP * k * time) * math.sqrt(2 / CLIP)
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis.float(), persistent=False)

    def encode(self, clips: Tensor) -> Tensor:
        """`[n, CLIP] -> [n, BAND, AUDIO_ROWS, 1]`: a band is a column of channels."""
        return (clips @ self.basis.T).unflatten(1, (AUDIO_ROWS, BAND)).transpose(1, 2)[..., None]

    def decode(self, bands: Tensor) -> Tensor:
        """`[n, BAND, AUDIO_ROWS, 1] -> [n, CLIP]`."""
        return bands[..., 0].transpose(1, 2).flatten(1) @ self.basis


def build_model(*, tensor_parallel: int = 1, sequence_parallel: bool = False) -> MimoModel:
    """The model on this rank, the same weights whatever the layout."""
    config = TransformerConfig(
        num_layers=3,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,  # draws whole matrices, then cuts: equal for every layout
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        calculate_per_token_loss=True,  # our losses are divided by global counts: sum gradients
    )
    language_model = ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": language_layer_spec(config),
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
        },
    )
    return MimoModel(
        MimoModelConfig(
            language_model=language_model,
            modality_submodules={"images": images_spec(), "audio": audio_spec()},
            special_token_ids={"images": TOKEN["<image>"], "audio": TOKEN["<tone>"]},
            generation_token_ids={"images": TOKEN["<draw>"], "audio": TOKEN["<dial>"]},
        )
    )


def images_spec() -> ModuleSpec:
    """Reads through `Eye`; draws four patches together by rectified flow."""
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"image_shape": (1, 8, 8)},
        submodules={
            "encoders": {"eye": ModuleSpec(module=Eye)},
            "input_projections": [linear(Eye.width, HIDDEN)],
            "generation_input": queries(IMAGE_ROWS),
            "decoders": {
                "pixels": ModuleSpec(
                    module=FlowTransformerDecoder,
                    params={
                        "width": HIDDEN,
                        "target_width": PATCH * PATCH,
                        "targets_per_item": IMAGE_ROWS,
                        "rows_per_item": IMAGE_ROWS,
                        "hidden_width": 96,
                        "depth": 3,
                        "heads": 4,
                    },
                )
            },
        },
    )


def audio_spec() -> ModuleSpec:
    """Hears through `Ear`; dials eight bands of a clip's spectrum together by rectified flow."""
    codec = ModuleSpec(
        module=LatentTokenizer,
        params={
            "module": ModuleSpec(module=CosineBands),
            "latent_shape": (BAND, AUDIO_ROWS, 1),
            "scale": 3.0,  # measured: brings the coefficients' standard deviation to 0.8
        },
    )
    return ModuleSpec(
        module=AudioModalitySubmodules,
        submodules={
            "encoders": {"ear": ModuleSpec(module=Ear)},
            "input_projections": [linear(Ear.width, HIDDEN)],
            "generation_input": queries(AUDIO_ROWS),
            "decoders": {
                "bands": ModuleSpec(
                    module=FlowTransformerDecoder,
                    params={
                        "width": HIDDEN,
                        "target_width": BAND,
                        "targets_per_item": AUDIO_ROWS,
                        "rows_per_item": AUDIO_ROWS,
                        "hidden_width": 96,
                        "depth": 3,
                        "heads": 4,
                        "tokenizer": codec,
                    },
                )
            },
        },
    )


def linear(inputs: int, outputs: int) -> ModuleSpec:
    """Spec of a linear projection."""
    return ModuleSpec(module=nn.Linear, params={"in_features": inputs, "out_features": outputs})


def queries(rows: int) -> ModuleSpec:
    """Spec of what the language model sees where it generates: a learned query a position."""
    return ModuleSpec(
        module=QueryInput, params={"hidden_size": HIDDEN, "rows_per_item": rows}
    )
