"""`--data`, `--processor` and `--pack`: packs of conversations in Megatron's loop, and how far they are."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mimo.batch import Batch
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.data.chat import ChatText
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.messages import MEDIA_KINDS, Kind
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.positions import SEQUENTIAL, GridPositions
from megatron_mimo.data.progress import State, joined_states
from megatron_mimo.data.readers import ProcessorReader
from megatron_mimo.data.samples import Handling, SampleProcessor
from megatron_mimo.data.sources import open_source
from megatron_mimo.sharding import sequence_multiple
from megatron_mimo.training.sources import batch_of, read_state

logger = logging.getLogger(__name__)


class LoopData:
    """Where the packs of a run of Megatron's loop are; on each rank that reads.

    Args:
        args: Megatron's, of the run.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._data: PackedData | None = None
        self._found: State | None = None

    def loaded(self, checkpoint: Path) -> None:
        """Takes note of where the data was in the checkpoint that the loop goes on from."""
        if self._args.data is not None:
            self._found = read_state(checkpoint)

    def packs(self, process: SampleProcessor) -> Iterator[Batch]:
        """Packs without end, from where a checkpoint left them. Each pipeline stage and model chunk reads for itself.

        Args:
            process: makes samples of conversations.

        Raises:
            ValueError: the checkpoint is of other data.
        """
        args = self._args
        data = PackedData(
            [open_source(path) for path in args.data],
            process,
            shape_of(args),
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            options=ReadingOptions(workers=args.num_workers, seed=args.seed),
        )
        goes_on = args.consumed_train_samples > 0  # --finetune counts from 0
        if goes_on and self._found is not None:
            data.load_state_dict(self._found)
        elif goes_on:
            logger.warning("--data: the checkpoint says nothing of its data, which begins anew.")
        self._data = self._data or data  # at a step's end every chunk has taken the same
        return (batch_of(pack) for pack in data)

    def beside(self) -> State | None:
        """Where all data-parallel ranks are; None without --data. Collective over all ranks with it."""
        if self._args.data is None:
            return None
        states: list[State | None] = [None] * dist.get_world_size()
        inner = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        reads = self._data is not None and not any(inner)
        dist.all_gather_object(states, self._data.state_dict() if reads and self._data is not None else None)
        known = [state for state in states if state is not None]
        return joined_states(known) if known else None


def shape_of(args: Namespace) -> PackShape:
    """Packs of --seq-length, cut as the layout cuts them.

    Args:
        args: Megatron's.
    """
    splits = args.tensor_model_parallel_size if args.sequence_parallel else 1
    multiple = sequence_multiple(context_parallel=args.context_parallel_size, sequence_parallel=splits)
    return PackShape(length=args.seq_length, multiple=multiple)


def check_packed(args: Namespace) -> None:
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
    if not args.pack or args.micro_batch_size != 1:
        raise ValueError(
            "--data: expected --pack and --micro-batch-size 1, one pack of --seq-length tokens a microbatch, found "
            f"--micro-batch-size {args.micro_batch_size} {'with' if args.pack else 'without'} --pack."
        )
    if args.eval_iters:
        raise ValueError(f"--data is to train on, expected --eval-iters 0, found {args.eval_iters}.")
    for path in args.data:
        open_source(path)


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
            several encoders in one, or videos for mrope, whose seconds the processor does not know.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    sections = 3 if config.language_model.params.get("position_embedding_type") == "mrope" else 1
    readers = {kind: ProcessorReader(processor, kind) for kind in MEDIA_KINDS if vars(processor).get(f"{kind}_token")}
    modalities = {id: modality for modality, id in config.special_token_ids.items()}
    handling: dict[Kind, Handling] = {}
    for kind, reader in readers.items():
        if reader.token_id not in modalities or (kind == "video" and sections == 3):
            continue
        modality = modalities[reader.token_id]
        encoders = list(_encoders(config, modality))
        if len(encoders) != 1:
            raise ValueError(
                f"--processor: {modality} has the encoders {encoders}, expected one; give the recipe a "
                "sample_processor(args)."
            )
        named = ProcessorReader(processor, kind, encoder=encoders[0])
        rule = GridPositions() if sections == 3 else SEQUENTIAL
        handling[kind] = Handling.of(config, modality, reader=named, rule=rule)
    _check_tokens(config, tokenizer, readers, {one.modality for one in handling.values()})
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    written = {kind: reader.placeholder for kind, reader in readers.items() if reader.placeholder in (template or "")}
    placeholders = {kind: text for kind, text in written.items() if kind in handling}
    return SampleProcessor(
        ChatText(tokenizer, template=template, placeholders=placeholders), handling, sections=sections
    )


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
