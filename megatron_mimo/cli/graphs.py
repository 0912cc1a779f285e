"""`graphs:` of a recipe: forward, loss and backward pass of a step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.recipe import Graphs
from megatron_mimo.cli.settings import Settings
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf.encoder import HFEncoder, encoder_of
from megatron_mimo.launch import Run
from megatron_mimo.training import StepGraphs, TrainingControl


def with_graphs(settings: Settings, graphs: Graphs | None) -> Settings:
    """Megatron's settings, with what graphs need of them where they do not say otherwise."""
    if graphs is None:
        return settings
    # Megatron's own switch makes no graph here, but kernels keep from the host what no graph can hold.
    needed = {"batch_p2p_sync": False, "cuda_graph_impl": "full_iteration"}
    return replace(settings, transformer=needed | dict(settings.transformer))


def step_graphs(graphs: Graphs | None) -> StepGraphs | None:
    """As a `Trainer` takes them."""
    return None if graphs is None else StepGraphs(**graphs.model_dump())


def check_graphs(graphs: Graphs | None, config: MimoModelConfig, settings: Settings, run: Run) -> None:
    """Refuses what a step as one CUDA graph cannot be right with.

    Raises:
        Refused: an encoder that reads on the host what lies on the device.
        ValueError: as `StepGraphs.check`.
    """
    asked = step_graphs(graphs)
    if asked is None:
        return
    ddp = DistributedDataParallelConfig(**settings.ddp)
    asked.check(config, run.layout, run.device, ddp, TrainingControl(), run.graph_safe_rng)
    for modality in config.modality_submodules:
        encoders = cast(Mapping[str, object], config.submodule_specs(modality).get("encoders") or {})
        for name, spec in encoders.items():
            if isinstance(spec, ModuleSpec) and spec.module is HFEncoder and encoder_of(spec).tells_rows:
                raise Refused(
                    f"graphs: {modality}/encoders/{name} is {encoder_of(spec).kind.__name__}, whose masks or grids the "
                    "host reads to know the rows of each item, which no CUDA graph allows; leave graphs out"
                )
