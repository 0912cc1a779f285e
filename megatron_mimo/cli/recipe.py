"""A recipe: what is trained, on what, how long, on which layout. One typed file, whose unknown keys are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from megatron_mimo.cli.model_recipe import Count, Model, Strict


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str | dict) else given


class Source(Strict):
    """Records to train or to evaluate on.

    Args:
        path: a file or directory, as `megatron_mimo.data.open_source` takes it.
        weight: its share of the samples, beside those of the other sources; with it all of them have one.
        media_root: below which media lie; None: beside the file.
        columns: whether media beside a text are "read" or to be learned to "write".
    """

    path: Path
    weight: PositiveFloat | None = None
    media_root: Path | None = None
    columns: Literal["read", "write"] = "read"


Sources = Annotated[
    list[Annotated[Source, BeforeValidator(lambda given: {"path": given} if isinstance(given, str) else given)]],
    BeforeValidator(_as_list),
]


class Processor(Strict):
    """How conversations become token ids.

    Args:
        template: a chat template; None: the model's own, or turns that end with a line break where it has none.
        workers: processes that read ahead.
        too_long: what becomes of a sample that fits no pack.
        corrupt: "skip" leaves one out that cannot be used, "stop" ends the run.
    """

    template: str | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    too_long: Literal["drop", "refuse", "cut"] = "drop"
    corrupt: Literal["skip", "stop"] = "skip"


class Packing(Strict):
    """Packs: samples end to end.

    Args:
        length: positions of a pack.
        budget: bound of a pack's media, in numbers that encoders read.
        buffer: samples to choose from.
    """

    length: Count = 4096
    budget: PositiveFloat | None = None
    buffer: Count = 64


class Layout(Strict):
    """Ranks along each parallel axis; what is left of the processes is data parallelism."""

    tensor: Count = 1
    pipeline: Count = 1
    virtual_pipeline: Count | None = None
    context: Count = 1
    expert: Count = 1
    sequence_parallel: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """As `megatron_mimo.initialize` takes them."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual_pipeline,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
        }


class Stage(Strict):
    """One stage of the training; it begins from the weights of the one before.

    Args:
        name: of its directory.
        steps: optimizer steps.
        trains: part -> its learning rate at the highest; every other part is frozen. Parts are named as in
            `TrainingControl`: language_model, images/input_projections, images/encoders, decoders.
        microbatches: packs of a step on each data-parallel rank.
        warmup: share of the steps over which the rates rise.
        decay: their course afterwards.
        weight_decay, clip_grad: of the optimizer.
        data: what it trains on; None: the recipe's.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    steps: Count
    trains: Annotated[dict[str, PositiveFloat], Field(min_length=1)]
    microbatches: Count = 1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    data: Sources | None = None


class Evaluation(Strict):
    """What is looked at while the model trains.

    Args:
        data: records whose loss is taken; none: the loss of training alone is told.
        every: steps between two evaluations; there is one at the end of a stage.
        patience: a stage ends after so many evaluations in a row without a new best; None: at its last step.
        compare: the loss by which evaluations are compared: "loss" (the weighted sum), "text", "MODALITY/decoder".
        steps: packs on each data-parallel rank.
        samples: how many of these records the model answers each time, into `samples/` of the run.
        max_new_tokens: of such an answer; None: 128, and those of an image or clip.
        judge: of drawn pictures, "module:function" or "module:Class", which `evaluate` takes where it is given none.
    """

    data: Sources = Field(default_factory=list)
    every: Count | None = None
    patience: Count | None = None
    compare: str = "loss"
    steps: Count = 8
    samples: Annotated[int, Field(ge=0)] = 4
    max_new_tokens: Count | None = None
    judge: str | None = None


class Checkpoints(Strict):
    """Args:
    every: steps between two; the end of a stage has one.
    keep_last: how many are kept of a stage.
    keep_best: keep the one with the best evaluation besides; the next stage and the model begin from it.
    background: write while the training goes on.
    """

    every: Count | None = None
    keep_last: Count | None = 2
    keep_best: bool = False
    background: bool = False


class WandbLogger(Strict):
    """Weights & Biases.

    Args:
        project: that the run is of.
        mode: "offline" writes `wandb/` of the run, for `wandb sync`; "online" sends too.
    """

    project: str
    mode: Literal["offline", "online"] = "offline"


class Graphs(Strict):
    """Forward, loss and backward pass of a step as one CUDA graph; fields as of `StepGraphs`.

    Args:
        buckets: modality -> the number of its items in a pack is rounded up to a multiple of this.
        label_rows: the text loss reads a multiple of so many rows; None: of a 32nd of a pack's positions.
        packed_sequences: the number of samples in a pack is rounded up to a multiple of this.
        captures: at most this many graphs, one a shape.
        warmup: steps of a shape that run before it is captured.
    """

    buckets: dict[str, Count] = Field(default_factory=dict)
    label_rows: Count | None = None
    packed_sequences: Count = 16
    captures: Count = 4
    warmup: Count = 2


def _as_graphs(given: Any) -> Any:
    if isinstance(given, bool):
        return {} if given else None
    return given


class Loggers(Strict):
    """Where the losses go.

    Args:
        lines: `log.jsonl` of the run, a line a step.
        tensorboard: `tensorboard/` of the run.
        wandb: a run of Weights & Biases for each stage; a string is the project.
        part_norms: the gradient norm of each part of the model besides.
        progress: a bar on the terminal.
    """

    lines: bool = True
    tensorboard: bool = False
    wandb: Annotated[
        WandbLogger | None, BeforeValidator(lambda given: {"project": given} if isinstance(given, str) else given)
    ] = None
    part_norms: bool = False
    progress: bool = True


class Recipe(Strict):
    """A whole run.

    Args:
        directory: of everything that it writes; the same command goes on from what lies there.
        held_out: share of each source's records that is evaluated on in place of being trained on; instead of
            evaluation.data.
        ema_decay: of an average of the weights that train, such as 0.999; its model is written beside the other.
        graphs: steps as CUDA graphs; true for all that `Graphs` has by default.
        seed: of weights that begin fresh, of the data's order and of draws.
        megatron: any further setting of Megatron's `TransformerConfig`, `OptimizerConfig` or
            `DistributedDataParallelConfig`, by its name.
    """

    directory: Path
    seed: Annotated[int, Field(ge=0)] = 1234
    model: Model
    data: Sources = Field(default_factory=list)
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    graphs: Annotated[Graphs | None, BeforeValidator(_as_graphs)] = None
    processor: Processor = Processor()
    packing: Packing = Packing()
    layout: Layout = Layout()
    stages: Annotated[list[Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    loggers: Loggers = Loggers()
    megatron: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: expected names that differ, found {names}")
        for stage in self.stages:
            sources = self.data_of(stage)
            if not sources:
                raise ValueError(f"stages.{stage.name}: expected data, of the stage or of the recipe, found none")
            weighted = [source.weight is not None for source in sources]
            if any(weighted) and not all(weighted):
                raise ValueError(f"stages.{stage.name}: expected a weight for each source of data or for none")
        layout = self.layout
        evaluates = bool(self.evaluation.data) or self.held_out is not None
        if self.evaluation.data and self.held_out is not None:
            raise ValueError("held_out: expected it or evaluation.data, found both")
        if self.evaluation.patience is not None and not (evaluates and self.evaluation.every):
            raise ValueError("evaluation.patience: needs evaluation.every, and evaluation.data or held_out")
        if self.checkpoints.keep_best and not (evaluates and self.checkpoints.keep_last):
            raise ValueError("checkpoints.keep_best: needs checkpoints.keep_last, and evaluation.data or held_out")
        answers = evaluates and self.evaluation.samples > 0
        if answers and (layout.context > 1 or layout.expert > 1 or layout.virtual_pipeline is not None):
            raise ValueError(
                "evaluation.samples: answers need a layout without context, expert and virtual_pipeline, found "
                f"{layout!r}; set evaluation.samples: 0"
            )
        return self

    def data_of(self, stage: Stage) -> list[Source]:
        """What a stage trains on."""
        return self.data if stage.data is None else stage.data

    def sources(self) -> Iterator[Source]:
        """Everything that is read."""
        for stage in self.stages:
            yield from self.data_of(stage)
        yield from self.evaluation.data
