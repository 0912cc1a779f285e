"""A vision-language model: CLIP ViT-L/14 at 336 pixels reads four images a sample for a 1.2 B language model.

The data is random, as with Megatron's --mock-data: this recipe is there to be timed and to be copied.
"""

from argparse import Namespace
from collections.abc import Sequence

import torch
from megatron.core.models.multimodal.llava_model import MultimodalProjector
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo import MimoModelConfig, VisionModalitySubmodules, specs
from megatron_mimo.training import encoder_config_from_args, language_spec_from_args

SIDE, PATCH = 336, 14
IMAGES = 4
IMAGE_ROWS = (SIDE // PATCH) ** 2 + 1  # the patches and the class token
IMAGE_TOKEN = -200
SAMPLES = 4096

VISION = dict(num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16)


def image_spec(vision: TransformerConfig, projection: TransformerConfig, side: int = SIDE) -> ModuleSpec:
    """The encoder and its projection, in plain torch with fused attention: layers that CUDA graphs can replay.

    Args:
        vision: of the encoder.
        projection: whose `hidden_size` is the language model's.
        side: of the images, in pixels.
    """
    clip = specs.clip_vit_spec(vision, "torch", patch_dim=PATCH, img_h=side, img_w=side)
    clip.params["transformer_layer_spec"] = specs.with_fused_attention(clip.params["transformer_layer_spec"])
    return ModuleSpec(
        module=VisionModalitySubmodules,
        submodules={
            "encoders": {"clip": clip},
            "input_projections": [
                ModuleSpec(
                    module=MultimodalProjector,
                    params=dict(
                        config=projection,
                        submodules=specs.projection_spec(projection, "torch").submodules,
                        projector_type="mlp",
                        input_size=vision.hidden_size,
                    ),
                )
            ],
        },
    )


def model_config(args: Namespace) -> MimoModelConfig:
    """The model; sizes of the language model are Megatron's arguments."""
    projection = dict(
        num_layers=1,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,  # not used, but checked
    )
    images = image_spec(encoder_config_from_args(args, **VISION), encoder_config_from_args(args, **projection))
    return MimoModelConfig(
        language_model=language_spec_from_args(args),
        modality_submodules={"images": images},
        special_token_ids={"images": IMAGE_TOKEN},
    )


class RandomSamples(Sequence):
    """Random pixels and ids that depend on nothing but the sample's index.

    Args:
        length: tokens of a sample, `IMAGES * IMAGE_ROWS` of which are images'.
        vocabulary: ids are below it.
        offset: of the index; a range of its own for each split.
        side: of the images, in pixels.
    """

    def __init__(self, length: int, vocabulary: int, offset: int = 0, side: int = SIDE) -> None:
        self._length, self._vocabulary, self._offset, self._side = length, vocabulary, offset, side

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids `[S]`, its images at the beginning, each followed by text; and pixels `[IMAGES, 3, side, side]`."""
        generator = torch.Generator().manual_seed(self._offset + index)
        ids = torch.randint(self._vocabulary, (self._length,), generator=generator)
        rows, turn = (self._side // PATCH) ** 2 + 1, self._length // IMAGES
        for image in range(IMAGES):
            ids[image * turn : image * turn + rows] = IMAGE_TOKEN
        return ids, torch.randn(IMAGES, 3, self._side, self._side, generator=generator)


def datasets(args: Namespace, samples: Sequence[int | None]) -> tuple[RandomSamples, RandomSamples, None]:
    """Random samples to train and to validate on."""
    del samples  # an epoch is repeated as often as it takes
    vocabulary = args.padded_vocab_size
    return (
        RandomSamples(args.seq_length, vocabulary),
        RandomSamples(args.seq_length, vocabulary, offset=10 * SAMPLES),
        None,
    )


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, object]:
    """Keyword arguments of `MimoModel.forward`; text alone is learned."""
    ids = torch.stack([ids for ids, _ in samples])
    labels = ids.roll(-1, dims=1)
    return {
        "input_ids": ids,
        "labels": labels.clamp(min=0),
        "loss_mask": (labels >= 0).float(),
        "modality_inputs": {"images": {"clip": {"images": torch.cat([pixels for _, pixels in samples])}}},
    }
