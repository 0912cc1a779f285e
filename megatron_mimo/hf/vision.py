"""Vision towers as Megatron layers, which split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mimo import specs
from megatron_mimo.hf.language import precision
from megatron_mimo.hf.shares import check_tensor_size

Select = Literal["patch", "all"]


class VisionTower(CLIPViTModel):
    """CLIP's or SigLIP's encoder up to the layer whose states are taken.

    Args:
        transformer_config: of its layers, only those that are computed.
        select: ``patch`` leaves the class token out.
        final_norm: whether SigLIP's last norm is applied.
        pg_collection: its process groups; None for Megatron's global ones.
        options: as `CLIPViTModel` takes them.
    """

    def __init__(
        self,
        transformer_config: TransformerConfig,
        *,
        select: Select = "patch",
        final_norm: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        **options: Any,
    ) -> None:
        super().__init__(transformer_config, pg_collection=pg_collection, **options)
        self._skipped = self.class_token_len if self.add_class_token and select == "patch" else 0
        if not final_norm:
            self.ln_post = None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """States `[n, s, h]` of images `[n, 3, height, width]`, `s` patches (and the class token before them).

        Raises:
            ValueError: images of another size than the tower's positions are learned for.
        """
        expected = (3, self.img_h, self.img_w)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values: expected [n, {', '.join(map(str, expected))}], found {list(pixel_values.shape)}. The "
                "tower's positions are learned for that size: let the model's image processor resize the images."
            )
        pixels = pixel_values.to(self.conv1.weight.dtype)
        return super().forward(pixels)[:, self._skipped :]


def tower_spec(
    settings: Mapping[str, Any],
    subtype: Literal["clip", "siglip"],
    *,
    layers: int,
    final_norm: bool,
    select: Select,
    dtype: torch.dtype,
    tensor_parallel: int,
    backend: specs.Backend = "auto",
) -> ModuleSpec:
    """The spec of a `VisionTower` with a family's settings.

    Args:
        settings: of `hf.family.settings_of`.
        subtype: which of the two.
        layers: how many of them to build.
        final_norm: whether SigLIP's last norm is applied.
        select: whether the class token is among the states.
        dtype: of the weights.
        tensor_parallel: ranks that share each layer.
        backend: what the layers compute with.

    Raises:
        ValueError: a tensor-parallel size that does not share its layers out.
    """
    check_tensor_size(tensor_parallel, "the vision tower", settings)
    own = {"image_size", "patch_size"}
    fields = {name: value for name, value in settings.items() if name not in own}
    config = TransformerConfig(
        **(
            fields
            | precision(dtype)
            | {"num_layers": layers, "tensor_model_parallel_size": tensor_parallel}
            | {"hidden_dropout": 0.0, "bias_dropout_fusion": False}
        )
    )
    spec = specs.clip_vit_spec(
        config,
        backend,
        patch_dim=settings["patch_size"],
        img_h=settings["image_size"],
        img_w=settings["image_size"],
        add_class_token=subtype == "clip",
        class_token_len=int(subtype == "clip"),
        model_subtype=subtype,
    )
    # The groups come with the model that the tower is built into.
    params = {name: value for name, value in spec.params.items() if name != "pg_collection"}
    if specs.choose_backend(backend) != "transformer_engine" and not config.attention_dropout:
        params["transformer_layer_spec"] = specs.with_fused_attention(params["transformer_layer_spec"])
    return ModuleSpec(module=VisionTower, params=params | {"select": select, "final_norm": final_norm})
