"""`inspect`: what a step takes on the ranks of a layout, counted on tensors without memory, and its operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from PIL import Image

from megatron_mimo.axes import Layout
from megatron_mimo.batch import Batch
from megatron_mimo.cli.building import model_config
from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.laying_out import processor_of
from megatron_mimo.cli.models import Place, model_of
from megatron_mimo.cli.settings import Settings
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data import (
    PackedData,
    PackShape,
    ReadingOptions,
    Records,
    SampleProcessor,
    SoundWriter,
    Source,
    open_source,
)
from megatron_mimo.data.messages import Kind
from megatron_mimo.hf.language import gated_silu
from megatron_mimo.launch import pretended
from megatron_mimo.sharding import sequence_multiple
from megatron_mimo.specs import Backend, choose_backend
from megatron_mimo.training import TrainingControl
from megatron_mimo.training.footprint import Footprint, footprint, model_without_memory
from megatron_mimo.training.sources import batch_of
from megatron_mimo.training.speed.counts import count_batch
from megatron_mimo.training.speed.flops import part_sizes, step_flops

#: What layers may compute with.
BACKENDS: tuple[Backend, ...] = get_args(Backend)
#: Of a made-up record: a medium of each kind that the model reads or writes, and an answer of so many words.
WORDS, SIDE, SECONDS, RATE = 100, 448, 4, 16_000


@dataclass(frozen=True)
class Step:
    """A training step that is asked about.

    Args:
        tensor, pipeline, context, data: ranks along each axis.
        sequence_parallel: of the language model.
        dtype: of the weights.
        frozen: parts that do not train.
        length: positions of a pack.
        microbatches: packs of a step on each data-parallel rank.
        recompute: Megatron's granularity, "selective" or "full" (layer by layer); None keeps all activations.
        distributed_optimizer: whether data-parallel ranks share the optimizer's states out.
        data_path: whose first pack is counted; None makes one up.
        backend: what the layers will compute with; "auto": TransformerEngine, unless a GPU is here without it.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    dtype: str = "bfloat16"
    frozen: tuple[str, ...] = ()
    length: int = 4096
    microbatches: int = 1
    recompute: str | None = None
    distributed_optimizer: bool = False
    data_path: Path | None = None
    backend: Backend = "auto"

    @property
    def counted_backend(self) -> Backend:
        """The backend whose layers are counted."""
        if self.backend != "auto":
            return self.backend
        return choose_backend() if torch.cuda.is_available() else "transformer_engine"

    @property
    def layout(self) -> Layout:
        """Of all ranks."""
        world = self.tensor * self.pipeline * self.context * self.data
        return Layout(world, self.tensor, self.pipeline, context_parallel_size=self.context)

    @property
    def transformer(self) -> dict[str, Any]:
        """Further fields of the language model's configuration."""
        whole = dict(recompute_method="uniform", recompute_num_layers=1) if self.recompute == "full" else {}
        return {"recompute_granularity": self.recompute, **whole} if self.recompute else {}


def footprints(place: Place, step: Step) -> list[Footprint]:
    """What a step takes on the first rank of each pipeline stage.

    Raises:
        Refused: no pack can be made, or a layout that the model does not fit.
    """
    found, batch = [], None
    backend = step.counted_backend  # asked here: a run that is pretended has no GPU
    for stage in range(step.pipeline):
        # Ranks of a stage lie together; those of the next begin after all of them.
        with pretended(step.layout, stage * step.tensor * step.context * step.data) as run:
            config = _config(place, step)
            if backend == "transformer_engine":
                _with_its_kernels(config.language_config)
            batch = batch or _batch(place, config, step)
            shared = step.distributed_optimizer
            try:
                stage_s = footprint(
                    config,
                    run,
                    batch,
                    control=TrainingControl(frozen=step.frozen),
                    optimizer=OptimizerConfig(lr=1e-3, use_distributed_optimizer=shared),
                    ddp=DistributedDataParallelConfig(use_distributed_optimizer=shared),
                    backend=backend,
                    fused_adam=backend != "torch" or not USING_PYTORCH_OPTIMIZER,
                    microbatches=step.microbatches,
                )
            except (NotImplementedError, RuntimeError) as error:
                if not isinstance(error, NotImplementedError) and "meta tensors" not in str(error):
                    raise
                raise Refused(  # torch's words where a value is asked for
                    "memory: a part of the model looks at values of its inputs, which are not there before a step "
                    f"runs ({error}); count the model without that part"
                ) from error
            found.append(stage_s)
    return found


def operations(place: Place, step: Step) -> Mapping[str, float]:
    """Floating-point operations by part that a step needs on all ranks, as `training.speed.flops` counts them."""
    alone = replace(step, tensor=1, pipeline=1, context=1, data=1, sequence_parallel=False)
    with pretended(alone.layout) as run:
        config = _config(place, alone)
        model = model_without_memory(config, run, TrainingControl(frozen=step.frozen))
        flops = step_flops(part_sizes([model]), count_batch(_batch(place, config, alone), model))
    return {part: count * step.microbatches * step.data for part, count in flops.items()}


def _config(place: Place, step: Step) -> MimoModelConfig:
    model = model_of(place).model_copy(update={"dtype": step.dtype, "backend": "torch"})
    return model_config(model, Settings(transformer=step.transformer), sequence_parallel=step.sequence_parallel)


def _with_its_kernels(config: TransformerConfig) -> None:
    """Has layers of plain torch keep what `hf.language` lets those of TransformerEngine keep of a gated SiLU."""
    if gated_silu(vars(config)):
        config.bias_activation_fusion = True


def check_step(step: Step) -> None:
    """Refuses what can be refused before a model is looked at.

    Raises:
        Refused: a length that the layout does not share out.
        FileNotFoundError, ValueError: as `open_source`, of the data that is asked for.
    """
    _shape(step)
    _source(step)


def _shape(step: Step) -> PackShape:
    splits = step.tensor if step.sequence_parallel else 1
    multiple = sequence_multiple(context_parallel=step.context, sequence_parallel=splits)
    try:
        return PackShape(step.length, multiple)
    except ValueError as error:
        raise Refused(f"--length: {str(error).removeprefix('PackShape: ')}") from error


def _source(step: Step) -> Source | None:
    return None if step.data_path is None else open_source(step.data_path)


def _batch(place: Place, config: MimoModelConfig, step: Step) -> Batch:
    """A pack, as `train` makes it."""
    process = processor_of(config, place.model, place.template)
    source = _source(step) or _made_up(process)
    shape, options = _shape(step), ReadingOptions(shuffle=False)
    data = PackedData([source], process, shape, options=options, samples=len(source))
    try:
        pack = next(data, None)
    finally:
        data.close()
    if pack is None:
        raise Refused(
            f"--length {step.length}: expected room for a record that the model can use, found none; give more of it"
        )
    return batch_of(pack)


def _made_up(process: SampleProcessor) -> Source:
    picture = Image.new("RGB", (SIDE, SIDE))
    media: dict[Kind, object] = {"image": picture, "audio": _silence(SECONDS)}
    asked: list[dict[str, object]] = [{"type": "text", "text": "What is it?"}]
    answered: list[dict[str, object]] = [{"type": "text", "text": "word " * WORDS}]
    for kind, handling in process.handling.items():
        if kind not in media:
            continue
        part = {"type": kind, kind: media[kind]}
        if handling.reader is not None:
            asked.insert(0, part)
        if isinstance(handling.writer, SoundWriter):
            answered.append({"type": kind, kind: _silence(min(SECONDS, handling.writer.seconds))})
        elif handling.writer is not None:
            answered.append(part)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Records([{"messages": messages}] * 64)


def _silence(seconds: float) -> dict[str, object]:
    """A sound of so many seconds at most."""
    return {"array": np.zeros(int(seconds * RATE), dtype=np.float32), "sampling_rate": RATE}
