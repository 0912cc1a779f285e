"""Input and output widths of modules, where their kind tells them."""

from __future__ import annotations

from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import nn

_KEEPS_WIDTH = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity)


def input_width(module: nn.Module) -> int | None:
    """Last dim of what `module` takes; None where its kind does not tell.

    Example:
        >>> input_width(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5)))
        3
    """
    match module:
        case nn.Linear():
            return module.in_features
        case ColumnParallelLinear() | RowParallelLinear() | MLP():
            return module.input_size
        case MultimodalProjector():
            return input_width(module.encoder)
        case nn.Sequential():
            return next((input_width(m) for m in module if not isinstance(m, _KEEPS_WIDTH)), None)
    return None


def output_width(module: nn.Module) -> int | None:
    """Last dim of what `module` gives; None where its kind does not tell.

    Example:
        >>> output_width(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5)))
        5
    """
    match module:
        case nn.Linear():
            return module.out_features
        case ColumnParallelLinear() if not module.gather_output:
            return None
        case ColumnParallelLinear() | RowParallelLinear():
            return module.output_size
        case MultimodalProjector() | MLP() | VisionModule():
            return module.config.hidden_size
        case nn.Sequential():
            changes = [m for m in module if not isinstance(m, _KEEPS_WIDTH)]
            return output_width(changes[-1]) if changes else None
    return None
