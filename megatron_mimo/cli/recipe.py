"""A recipe: what is trained, on what, how long, on which layout. One typed file, whose unknown keys are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from megatron_mimo.cli.nearest import unknown

Count = PositiveInt


class Strict(BaseModel):
    """Keys that it does not have are refused, with the nearest that it has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key in given:
                if key not in cls.model_fields:
                    raise ValueError(unknown("key", str(key), cls.model_fields))
        return given


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str | dict) else given


class Encoder(Strict):
    """What reads a modality.

    Args:
        name: a directory, or a name on the hub.
        as_it_is: transformers' own module in place of Megatron's layers; the only way for sound.
        frozen: of one as it is: takes no gradient in any stage, and keeps no activations.
        layer: of one as it is: whose states are taken; None for its output.
        select: of one as it is: "patch" leaves class and register tokens out.
    """

    name: str
    as_it_is: bool = False
    frozen: bool = False
    layer: int | None = None
    select: Literal["all", "patch"] = "all"

    @model_validator(mode="after")
    def _of_one_as_it_is(self) -> Self:
        if not self.as_it_is and (self.frozen or self.layer is not None or self.select != "all"):
            raise ValueError("frozen, layer and select are those of an encoder as_it_is; set as_it_is: true")
        return self


class Decoder(Strict):
    """What writes images.

    Args:
        kind: "flow" draws patches of pixels by rectified flow, in which the language model takes part at every step;
            "flow_transformer" runs the language model once, and its own attention at every step.
        size: height and width of the images, in pixels.
        patch: side of the square that a generation token stands for.
        channels: 3, or 1 for grey.
        hidden_width, depth, heads: of the decoder; heads are those of a "flow_transformer".
    """

    kind: Literal["flow", "flow_transformer"]
    size: tuple[Count, Count]
    patch: Count
    channels: Literal[1, 3] = 3
    hidden_width: Count = 1024
    depth: Count = 3
    heads: Count = 8

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise ValueError(f"patch {self.patch} does not divide the size {list(self.size)}")
        return self

    @property
    def rows(self) -> int:
        """Generation tokens of an image."""
        return (self.size[0] // self.patch) * (self.size[1] // self.patch)


class Modality(Strict):
    """How the model reads or writes one modality.

    Args:
        medium: which of the data's media are its; None: images for a name that begins with "image", else audio.
        reads: its encoder: a name, or more about it.
        token: at which the encoder's rows are placed, by default <image> or <sound>; one that the tokenizer lacks is
            added.
        writes: its decoder; None: it is read alone.
        generation_token: whose hidden states feed the decoder.
    """

    medium: Literal["image", "audio"] | None = None
    reads: Annotated[
        Encoder | None, BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)
    ] = None
    token: str | None = None
    writes: Decoder | None = None
    generation_token: str = "<draw>"

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.reads is None and self.writes is None:
            raise ValueError("expected reads, writes or both, found neither")
        return self


class Model(Strict):
    """The model: one that is whole, or one that is put together of parts.

    Args:
        source: of a whole one: a directory or a name on the hub.
        language_model: of one of parts: the same.
        modalities: of one of parts.
        dtype: of the weights; None for the files'.
        backend: what layers compute with; "auto" takes TransformerEngine where it is.
    """

    source: str | None = None
    language_model: str | None = None
    modalities: dict[str, Modality] = {}
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    backend: Literal["auto", "transformer_engine", "apex", "torch"] = "auto"

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.source is None) == (self.language_model is None):
            raise ValueError("expected source (a whole model) or language_model (of one put together), one of the two")
        if self.source is not None and self.modalities:
            raise ValueError("modalities go with language_model; a whole model (source) brings its own")
        return self


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
        max_new_tokens: of such an answer.
    """

    data: Sources = []
    every: Count | None = None
    patience: Count | None = None
    compare: str = "loss"
    steps: Count = 8
    samples: Annotated[int, Field(ge=0)] = 4
    max_new_tokens: Count = 128


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
        seed: of weights that begin fresh, of the data's order and of draws.
        megatron: any further setting of Megatron's `TransformerConfig`, `OptimizerConfig` or
            `DistributedDataParallelConfig`, by its name.
    """

    directory: Path
    seed: Annotated[int, Field(ge=0)] = 1234
    model: Model
    data: Sources = []
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    processor: Processor = Processor()
    packing: Packing = Packing()
    layout: Layout = Layout()
    stages: Annotated[list[Stage], Field(min_length=1)]
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    loggers: Loggers = Loggers()
    megatron: dict[str, Any] = {}

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
