"""Pretrained models in and out: a name or a directory becomes a MimoModel on any layout, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.hf import own
from megatron_mimo.hf.assembly import Assembly, assembled, restored, saved_parts
from megatron_mimo.hf.blueprint import Building, Origin, model_config, read_language_model, read_source, read_tower
from megatron_mimo.hf.comparing import states_of, unlike
from megatron_mimo.hf.files import DTYPES
from megatron_mimo.hf.filling import fill_own, fill_parts, place_of, with_fresh_rows
from megatron_mimo.hf.processors import loaded
from megatron_mimo.hf.reading import refuse
from megatron_mimo.hf.saving import processor_of, save
from megatron_mimo.hf.source import OWN, resolve
from megatron_mimo.hf.writing import MAX_SHARD_BYTES
from megatron_mimo.launch import Run, current_run
from megatron_mimo.layout import check_layout
from megatron_mimo.model import MimoModel
from megatron_mimo.specs import Backend

logger = logging.getLogger(__name__)

#: A directory or a name on the hub; or part -> one of these, for parts of a model that has more.
Source = str | Path | Mapping[str, str | Path]


def from_pretrained(
    source: str | Path | None = None, *, config: MimoModelConfig | None = None, **options: Any
) -> MimoModel | list[MimoModel]:
    """A pretrained model on the layout of the run in progress, in evaluation mode, on this rank's device.

    Every rank reads its own part of the files; nothing is sent. Everything that the model's tables do not cover is
    listed before anything is built.

    Args:
        source: a directory or a name on the hub: of a language model, of LLaVA, or what `save_pretrained` wrote. None
            where `language_model` is given.
        config: of the model, for a directory with parts of classes that no file can name; it has the weights' names.
        options: as `pretrained_config` takes them.

    Returns:
        The model; under an interleaved pipeline a list of this rank's chunks.

    Raises:
        FileNotFoundError: no such directory or model, or no safetensors files in it.
        ConnectionError: the hub cannot be reached, and its cache has no whole snapshot.
        ValueError: naming everything that does not fit: tensors, fields of the configuration, sizes of the layout.
        RuntimeError: no run is in progress.

    Example:
        >>> megatron_mimo.initialize()                                                          # doctest: +SKIP
        >>> model = megatron_mimo.from_pretrained("llava-hf/llava-1.5-7b-hf")                   # doctest: +SKIP
    """
    run = current_run()
    if config is not None:
        models = _build(config, run)
        if source is None:
            raise ValueError("from_pretrained: expected a directory beside config, found none.")
        load_pretrained(models, source)
    else:
        config = pretrained_config(source, **options)
        models = _build(config, run)
        _fill(models, config)
    return models[0] if len(models) == 1 else models


def pretrained_config(
    source: str | Path | None = None,
    *,
    language_model: str | Path | None = None,
    encoders: Mapping[str, Mapping[str, object]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    decoders: Mapping[str, Mapping[str, ModuleSpec]] | None = None,
    generation_tokens: Mapping[str, str] | None = None,
    submodules: Mapping[str, Mapping[str, object]] | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    sequence_parallel: bool = False,
    transformer: Mapping[str, object] | None = None,
) -> MimoModelConfig:
    """The configuration of a pretrained model on the run's layout, to train it: ``Trainer(config, pretrained=...)``.

    Args:
        source: as for `from_pretrained`.
        language_model: in place of `source`: the language model of a model that is put together of parts.
        encoders: modality -> encoder -> a directory or name on the hub, whose vision tower becomes Megatron layers; or
            the spec of an encoder of your own.
        special_tokens: modality -> the token at which its encoder's rows are placed.
        decoders: modality -> decoder -> its spec; they begin fresh.
        generation_tokens: modality -> the token whose hidden states feed its decoders.
        submodules: modality -> further entries of its spec's `submodules`, such as `input_projections`,
            `output_projections` or `generation_input`. Without `input_projections` a vision tower gets LLaVA's, fresh.
        dtype: of the weights; None for the files', of several that of most values, which the log says.
        backend: what layers compute with.
        sequence_parallel: of the language model.
        transformer: further fields of the language model's `TransformerConfig`, such as recomputation or fusion; those
            that change what the checkpoint's weights compute are refused.

    Raises:
        TypeError, ValueError: as `from_pretrained`.

    Example:
        >>> config = pretrained_config("llava-hf/llava-1.5-7b-hf", dtype=torch.bfloat16)        # doctest: +SKIP
    """
    building = Building(
        _sizes(current_run()), dtype, backend, {"sequence_parallel": sequence_parallel, **(transformer or {})}
    )
    if (source is None) == (language_model is None):
        raise ValueError(
            f"from_pretrained: expected either a source or language_model=..., found {source!r} and {language_model!r}."
        )
    if language_model is not None:
        found = {
            modality: {name: one if isinstance(one, ModuleSpec) else resolve(str(one)) for name, one in of.items()}
            for modality, of in (encoders or {}).items()
        }
        parts = Assembly(
            language_model=resolve(language_model),
            encoders=found,
            special_tokens=special_tokens or {},
            decoders=decoders or {},
            generation_tokens=generation_tokens or {},
            submodules=submodules or {},
        )
        return _compared(assembled(parts, building), dtype)
    if encoders or special_tokens or decoders or generation_tokens or submodules:
        raise ValueError(
            "from_pretrained: encoders, decoders, submodules and tokens go with language_model=..., found them beside "
            f"{source!r}. Give language_model={source!r} in place of the source."
        )
    directory = resolve(str(source))
    if (directory / OWN).is_file():
        return _compared(restored(directory, building), dtype)
    return _compared(model_config(read_source(directory), building, directory), dtype)


def _compared(config: MimoModelConfig, dtype: torch.dtype | None) -> MimoModelConfig:
    """`config`, which computes what its parts' checkpoints say; refused where `transformer` changed that.

    Tensors that lose digits though no `dtype` was asked for are told in the log.
    """
    assert isinstance(config.origin, Origin)
    refuse("from_pretrained(transformer=...)", [line for part in config.origin.parts for line in unlike(config, part)])
    if dtype is None:
        _tell_rounding(config.origin, config.language_config.params_dtype)
    return config


def _tell_rounding(origin: Origin, ours: torch.dtype) -> None:
    for part in origin.parts:
        used = {name: DTYPES[one.dtype] for name, one in part.stored.items() if name not in part.table.unused}
        wider = {name: theirs for name, theirs in used.items() if torch.promote_types(theirs, ours) != ours}
        if wider:
            logger.warning(
                "%s: %d of %d tensors are %s in the files and are rounded to the model's %s, such as "
                "%s. dtype=, of a recipe model.dtype, chooses another.",
                part.directory,
                len(wider),
                len(used),
                " and ".join(sorted({str(theirs) for theirs in wider.values()})),
                ours,
                next(iter(wider)),
            )


def load_pretrained(models: MimoModel | Sequence[MimoModel], source: Source) -> None:
    """Fills those parts of a model that `source` has. The others stay as they are; so do all where one does not fit.

    Rows of the vocabulary that the source lacks, and those of tokens that were added to its tokenizer, become the mean
    of the others, which the log says.

    Args:
        models: a model, or this rank's chunks, before they are wrapped.
        source: a directory or a name on the hub, of a language model, LLaVA or what `save_pretrained` wrote; or part ->
            one of these, such as ``{"language_model": ..., "images/encoders/tower": ...}``.

    Raises:
        FileNotFoundError, ConnectionError: as `from_pretrained`.
        ValueError: as `from_pretrained`; for parts that the model lacks, and settings of the model that compute
            something else than the checkpoint's, such as another base of rotary positions.

    Example:
        >>> load_pretrained(model, {"language_model": "Qwen/Qwen2.5-0.5B"})                     # doctest: +SKIP
    """
    chunks = [models] if isinstance(models, nn.Module) else list(models)
    origin, saved = _parts_of(chunks[0], source)
    _tell_rounding(origin, chunks[0].config.params_dtype)
    origin, place = with_fresh_rows(origin, chunks[0].mimo_config), place_of(chunks[0].pg_collection)
    fill_parts(chunks, origin, place, {part.path: unlike(chunks[0].mimo_config, part) for part in origin.parts})
    if saved is not None:
        fill_own(chunks, origin, saved, place)


def _parts_of(model: MimoModel, source: Source) -> tuple[Origin, Path | None]:
    """The parts that `source` has, and the file with those of no table's."""
    if isinstance(source, Mapping):
        parts = []
        for path, one in source.items():
            directory = resolve(one)
            if path == "language_model":
                parts.append(read_language_model(directory))
            elif "/encoders/" in path:
                known = model.mimo_config.origin
                built = known.part(path) if isinstance(known, Origin) else None
                layer, select = (built.layer, built.select) if built is not None else states_of(model.mimo_config, path)
                parts.append(read_tower(directory, path, layer, select))
            else:
                whole = [part for part in read_source(directory) if part.path == path]
                if not whole:
                    raise ValueError(f"{directory}: expected the part {path!r}, found none.")
                parts += whole
        return Origin(tuple(parts), None), None
    directory = resolve(source)
    if not (directory / OWN).is_file():
        return Origin(read_source(directory), directory), None
    return saved_parts(directory), directory / own.FILE


def save_pretrained(
    model: MimoModel | Sequence[MimoModel],
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    source: str | Path | None = None,
) -> None:
    """Writes a model of `from_pretrained` or `pretrained_config` to a directory. Collective over all ranks.

    Where transformers has a class for it (a language model alone, or one with a tower and LLaVA's projector) it loads
    the directory; processor and tokenizer files are beside the weights. A model with more is written in parts, for
    `from_pretrained` alone.

    Args:
        model: or this rank's chunks, not wrapped.
        directory: that is not there yet, or is empty; the same on every rank.
        dtype: of the weights; None for the model's.
        max_shard_bytes: of a file.
        source: the directory that the model was read from, if it is elsewhere now: tensors that the model does not
            compute with, and the processor's files, come from there.

    Raises:
        FileExistsError: the directory holds something.
        FileNotFoundError: the files that the model was read from are gone.
        ValueError: the model's configuration does not say what it came from.

    Example:
        >>> megatron_mimo.save_pretrained(model, "exported")                                    # doctest: +SKIP
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    save(chunks, Path(directory), dtype, max_shard_bytes, None if source is None else Path(source))


def load_processor(model: MimoModel | Sequence[MimoModel] | MimoModelConfig) -> Any:
    """The processor that came with a pretrained model or its configuration; its tokenizer where there is none.

    It has the tokens that were added. Of a language model and a tower that were put together it is LLaVA's, made of the
    tokenizer and the tower's image processor.

    Raises:
        ValueError: the model came from no directory, or from one without its files.

    Example:
        >>> processor = load_processor(model)                                                   # doctest: +SKIP
    """
    from transformers import AutoProcessor

    if isinstance(model, MimoModelConfig):
        config = model
    else:
        config = (model if isinstance(model, nn.Module) else model[0]).mimo_config
    origin = config.origin
    if not isinstance(origin, Origin) or origin.directory is None:
        raise ValueError("load_processor: expected a model of from_pretrained, found one that came from no directory.")
    put_together = processor_of(config, origin)
    if put_together is not None:
        return put_together
    processor = loaded(AutoProcessor, origin.directory, "a processor or tokenizer")
    tokenizer = getattr(processor, "tokenizer", processor)
    if origin.tokens:
        tokenizer.add_tokens(list(origin.tokens), special_tokens=True)
    return processor


def _fill(models: Sequence[MimoModel], config: MimoModelConfig) -> None:
    place, origin = place_of(models[0].pg_collection), config.origin
    assert isinstance(origin, Origin)
    fill_parts(models, origin, place)
    if origin.saved is not None:
        fill_own(models, origin, origin.saved, place)


def _sizes(run: Run) -> dict[str, int | None]:
    names = (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
        "context_parallel_size", "expert_model_parallel_size",
    )  # fmt: skip
    return {name: getattr(run.layout, name) for name in names}


def _build(config: MimoModelConfig, run: Run) -> list[MimoModel]:
    """This rank's model chunks in evaluation mode, on its device, in the language model's dtype.

    Raises:
        ValueError: a layout that it cannot run on.
    """
    # Of a language model without experts, ranks that share out experts elsewhere are data-parallel ones.
    experts = config.language_config.expert_model_parallel_size
    check_layout(replace(run.layout, expert_model_parallel_size=experts), config)
    virtual, stages = run.layout.virtual_pipeline_model_parallel_size, run.layout.pipeline_model_parallel_size
    chunks = []
    for vp_stage in (None,) if virtual is None else range(virtual):
        model = MimoModel(
            config,
            pre_process=run.pipeline_rank == 0 and vp_stage in (None, 0),
            post_process=run.pipeline_rank == stages - 1 and vp_stage in (None, (virtual or 1) - 1),
            vp_stage=vp_stage,
            pg_collection=run.groups,
        )
        chunks.append(model.to(device=run.device, dtype=model.config.params_dtype).eval())
    return chunks
