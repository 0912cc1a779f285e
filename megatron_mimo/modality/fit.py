"""How the modules of a modality fit together: their number, their widths where their kind tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.modality.parts import only_decoder

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


def per_module(projections: Sequence[nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The projection of each module: one for all, or one each; none where there is none."""
    if len(projections) == 1:
        return dict.fromkeys(modules, projections[0])
    return dict(zip(modules, projections))


def own_projections(projections: Sequence[nn.Module], modules: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module]]:
    """The projection that a module shares with no other, where there are several."""
    if len(projections) < 2:
        return {}
    return {name: (projection,) for name, projection in zip(modules, projections)}


def check_reading(encoders: Mapping[str, nn.Module], projections: Sequence[nn.Module]) -> None:
    """Refuses encoders and input projections that do not fit.

    Raises:
        ValueError: their number, a width, or a module set to sequence parallelism.
    """
    _check_count("input_projections", projections, "encoders", encoders)
    for name, projection in per_module(projections, encoders).items():
        given, taken = output_width(encoders[name]), input_width(projection)
        _check_width(f"encoder {name!r}", given, "its input projection", taken)
    _check_whole_rows({f"input_projections[{index}]": module for index, module in enumerate(projections)})
    _check_whole_rows({f"encoder {name!r}": one for name, one in encoders.items() if isinstance(one, VisionModule)})


def check_writing(
    decoders: Mapping[str, Decoder], projections: Sequence[nn.Module], feed: GenerationInput | None
) -> None:
    """Refuses output projections, decoders and a generation input that do not fit.

    Raises:
        ValueError: their number, a width, decoders that read different positions, or a generation input that shows
            other targets than its decoder learns, or what that decoder reads off.
    """
    _check_count("output_projections", projections, "decoders", decoders)
    for name, projection in per_module(projections, decoders).items():
        _check_width("the output projection", output_width(projection), f"decoder {name!r}", decoders[name].width)
    _check_whole_rows({f"output_projections[{index}]": module for index, module in enumerate(projections)})
    rules = {name: decoder.position_rule for name, decoder in decoders.items()}
    if len(set(rules.values())) > 1:
        raise ValueError(
            f"decoders of one modality must read the same positions, got {rules}. "
            "Give them one position_rule or put them in two modalities."
        )
    if not decoders or feed is None:
        return
    feed.check_rule(next(iter(rules.values())))
    read = only_decoder(decoders, feed.decoder)
    if read is not None and feed.targets is not None and not feed.targets.part_of(decoders[read].targets):
        raise ValueError(
            f"decoder {read!r} learns {decoders[read].targets}, but the {type(feed).__name__} that reads its targets "
            f"was built for {feed.targets}. Give it the decoder's: targets=decoder.targets."
        )


def check_widths(
    modality: str,
    hidden_size: int,
    encoders: Mapping[str, nn.Module],
    decoders: Mapping[str, Decoder],
    input_projections: Sequence[nn.Module],
    output_projections: Sequence[nn.Module],
) -> None:
    """Refuses modules whose known widths do not fit the language model's.

    Raises:
        ValueError: naming the modality, the module and both widths.
    """
    sides = {f"encoder {name!r}": ("output", output_width(encoder)) for name, encoder in encoders.items()}
    if input_projections:
        sides = {f"input_projections[{i}]": ("output", output_width(one)) for i, one in enumerate(input_projections)}
    sides |= {f"output_projections[{i}]": ("input", input_width(one)) for i, one in enumerate(output_projections)}
    if not output_projections:
        sides |= {f"decoder {name!r}": ("row", decoder.width) for name, decoder in decoders.items()}
    for what, (side, found) in sides.items():
        if found not in (None, hidden_size):
            raise ValueError(
                f"modality {modality!r}: {what} has {side} width {found}, the language model's hidden "
                f"size is {hidden_size}. Make them equal or add a projection."
            )


def _check_count(key: str, projections: Sequence[nn.Module], of: str, modules: Mapping[str, nn.Module]) -> None:
    if modules and len(projections) not in (0, 1, len(modules)):
        raise ValueError(
            f"{len(projections)} {key} for {len(modules)} {of} {sorted(modules)}; "
            f"give none, one for all, or one for each"
        )


def _check_width(giver: str, given: int | None, taker: str, taken: int | None) -> None:
    if given is not None and taken is not None and given != taken:
        raise ValueError(f"{giver} gives width {given}, but {taker} takes width {taken}")


def _check_whole_rows(modules: Mapping[str, nn.Module]) -> None:
    for what, module in modules.items():
        if isinstance(module, MegatronModule) and module.config.sequence_parallel:
            raise ValueError(
                f"{what} ({type(module).__name__}) has sequence_parallel=True, but it is given whole rows "
                "on every tensor-parallel rank and would take them for shards. Set it to False in the "
                "configuration of encoders and projections; the language model may keep it."
            )
