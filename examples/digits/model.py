"""The two models of the demo, each around a small GPT.

One reads images and tones, and draws and dials them by rectified flow. The other draws with the codes of a VQ
tokenizer, one after another.
"""

import math
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from examples.digits.data import (
    AUDIO_ROWS,
    BAND,
    CODE_LENGTH,
    IMAGE_ROWS,
    LENGTH,
    PATCH,
    TOKEN,
    VOCABULARY,
)
from examples.digits.tones import CLIP
from examples.digits.vq import CODES, GRID, DigitCodec
from megatron_mimo import AudioModalitySubmodules, MimoModelConfig, VisionModalitySubmodules
from megatron_mimo.decoders import (
    CodeInput,
    CodeTokenizer,
    DiscreteDecoder,
    FlowTransformerDecoder,
    LatentTokenizer,
    QueryInput,
)
from megatron_mimo.specs import language_layer_spec

HIDDEN = 96
"""Width of the language model."""


class Eye(nn.Module):
    """Reads an image: three convolutions, four rows."""

    width = 64

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, self.width, 3, padding=1, stride=2),
            nn.GELU(),
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


def flow_config(*, tensor_parallel: int = 1, sequence_parallel: bool = False) -> MimoModelConfig:
    """The model that reads and hears, and draws and dials by flow."""
    return MimoModelConfig(
        language_model=language_model(LENGTH, tensor_parallel, sequence_parallel),
        modality_submodules={"images": images_spec(), "audio": audio_spec()},
        special_token_ids={"images": TOKEN["<image>"], "audio": TOKEN["<tone>"]},
        generation_token_ids={"images": TOKEN["<draw>"], "audio": TOKEN["<dial>"]},
    )


def codes_config(codec: Path, *, tensor_parallel: int = 1, sequence_parallel: bool = False) -> MimoModelConfig:
    """The model that draws with the codes of a trained `DigitCodec`, whose weights are in the file `codec`."""
    return MimoModelConfig(
        language_model=language_model(CODE_LENGTH, tensor_parallel, sequence_parallel),
        modality_submodules={"images": code_images_spec(codec)},
        special_token_ids={},
        generation_token_ids={"images": TOKEN["<draw>"]},
    )


def language_model(length: int, tensor_parallel: int, sequence_parallel: bool) -> ModuleSpec:
    """A GPT for sequences of `length`. Its first weights are the same under every layout."""
    config = TransformerConfig(
        num_layers=3,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.06,  # Megatron's 0.02 is for wider models
        embedding_init_method_std=1.0,
        use_cpu_initialization=True,  # draws whole matrices and then cuts them
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
    )
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": language_layer_spec(config),
            "vocab_size": VOCABULARY,
            "max_sequence_length": length,
        },
    )


def images_spec() -> ModuleSpec:
    """Reads through `Eye`; draws the four patches of an image together by rectified flow."""
    return ModuleSpec(
        module=VisionModalitySubmodules,
        params={"image_shape": (1, 8, 8)},
        submodules={
            "encoders": {"eye": ModuleSpec(module=Eye)},
            "input_projections": [projection(Eye.width)],
            "generation_input": queries(IMAGE_ROWS),
            "decoders": {"pixels": flow(IMAGE_ROWS, PATCH * PATCH)},
        },
    )


def audio_spec() -> ModuleSpec:
    """Hears through `Ear`; dials the eight bands of a clip together by rectified flow."""
    codec = ModuleSpec(
        module=LatentTokenizer,
        params={
            "module": ModuleSpec(module=CosineBands),
            "latent_shape": (BAND, AUDIO_ROWS, 1),
            "scale": 3.0,  # brings the coefficients' standard deviation to about 0.8
        },
    )
    return ModuleSpec(
        module=AudioModalitySubmodules,
        submodules={
            "encoders": {"ear": ModuleSpec(module=Ear)},
            "input_projections": [projection(Ear.width)],
            "generation_input": queries(AUDIO_ROWS),
            "decoders": {"bands": flow(AUDIO_ROWS, BAND, tokenizer=codec)},
        },
    )


def code_images_spec(codec: Path) -> ModuleSpec:
    """Draws code by code: each position sees the code before it, and the decoder predicts the next."""
    tokenizer = ModuleSpec(
        module=CodeTokenizer,
        params={"module": ModuleSpec(module=DigitCodec, params={"weights": codec}), "grid": GRID},
    )
    return ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "generation_input": ModuleSpec(module=CodeInput, params={"hidden_size": HIDDEN}),
            "decoders": {
                "codes": ModuleSpec(
                    module=DiscreteDecoder,
                    params={
                        "width": HIDDEN,
                        "codebook_sizes": CODES,
                        "tokenizer": tokenizer,
                        "position_rule": "predecessor",
                    },
                )
            },
        },
    )


def projection(width: int) -> ModuleSpec:
    """From an encoder's rows to the language model's."""
    return ModuleSpec(module=nn.Linear, params={"in_features": width, "out_features": HIDDEN})


def queries(rows: int) -> ModuleSpec:
    """What the language model sees where it generates: a learned query at each position of a span."""
    return ModuleSpec(module=QueryInput, params={"hidden_size": HIDDEN, "rows_per_item": rows})


def flow(rows: int, values: int, **options) -> ModuleSpec:
    """A decoder that generates `values` values at each of the `rows` positions of a span."""
    return ModuleSpec(
        module=FlowTransformerDecoder,
        params={
            "width": HIDDEN,
            "target_width": values,
            "targets_per_item": rows,
            "rows_per_item": rows,
            "hidden_width": 96,
            "depth": 3,
            "heads": 4,
            "condition": "own",
            **options,
        },
    )
