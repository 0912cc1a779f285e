"""`--data`, `--processor` and `--pack`: conversations in Megatron's loop, packed or in rows, and how far they are."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.batch import Batch
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.chat import ChatText
from megatron_mimo.data.energon import EnergonStream, is_energon
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.messages import MEDIA_KINDS, Kind
from megatron_mimo.data.packing import PackShape, RowShape
from megatron_mimo.data.positions import SEQUENTIAL, GridPositions
from megatron_mimo.data.progress import State, joined_states
from megatron_mimo.data.readers import ProcessorReader
from megatron_mimo.data.samples import Handling, SampleProcessor
from megatron_mimo.data.sources import Source, open_source
from megatron_mimo.hf.encoder import HFEncoder, encoder_of
from megatron_mimo.hf.towers import source
from megatron_mimo.sharding import sequence_multiple
from megatron_mimo.training.sources import read_state, traced

logger = logging.getLogger(__name__)


#: What a run reads, as Megatron calls the three.
SPLITS = ("train", "valid", "test")


class LoopData:
    """Where the batches of a run of Megatron's loop are; on each rank that reads.

    Args:
        args: Megatron's, of the run.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._data: dict[str, PackedData] = {}
        self._found: State | None = None
        #: Of the blend that is trained on.
        self.source_names: Sequence[str] = ()

    def loaded(self, checkpoint: Path) -> None:
        """Takes note of where the data was in the checkpoint that the loop goes on from."""
        if self._args.data is not None:
            self._found = read_state(checkpoint)

    def batches(self, process: SampleProcessor, split: str = "train") -> Iterator[Batch] | None:
        """Batches without end, from where a checkpoint left them. Each pipeline stage and model chunk reads for itself.

        Args:
            process: makes samples of conversations.
            split: train, valid or test.

        Returns:
            None where the run has no such data.

        Raises:
            ValueError: the checkpoint is of other data to train on.
        """
        args, paths = self._args, paths_of(self._args, split)
        if paths is None:
            return None
        data = PackedData(
            opened(paths),
            process,
            shape_of(args, training=split == "train"),
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            # What is evaluated comes as it stands, the same for every run.
            options=ReadingOptions(workers=args.num_workers, seed=args.seed, shuffle=split == "train"),
        )
        if args.consumed_train_samples > 0:  # --finetune counts from 0
            self._go_on(data, split)
        self._data.setdefault(split, data)  # at a step's end every chunk has taken the same
        if split == "train":
            self.source_names = data.source_names
        return (traced(pack) for pack in data)

    def _go_on(self, data: PackedData, split: str) -> None:
        if split == "train" and self._found is not None:
            data.load_state_dict(self._found)
        elif split == "train":
            logger.warning("--data: the checkpoint says nothing of its data, which begins anew.")
        elif split == "valid" and self._found is not None and split in self._found:
            try:
                data.load_state_dict(self._found[split])
            except ValueError as error:
                logger.warning("--valid-data-path begins anew: %s", error)

    def beside(self) -> State | None:
        """Where all data-parallel ranks are; None without --data. Collective over all ranks with it."""
        if self._args.data is None:
            return None
        inner = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        own = {} if any(inner) else {split: data.state_dict() for split, data in self._data.items() if split != "test"}
        states: list[dict[str, State]] = [{}] * dist.get_world_size()
        dist.all_gather_object(states, own)
        train, valid = ([state[split] for state in states if split in state] for split in SPLITS[:2])
        if not train:
            return None
        return {**joined_states(train), **({"valid": joined_states(valid)} if valid else {})}


def paths_of(args: Namespace, split: str) -> Sequence[str] | None:
    """What --data, --valid-data-path or --test-data-path names; None for nothing.

    Args:
        args: Megatron's.
        split: train, valid or test.
    """
    given = args.data if split == "train" else getattr(args, f"{split}_data_path", None)
    return given or None


def opened(paths: Sequence[str]) -> Sequence[Source] | EnergonStream:
    """The sources that paths stand for, or what Energon reads.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: Energon's data beside other data.
    """
    energon = [path for path in paths if is_energon(Path(path))]
    if not energon:
        return [open_source(path) for path in paths]
    if len(paths) > 1:
        raise ValueError(
            f"--data: expected {energon[0]} by itself, found {list(paths)}. A blend of Energon's data sets is a "
            "MetadatasetV2 in a .yaml."
        )
    return EnergonStream(paths[0])


def shape_of(args: Namespace, training: bool = True) -> PackShape | RowShape:
    """Packs of --seq-length, cut as the layout cuts them; without --pack rows of that length.

    Args:
        args: Megatron's.
        training: or else what is evaluated, whose microbatches may be of another size.
    """
    if not args.pack:
        return RowShape(args.seq_length, args.micro_batch_size if training else args.eval_micro_batch_size)
    splits = args.tensor_model_parallel_size if args.sequence_parallel else 1
    multiple = sequence_multiple(context_parallel=args.context_parallel_size, sequence_parallel=splits)
    return PackShape(length=args.seq_length, multiple=multiple)


def check_data(args: Namespace) -> None:
    """Refuses arguments that do not go together with --data. Rank-local.

    Raises:
        FileNotFoundError: no data there.
        ValueError: naming the arguments.
    """
    if args.data is None:
        for name in ("processor", "pack"):
            if getattr(args, name):
                raise ValueError(f"--{name} says how --data is read: give --data train.jsonl, or leave it out.")
        return
    sizes = {"--micro-batch-size": args.micro_batch_size, "--eval-micro-batch-size": args.eval_micro_batch_size}
    for name, size in sizes.items():
        if args.pack and size != 1:
            raise ValueError(
                f"--pack: expected {name} 1, since a microbatch is one pack of --seq-length tokens, found {size}. "
                "Leave --pack out for rows, or take a longer --seq-length."
            )
    if args.eval_iters and paths_of(args, "valid") is None:
        raise ValueError(
            f"--data is to train on: with --eval-iters {args.eval_iters} give --valid-data-path too, or --eval-iters 0."
        )
    for split in SPLITS[1:]:
        if paths_of(args, split) is not None and not args.eval_iters:
            raise ValueError(
                f"--{split}-data-path: nothing is evaluated with --eval-iters 0; expected a number of them."
            )
    if args.full_validation or args.multiple_validation_sets:
        raise ValueError(
            "--data: batches to evaluate on have no end; expected --eval-iters without --full-validation and "
            "--multiple-validation-sets."
        )
    for split in SPLITS:
        opened(paths_of(args, split) or ())


def processor_of(recipe: object, config: MimoModelConfig, args: Namespace) -> SampleProcessor:
    """What makes samples: the recipe's `sample_processor(args)` where it has one, else --processor's.

    Args:
        recipe: of the run.
        config: of the model, whose token ids lay media out.
        args: Megatron's, with --processor.

    Raises:
        ValueError: neither, or a processor whose tokens are not the model's.
    """
    own = getattr(recipe, "sample_processor", None)
    if callable(own):
        return own(args)
    if args.processor is None:
        raise ValueError(
            "--data: expected --processor NAME, a processor or tokenizer of transformers by name or directory, or a "
            "recipe with sample_processor(args)."
        )
    from transformers import AutoProcessor

    return sample_processor(AutoProcessor.from_pretrained(args.processor, trust_remote_code=False), config)


def sample_processor(processor: Any, config: MimoModelConfig) -> SampleProcessor:
    """Samples as a processor of transformers reads them: each of its media for the modality with its token.

    Args:
        processor: of transformers, or a tokenizer for text alone.
        config: of the model.

    Raises:
        ValueError: a token outside the vocabulary, a modality that reads and whose token the processor does not have,
            or several encoders in one.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    sections = 3 if config.language_model.params.get("position_embedding_type") == "mrope" else 1
    readers = {kind: ProcessorReader(processor, kind) for kind in MEDIA_KINDS if vars(processor).get(f"{kind}_token")}
    modalities = {id: modality for modality, id in config.special_token_ids.items()}
    handling: dict[Kind, Handling] = {}
    for kind, reader in readers.items():
        tower = _tower_of_both(config, reader.token_id) if kind == "video" else None
        if reader.token_id not in modalities and tower is None:
            continue
        modality = modalities[reader.token_id] if tower is None else tower.modality
        encoders = list(_encoders(config, modality))
        if len(encoders) != 1:
            raise ValueError(
                f"--processor: {modality} has the encoders {encoders}, expected one; give the recipe a "
                "sample_processor(args)."
            )
        keywords = None if tower is None else _AS_IMAGES
        named = ProcessorReader(processor, kind, encoder=encoders[0], keywords=keywords)
        per_second = 0.0 if tower is None else tower.per_second
        rule = GridPositions(per_second=per_second) if sections == 3 else SEQUENTIAL
        handling[kind] = Handling.of(config, modality, reader=named, rule=rule)
    _check_tokens(config, tokenizer, readers, {one.modality for one in handling.values()})
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    written = {kind: reader.placeholder for kind, reader in readers.items() if reader.placeholder in (template or "")}
    placeholders = {kind: text for kind, text in written.items() if kind in handling}
    return SampleProcessor(
        ChatText(tokenizer, template=template, placeholders=placeholders), handling, sections=sections
    )


# The tower of Qwen-VL reads a video as it reads an image, by its grid.
_AS_IMAGES = {"pixel_values_videos": "pixel_values", "video_grid_thw": "image_grid_thw"}


@dataclass(frozen=True)
class _Tower:
    """The tower of transformers that reads videos of a modality of images.

    Attributes:
        modality: whose special token stands at the positions of videos too: rows are placed there, whatever the token.
        per_second: positions that a second takes; 0 where a step in time takes one.
    """

    modality: str
    per_second: float


def _tower_of_both(config: MimoModelConfig, video_id: int) -> _Tower | None:
    """The tower whose model knows `video_id` as its token of videos, None where no encoder is of such a model."""
    for modality in config.special_token_ids:
        for spec in _encoders(config, modality).values():
            if not isinstance(spec, ModuleSpec) or spec.module is not HFEncoder:
                continue
            params = spec.params or {}
            _, whole = source(params.get("name_or_path"), params.get("config"))
            if getattr(whole, "video_token_id", None) == video_id and encoder_of(spec).has_grids:
                return _Tower(modality, float(getattr(whole.vision_config, "tokens_per_second", 0.0)))
    return None


def _encoders(config: MimoModelConfig, modality: str) -> Mapping[str, object]:
    found = config.submodule_specs(modality).get("encoders")
    return found if isinstance(found, Mapping) else {}


def _check_tokens(
    config: MimoModelConfig, tokenizer: Any, readers: Mapping[Kind, ProcessorReader], read: set[str]
) -> None:
    vocabulary = config.language_model.params.get("vocab_size")
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise ValueError(
            f"--processor: its tokenizer has {len(tokenizer)} tokens, expected at most the model's {vocabulary} "
            "(--vocab-size)."
        )
    left = {name: id for name, id in config.special_token_ids.items() if name not in read and _encoders(config, name)}
    if left:
        has = {f"{kind}_token": reader.token_id for kind, reader in readers.items()}
        raise ValueError(
            f"--processor: expected the model's special tokens {left}, found {has}. Give the processor's ids to the "
            "model's special_token_ids, or give the recipe a sample_processor(args)."
        )
