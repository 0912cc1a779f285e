"""Floating-point operations of a step, counted in the open.

Every weight matrix meets every row once, and a matrix product takes two operations for each weight:

    forward of a part = 2 * weights * rows  +  4 * (attention width) * rows * (keys each row sees)

A backward pass costs as much again for the gradient of the weights, where they train, and as much again
for the gradient of the input, where something in the part or before it trains. Logits are needed at the positions
whose label counts, and counted there alone, wherever a model computes them. What activation
recomputation repeats is not counted: these are the model's operations, not the hardware's. Not counted
either are norms, activations, losses and the lookup of embeddings, which multiply no matrices, and
attention in encoders and decoders that do not use Megatron's. Of sequences packed in one row each attends to
itself alone; they count as if all had their mean length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import nn

from megatron_mimo.data.step import Counts
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder
from megatron_mimo.model import MimoModel
from megatron_mimo.training.speed import counts as names

LANGUAGE = "language_model"

# The kinds of parts in the order in which the data goes through them.
ORDER = {
    "encoders": 0, "generation_input": 1, "input_projections": 1, LANGUAGE: 2, "output_projections": 3, "decoders": 4,
}  # fmt: skip

# Dense peak in bfloat16 and float16 as the makers' data sheets state it, without sparsity, TFLOP/s.
# The first name that a device's name contains counts.
STATED_PEAKS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100": 989.4,
    "L40S": 362.0,
    "A100": 312.0,
    "A10": 125.0,
}


@dataclass(frozen=True)
class PartSize:
    """What a part of the model multiplies with, over all tensor- and expert-parallel ranks and stages.

    Args:
        weights: elements of weight matrices that each row meets.
        trained: those of them that train.
        trainable: elements of all its parameters that train, tables and norms too.
        logits: those of `weights` that make logits: needed at the positions whose label counts, nowhere else.
        attention: sum over its attention layers of heads times channels, half of it where the mask
            is causal.
        positions: inside an encoder for each item, inside a decoder for each token; 0 where it has one
            for each row.
    """

    weights: float = 0.0
    trained: float = 0.0
    attention: float = 0.0
    positions: float = 0.0
    trainable: float = 0.0
    logits: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether any of it trains."""
        return self.trained > 0 or self.trainable > 0


def part_sizes(chunks: Sequence[MimoModel]) -> dict[str, PartSize]:
    """Size of every part by name: `language_model`, `images/encoders/clip`, `images/decoders/pixels`, ...

    Collective over the pipeline-parallel group: one all-reduce of a few numbers.

    Args:
        chunks: this rank's, before or after they are wrapped.
    """
    parts = {name: PartSize() for name in _part_names(chunks[0])}
    for chunk in chunks:
        for name, module in _parts_here(chunk).items():
            parts[name] = _sum(parts[name], _size(module, chunk))
    group = chunks[0].pg_collection.pp
    if group.size() == 1:
        return parts
    # Before training a model may still lie on the host; its groups' collectives run where it will be.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed = torch.tensor([list(vars(part).values()) for part in parts.values()], dtype=torch.float64, device=device)
    dist.all_reduce(packed, group=group)
    return {name: PartSize(*values) for name, values in zip(parts, packed.tolist())}


def step_flops(sizes: Mapping[str, PartSize], counts: Counts, *, training: bool = True) -> dict[str, float]:
    """Operations of a step by part, over all ranks.

    Args:
        sizes: from `part_sizes`.
        counts: of the step, from `megatron_mimo.training.speed.counts`.
        training: count the backward pass too.

    Example:
        >>> counts = {("positions",): 10.0, ("samples",): 2.0}
        >>> step_flops({"language_model": PartSize(weights=100.0, trained=100.0)}, counts)
        {'language_model': 6000.0}
    """
    flops = {}
    for name, size in sizes.items():
        rows, keys = _rows_and_keys(name, size, counts)
        forward = 2 * (size.weights - size.logits) * rows + 4 * size.attention * rows * keys
        forward += 2 * size.logits * counts.get(names.TOKENS, rows)
        trained = size.trained / size.weights if size.weights else 0.0
        inputs = any(other.trains for part, other in sizes.items() if part == name or _before(part, name))
        flops[name] = forward * (1 + trained + inputs if training else 1)
    return flops


def stated_peak(device_name: str) -> float | None:
    """Dense 16-bit peak of a GPU in FLOP/s as its data sheet states it; None for a device not listed.

    Example:
        >>> stated_peak("NVIDIA H100 80GB HBM3")
        989400000000000.0
    """
    peaks = (peak for name, peak in STATED_PEAKS.items() if name in device_name)
    peak = next(peaks, None)
    return None if peak is None else peak * 1e12


def _part_names(model: MimoModel) -> list[str]:
    """Every part of the whole model, the same on all stages."""
    found = [LANGUAGE]
    for modality, spec in model.mimo_config.modality_submodules.items():
        parts = spec.submodules or {}
        for kind in ("encoders", "decoders"):
            found += [f"{modality}/{kind}/{name}" for name in parts.get(kind) or {}]
        for kind in ("input_projections", "output_projections", "generation_input"):
            found += [f"{modality}/{kind}"] if parts.get(kind) else []
    return found


def _parts_here(model: MimoModel) -> dict[str, nn.Module]:
    """The parts that this chunk has."""
    parts: dict[str, nn.Module] = {LANGUAGE: model.language_model}
    for modality, submodule in names.submodules_of(model).items():
        for kind, named in (("encoders", submodule.encoders), ("decoders", submodule.decoders)):
            for name, module in named.items():
                parts[f"{modality}/{kind}/{name}"] = module
        for kind in ("input_projections", "output_projections"):
            if any(submodule.get_submodule(kind).children()):
                parts[f"{modality}/{kind}"] = submodule.get_submodule(kind)
        if submodule.generation_input is not None:
            parts[f"{modality}/generation_input"] = submodule.generation_input
    return parts


def _size(module: nn.Module, model: MimoModel) -> PartSize:
    """Size of a part of this chunk, over all ranks that share its layers."""
    lookups = _lookup_weights(module)
    if module is model.language_model and model.post_process and model.share_embeddings_and_output_weights:
        # A tied output layer multiplies the very table that the embedding looks up.
        lookups.discard(id(model.shared_embedding_or_output_weight()))
    head = _output_weight(module, model)
    weights = trained = trainable = logits = 0.0
    for name, parameter in module.named_parameters():
        trainable += parameter.numel() if parameter.requires_grad else 0.0
        # Other matrices (learned queries, positions, class tokens) are added, not multiplied with.
        multiplies = parameter.dim() >= 2 and "weight" in name.rpartition(".")[2]
        if not multiplies or id(parameter) in lookups:
            continue
        elements = parameter.numel() * _share(name, parameter, model)
        weights += elements
        trained += elements if parameter.requires_grad else 0.0
        logits += elements if parameter is head else 0.0
    attention = sum(_attention_width(layer) for layer in module.modules() if isinstance(layer, Attention))
    return PartSize(weights, trained, attention, _positions(module), trainable, logits)


def _output_weight(module: nn.Module, model: MimoModel) -> nn.Parameter | None:
    """What multiplies hidden states to logits, in the language model of the last stage."""
    if module is not model.language_model or not model.post_process:
        return None
    if model.share_embeddings_and_output_weights:
        return cast(nn.Parameter, model.shared_embedding_or_output_weight())
    return getattr(getattr(module, "output_layer", None), "weight", None)


def _positions(module: nn.Module) -> float:
    """Positions inside an encoder for each item, inside a decoder for each token; 0: as many as rows."""
    if isinstance(module, CLIPViTModel):
        return float(module.seq_length)
    if isinstance(module, RectifiedFlowDecoder):
        return module.targets_per_item / module.rows_per_item
    return 0.0


def _lookup_weights(module: nn.Module) -> set[int]:
    """Ids of tables that are looked up, not multiplied."""
    kinds = (nn.Embedding, VocabParallelEmbedding)
    return {id(layer.weight) for layer in module.modules() if isinstance(layer, kinds)}


def _share(name: str, parameter: nn.Parameter, model: MimoModel) -> float:
    """How many ranks' shards a row meets for each one that is here."""
    groups, config = model.pg_collection, model.config
    if ".experts." in name:  # of which a row meets the router's choice
        ranks = groups.ep.size() * groups.expt_tp.size()
        return ranks * config.moe_router_topk / config.num_moe_experts
    return groups.tp.size() if getattr(parameter, "tensor_model_parallel", False) else 1.0


def _attention_width(layer: Attention) -> float:
    width = layer.config.num_attention_heads * layer.config.kv_channels
    return width * (0.5 if layer.attn_mask_type == AttnMaskType.causal else 1.0)


def _sum(one: PartSize, other: PartSize) -> PartSize:
    return PartSize(*(a + b for a, b in zip(vars(one).values(), vars(other).values())))


def _before(part: str, other: str) -> bool:
    """Whether `part` feeds `other`: through the language model all that is read feeds all that is written."""
    (modality, kind), (theirs, to) = (_modality_and_kind(name) for name in (part, other))
    if ORDER[kind] >= ORDER[to]:
        return False
    return modality == theirs or ORDER[kind] <= ORDER[LANGUAGE] <= ORDER[to]


def _modality_and_kind(name: str) -> tuple[str, str]:
    modality, _, kind = name.partition("/")
    return modality, kind.partition("/")[0] or modality


def _rows_and_keys(name: str, size: PartSize, counts: Counts) -> tuple[float, float]:
    """Rows that go through a part in the step, and how many rows each attends to."""
    if name == LANGUAGE:
        positions = counts[names.POSITIONS]
        return positions, positions / max(counts[names.SAMPLES], 1.0)
    modality, kind, *module = name.split("/")
    if kind == "encoders":
        items = counts[names.items(modality, module[0])]
        rows = items * size.positions if size.positions else counts.get(names.rows_read(modality), 0.0)
        return rows, rows / max(items, 1.0)
    if kind == "input_projections":
        return counts.get(names.rows_read(modality), 0.0), 0.0
    rows = counts.get(names.rows_written(modality), 0.0)
    return rows * (size.positions or 1.0), 0.0
