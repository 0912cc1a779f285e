"""Everything about a batch that is refused, before the first collective.

`BatchCheck` looks at one batch of one stage of a model, in the order in which facts become known: the arguments
alone, the placement against the token ids, targets and encoded rows against the placement. What only the device
knows is compared without waiting for it and reported when the next step begins (`deferred`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_mimo.batch import Nested, Shown
from megatron_mimo.check.positions import PositionKind
from megatron_mimo.check.tokens import (
    check_loss_mask,
    check_packed,
    check_padding_mask,
    check_spans,
    check_token_tensors,
    furthest_inside,
    refuse_padding,
)
from megatron_mimo.config import MimoModelConfig, generation_table
from megatron_mimo.decoders.targets import Prepared
from megatron_mimo.deferred import Checks
from megatron_mimo.fp8 import check_fp8_rows
from megatron_mimo.output import MimoOutput
from megatron_mimo.placement import Placement
from megatron_mimo.tally import outside_vocabulary, verify_vocabulary

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_mimo.modality.submodules import ModalitySubmodules


@dataclass(frozen=True)
class Media:
    """What a batch brings of its modalities, without those that have nothing in it.

    Attributes:
        inputs: modality -> encoder -> its keyword inputs.
        targets: modality -> decoder -> its keyword targets.
        shown: modality -> inputs of its generation input, in place of targets.
    """

    inputs: Nested
    targets: Nested
    shown: Mapping[str, Prepared]


class BatchCheck:
    """Refuses batches that one stage of a model cannot take.

    Args:
        config: of the model.
        submodules: modality -> its `ModalitySubmodules` on this stage.
        first, last: whether encoders and decoders are on this stage.
        context_parallel: size of the context-parallel group.
        checks: who owns the checks that wait for the device.
        positions: what the language model makes of position ids.
        blind: the name of an attention that would ignore that a media span sees the whole of itself, or None.
    """

    def __init__(
        self,
        config: MimoModelConfig,
        submodules: Mapping[str, ModalitySubmodules],
        first: bool,
        last: bool,
        context_parallel: int,
        checks: Checks,
        positions: PositionKind = PositionKind(),
        blind: str | None = None,
    ) -> None:
        self._config, self._submodules = config, submodules
        self._first, self._last = first, last
        self._context_parallel, self._checks = context_parallel, checks
        self._positions, self._blind = positions, blind
        self._vocabulary_size = config.language_model.params.get("vocab_size")

    def tokens(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        padding_mask: Tensor | None,
        inference_context: object,
    ) -> None:
        """Refuses token tensors that do not belong together, and what attention cannot do on shards of a sequence.

        Args:
            input_ids, position_ids, attention_mask, labels, loss_mask: as `check_token_tensors` takes them.
            packed_seq_params, padding_mask, inference_context: as `MimoModel.forward` takes them, or None.

        Raises:
            TypeError, ValueError: as `check_token_tensors`, `check_fp8_rows`, `check_loss_mask`, `check_packed`,
                `check_spans`; a mask, an inference context or packed sequences with mrope under context parallelism.
        """
        check_token_tensors(input_ids, position_ids, attention_mask, labels, loss_mask)
        check_fp8_rows(input_ids.numel(), self._config.language_config, self._context_parallel)
        if loss_mask is not None and self._last:
            check_loss_mask(loss_mask, self._checks)
        if padding_mask is not None:
            check_padding_mask(padding_mask, input_ids)
        if packed_seq_params is not None:
            check_packed(packed_seq_params, input_ids.shape[1], self._checks)
            check_spans(packed_seq_params, self._blind, self._context_parallel)
            self._positions.check_longest(packed_seq_params)
        if packed_seq_params is not None and self._positions.kind == "mrope" and not self._positions.own_angles:
            self._check_packed_mrope()
        if self._context_parallel == 1:
            return
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None under context parallelism: attention there works on "
                "shards of the sequence. Mask by a causal attn_mask_type or by packed_seq_params."
            )
        if inference_context is not None:
            raise ValueError("inference_context must be None under context parallelism")

    def _check_packed_mrope(self) -> None:
        if self._config.language_config.apply_rope_fusion:
            raise ValueError(
                "packed_seq_params with mrope and apply_rope_fusion=True: the fused kernel gives every packed sequence "
                "the positions of the first. Set apply_rope_fusion=False (--no-rope-fusion), or do not pack."
            )
        if self._context_parallel > 1:
            raise ValueError(
                "packed_seq_params with mrope under context parallelism: Megatron 0.19 restarts each packed sequence "
                "at angle 0 of angles that are cut already. Use rotary.GridGPT, or context_parallel_size=1."
            )

    def media(self, inputs: Nested | None, targets: Nested | None, shown: Shown | None) -> Media:
        """Inputs, targets and shown inputs of the modalities that have any.

        Raises:
            TypeError: what should map names does not.
            ValueError: an unknown modality, encoder or decoder, one without a token, or both targets and
                shown inputs of one modality.
        """
        named = {"modality_inputs": inputs, "modality_targets": targets, "generation_inputs": shown}
        for name, given in named.items():
            check_modalities(name, given, self._submodules)
        written = _present(targets)
        media = Media(with_data(inputs), written, self._shown(_present(shown), written.keys()))
        self._check_connected("modality_targets", sorted(media.targets), "generation_token_ids", "decoder")
        self._check_connected("modality_inputs", sorted(media.inputs), "special_token_ids", "encoder")
        for modality, given in media.inputs.items():
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"modality_inputs[{modality!r}] must map encoder name -> its inputs, got {type(given).__name__}"
                )
        return media

    def positions(self, given: Tensor | None, default: Tensor, present: Sequence[str]) -> Tensor:
        """Position ids as the language model takes them, as `PositionKind.chosen` says.

        Args:
            given: int64 `[B, S]` or `[k, B, S]`, or None.
            default: `[B, S]`, counted from 0 (within each packed sequence), or from what is cached.
            present: modalities that have anything in the batch.
        """
        return self._positions.chosen(given, default, present, self._checks)

    def placement(self, made: Placement, input_ids: Tensor, packed: bool) -> None:
        """Refuses another model's or another batch's placement; one without `ids` travelled with them.

        Args:
            made: on the device of the ids.
            input_ids: `[B, S]`.
            packed: whether the sequences are packed.

        Raises:
            ValueError: saying how to make the right one; other ids on a device are reported one step later.
        """
        if not isinstance(made, Placement):
            raise TypeError(f"placement must be a Placement, found {type(made).__name__}; make it with model.place")
        if (made.cu_seqlens is None) == packed:
            raise ValueError(
                "placement and packed_seq_params disagree on whether sequences are packed; make the "
                "placement with model.place(input_ids, packed_seq_params)"
            )
        tables, generating = self._config.reading_tables, self._config.generation_token_ids
        found = {name: listing.token_id for name, listing in made.reading.items()}
        written = {name: listing.token_id for name, listing in made.generation.items()}
        if found != tables or written != dict(generating) or made.source.shape != input_ids.shape:
            raise ValueError(
                f"expected a placement of tokens {tables} and {dict(generating)} in ids {list(input_ids.shape)}, found "
                f"one of {found} and {written} in {list(made.source.shape)}; make it with model.place"
            )
        ids = made.ids
        if ids is None or ids is input_ids:
            return

        def verify(differ: Tensor) -> None:
            if differ:
                raise ValueError("placement was not made from these input_ids; make it with model.place")

        self._checks.look(lambda: torch.ne(ids, input_ids).any(), verify, "placement")

    def padding(self, placement: Placement, padding: Tensor) -> None:
        """Refuses tokens of modalities in padding: nothing is read or written there.

        Args:
            placement: of the batch.
            padding: bool `[B, S]`.

        Raises:
            ValueError: naming modality and position; on a device at the latest one step later.
        """
        special = self._config.special_token_ids
        listings = {f"{name}: its special token": placement.reading[name] for name in special}
        listings |= {f"{name}: its generation token": listing for name, listing in placement.generation.items()}
        for what, listing in listings.items():
            positions = placement.positions[listing.index]
            refuse = partial(refuse_padding, what, length=padding.shape[1])
            self._checks.look(partial(furthest_inside, padding, positions), refuse, what)

    def unfed(self, reads: Collection[str], placement: Placement, counts: Mapping[str, int | None]) -> None:
        """Refuses special tokens that nothing in this batch fills, on the stage that places rows.

        Args:
            reads: modalities with inputs.
            placement: of the batch.
            counts: generation tokens that are known to have rows, by modality.

        Raises:
            ValueError: naming modality, sample and counts.
        """
        for table in placement.names if self._first else ():
            modality = table.removesuffix(generation_table(""))
            if table == modality and table in reads:
                continue  # its rows are counted when they are there
            generates = self._submodules[modality].generation_input is not None
            shared = generation_table(modality) not in placement.names
            if generates and (shared or table != modality) and counts.get(modality):
                continue  # counted against its targets
            placement.check_rows(table, 0)

    def labels(self, labels: Tensor, loss_mask: Tensor) -> None:
        """Refuses labels outside the vocabulary that count in the loss, which would be wrong without a word.

        Args:
            labels: `[B, S]`, global sequence.
            loss_mask: `[B, S]`; where it is 0, a label may be anything.

        Raises:
            ValueError: naming the sample and how many; on a device at the latest one step later.
        """
        size = self._vocabulary_size
        if size is None or not self._last:
            return
        advice = "They count in the loss. Set loss_mask to 0 where nothing is to be learned."

        def verify(counts: Tensor) -> None:
            verify_vocabulary("labels", counts.tolist(), size, advice)

        def outside() -> Tensor:
            return (outside_vocabulary(labels, size) & (loss_mask != 0)).sum(dim=1)

        self._checks.look(outside, verify, "labels")

    def decoding(self, outputs: MimoOutput, options: Mapping[str, Mapping[str, Mapping]]) -> None:
        """Refuses what `MimoModel.decode` cannot decode.

        Args:
            outputs: from `MimoModel.forward`.
            options: modality -> decoder -> keyword options of its `sample`.

        Raises:
            TypeError: something else than a `MimoOutput`, or an option that a decoder's `sample` does not take.
            ValueError: options for a modality or decoder that the model lacks; as `whole_media`.
        """
        if not isinstance(outputs, MimoOutput):
            raise TypeError(
                f"decode takes a MimoOutput, found {type(outputs).__name__}: give what forward returned first, "
                "`outputs, _ = model(...)`, on the last pipeline stage of a model that writes."
            )
        check_modalities("options", options, outputs.modalities)
        for modality, of_decoders in options.items():
            where = f"options[{modality!r}]"
            if not isinstance(of_decoders, Mapping):
                raise TypeError(f"{where} must map decoder name -> its options, got {type(of_decoders).__name__}")
            for name, given in of_decoders.items():
                self._submodules[modality].check_options(name, given, where)
        self.whole_media(outputs)

    def whole_media(self, outputs: MimoOutput) -> None:
        """Refuses images or clips that would be assembled from rows of two samples.

        Args:
            outputs: from `MimoModel.forward`; without a placement nothing tells where samples end.

        Raises:
            ValueError: naming modality and sample; waits for the device.
        """
        if outputs.placement is None:
            return
        for modality, output in outputs.modalities.items():
            if output.hidden is None:
                continue
            submodule = self._submodules[modality]
            for name in submodule.decoders:
                span, medium = submodule.span_of(name), submodule.medium_of(name)
                outputs.placement.check_generation(modality, output.hidden.shape[0], span, medium)
        outputs.placement.raise_deferred()

    def _check_connected(self, name: str, given: Sequence[str], tokens: str, what: str) -> None:
        known = getattr(self._config, tokens)
        for modality in given:
            if modality not in known:
                raise ValueError(
                    f"{name} has {modality!r}, but {tokens} has {sorted(known)}: its rows have nowhere to go. "
                    f"Configure its token and a {what}, or leave them out."
                )

    def _shown(self, shown: Shown, written: Collection[str]) -> dict[str, Prepared]:
        """Inputs of generation inputs, checked and counted once, on the stage that has the generation inputs."""
        prepared = {}
        for modality, given in shown.items():
            if modality in written:
                raise ValueError(
                    f"both generation_inputs and modality_targets have {modality!r}. Targets are shown to "
                    "the language model by themselves; give generation_inputs where nothing is learned."
                )
            submodule = self._submodules[modality]
            if self._first and submodule.generation_input is None:
                raise ValueError(
                    f"generation_inputs has {modality!r}, whose spec has no generation_input: its "
                    "generation tokens are looked up in the vocabulary"
                )
            rows = submodule.prepare_shown(modality, given)
            if rows is not None:
                prepared[modality] = rows
        return prepared


def check_modalities(name: str, given: Mapping[str, object] | None, known: Mapping) -> None:
    """Refuse `modality_inputs` or `modality_targets` for a modality that the model lacks.

    Raises:
        TypeError: not a mapping.
        ValueError: an unknown modality.
    """
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must map modality names, got {type(given).__name__}")
    for modality in given:
        if modality not in known:
            raise ValueError(f"{name} has modality {modality!r}, but the model's modalities are {sorted(known)}")


def _is_nothing(value: object) -> bool:
    """Whether an input holds no data: None, an empty sequence or tensor, or a mapping of such. Options beside empty
    tensors (`interpolate_pos_encoding=True`) are no data."""
    match value:
        case None:
            return True
        case Tensor():
            return value.numel() == 0
        case Mapping():
            tensors = [part for part in value.values() if isinstance(part, Tensor)]
            return all(_is_nothing(part) for part in tensors or value.values())
        case list() | tuple():
            return len(value) == 0
    return False


def with_data(inputs: Nested | None) -> dict:
    """Inputs of the modalities, and of their encoders, that hold any data: zero images are no images."""
    found = {}
    for modality, encoders in (inputs or {}).items():
        if isinstance(encoders, Mapping):
            encoders = {name: given for name, given in encoders.items() if not _is_nothing(given)}
        if encoders is not None and encoders != {}:
            found[modality] = encoders
    return found


def _present(given: Mapping | None) -> dict:
    """Without the modalities that have nothing in this batch: None or an empty mapping."""
    return {
        name: value
        for name, value in (given or {}).items()
        if value is not None and not (isinstance(value, Mapping) and not value)
    }
