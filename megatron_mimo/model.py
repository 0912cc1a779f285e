"""MimoModel: batch -> place -> encode -> exchange -> align -> language model -> route -> decode."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from torch import Tensor, nn

from megatron_mimo import deferred
from megatron_mimo.align import align, align_by_token_positions
from megatron_mimo.batch import (
    check_labels,
    check_modalities,
    check_token_tensors,
    default_loss_mask,
    default_positions,
    packed_padding,
)
from megatron_mimo.config import MimoModelConfig, generation_table
from megatron_mimo.idle import with_idle
from megatron_mimo.language import HiddenStates, build_language_model
from megatron_mimo.modality.submodules import ModalitySubmodules
from megatron_mimo.output import MimoOutput, ModalityOutput
from megatron_mimo.placement import Placement, build_placement
from megatron_mimo.route import route
from megatron_mimo.sharded_state import sharded_state_dict
from megatron_mimo.sharding import SequenceShard, sequence_shard

logger = logging.getLogger(__name__)

Nested = Mapping[str, Mapping[str, Mapping[str, Tensor]]]
Shown = Mapping[str, Mapping[str, Tensor]]


class MimoModel(MegatronModule):
    """A Megatron language model that reads and writes several modalities.

    Encoders, input projections and alignment live on the first pipeline stage, output projections
    and decoders on the last. Under tensor and context parallelism every rank is given the whole
    batch of its data-parallel rank and keeps its own part.

    Args:
        config: the model's parts and token ids.
        modality_submodules: specs that replace or join those of `config`.
        pre_process, post_process: whether this is the first, the last pipeline stage.
        vp_stage: index of the virtual pipeline stage.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        TypeError: a modality's spec is not of a `ModalitySubmodules`.
        ValueError: parts that do not fit together.
    """

    def __init__(
        self,
        config: MimoModelConfig,
        modality_submodules: Mapping[str, ModuleSpec] | None = None,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection=None,
    ) -> None:
        config = config.with_submodules(modality_submodules or {})
        super().__init__(config.language_model.params["config"])
        self.mimo_config = config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        language_model = build_language_model(
            config.language_model,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        self.pg_collection = language_model.pg_collection
        # Registered in the order in which they run: DDP gathers parameters in that order.
        self.modality_submodules = nn.ModuleDict(
            {
                modality: self._build_submodules(modality, spec, pg_collection)
                for modality, spec in config.modality_submodules.items()
            }
        )
        self.language_model = language_model
        self._vocabulary_size = config.language_model.params.get("vocab_size")
        self._generates = post_process and bool(config.generation_token_ids)
        self._language_keywords = inspect.signature(self.language_model.forward).parameters.keys()
        logger.info("MimoModel: %s", self.extra_repr())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        modality_inputs: Nested | None = None,
        modality_targets: Nested | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        placement: Placement | None = None,
        inference_context=None,
        generation_inputs: Shown | None = None,
    ) -> tuple[Tensor | MimoOutput, Tensor | None]:
        """Language output and modality outputs of one microbatch, and this rank's loss mask.

        Args:
            input_ids: `[B, S]` int64, the whole sequence; so are the next four.
            position_ids: `[B, S]`; None counts from 0 (within each packed sequence).
            attention_mask: as the language model takes it; None for its own causal mask. A mask
                replaces the causal one of attention without TransformerEngine.
            labels: `[B, S]` next-token ids. With them the language model returns per-token loss. Those
                that count must lie in the vocabulary.
            loss_mask: `[B, S]`, returned cut to this context-parallel rank; None with labels counts
                every label that is not negative and not padding of a packed sequence.
            modality_inputs: modality -> encoder -> its keyword inputs.
            modality_targets: modality -> decoder -> its keyword targets, for training.
            packed_seq_params: boundaries of packed sequences (`qkv_format="thd"`, B = 1). Where
                `cu_seqlens_q_padded` is given too, it says where each starts in `input_ids`.
            placement: `self.place(input_ids)` made ahead, e.g. by the collator on the CPU.
            inference_context: passed to the language model.
            generation_inputs: modality -> keyword inputs of its `generation_input`, which the language
                model shall see without a loss: what was sampled so far. In place of its targets.

        Returns:
            `(outputs, loss_mask)`. `outputs` is what the language model returns if the
            configuration has no generation tokens or this is not the last pipeline stage,
            a `MimoOutput` otherwise.

        Raises:
            TypeError, ValueError: a bad batch, on every rank that sees it, before its first
                collective; for device tensors counts are checked without waiting for them, and
                a mismatch is raised at the latest one step later.
        """
        # The one place that waits for checks, those of earlier steps: this step's own would stall the device.
        deferred.report(current=None if placement is None else placement.arrival)
        check_token_tensors(input_ids, position_ids, attention_mask, labels, loss_mask)
        modality_inputs, modality_targets = self._check_batch(modality_inputs, modality_targets)
        generation_inputs = self._check_generation_inputs(generation_inputs, modality_targets)
        self._check_context_parallel(attention_mask, inference_context)
        placement = self._placement(input_ids, packed_seq_params, placement)
        shard = self.shard(input_ids, packed_seq_params)
        padding = self.padding(input_ids, packed_seq_params)
        if position_ids is None:
            position_ids = default_positions(input_ids, _boundaries(packed_seq_params))

        counts = self._count_generation(modality_inputs, modality_targets, generation_inputs, placement)
        self._check_missing_inputs(modality_inputs, counts, placement)

        targets = self.prepare(modality_targets)
        decoder_input = None
        if self.pre_process:
            shown = self.shown(targets, generation_inputs)
            rows = self.encode(modality_inputs, shown, counts, placement)
            rows = self.exchange(rows)
            decoder_input = self.align(input_ids, position_ids, rows, placement, shard)
        if labels is not None and loss_mask is None:
            loss_mask = default_loss_mask(labels, padding)
        if labels is not None and self.post_process and self._vocabulary_size is not None:
            check_labels(labels, loss_mask, self._vocabulary_size)
        labels, loss_mask = _cut(shard, labels), _cut(shard, loss_mask)
        language, states = self.run_language_model(
            decoder_input,
            position_ids,
            attention_mask,
            labels,
            loss_mask,
            packed_seq_params,
            inference_context,
        )
        outputs = language
        if self._generates:
            hidden = self.route(states, counts, placement, shard)
            outputs = MimoOutput(language, self.decode_losses(states, hidden, targets), placement)
        if not self.training:
            deferred.report()  # no next step will
        return outputs, loss_mask

    # The stages, in the order of the flow --------------------------------------------------

    def place(self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Placement:
        """Which row fills each position of `input_ids` `[B, S]`, and which positions generate."""
        return build_placement(
            input_ids,
            self.mimo_config.reading_tables,
            self.mimo_config.generation_token_ids,
            cu_seqlens=_boundaries(packed_seq_params),
            vocabulary_size=self._vocabulary_size,
        )

    def shard(self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None = None) -> SequenceShard:
        """Which positions of the sequence are this rank's."""
        groups = self.pg_collection
        splits = self.config.sequence_parallel
        return sequence_shard(
            input_ids.shape[1],
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
            tp_rank=groups.tp.rank() if splits else 0,
            tp_size=groups.tp.size() if splits else 1,
            cu_seqlens=_boundaries(packed_seq_params),
            device=input_ids.device,
        )

    def padding(self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None) -> Tensor | None:
        """Padding between packed sequences, bool `[1, S]`, or None where there is none.

        Raises:
            ValueError: a special or generation token in it: nothing is read or written there.
        """
        padded = _boundaries(packed_seq_params)
        own = None if padded is None else packed_seq_params.cu_seqlens_q
        if own is None or own is padded:
            return None
        config = self.mimo_config
        tokens = {
            **{f"{name}: its special token": id for name, id in config.special_token_ids.items()},
            **{f"{name}: its generation token": id for name, id in config.generation_token_ids.items()},
        }
        return packed_padding(input_ids, own, padded, tokens)

    def prepare(self, targets: Nested) -> Nested:
        """Targets completed with this microbatch's random draws."""
        return {
            modality: self.modality_submodules[modality].prepare(target, stream=modality)
            for modality, target in targets.items()
        }

    def shown(self, targets: Nested, generation_inputs: Shown) -> Shown:
        """What each modality's generation input reads: its decoder's prepared targets, or what the
        caller gave."""
        read = {}
        for modality, target in targets.items():
            feed = self.modality_submodules[modality].generation_input
            if feed is not None:
                read[modality] = feed.pick(target)
        return {**read, **generation_inputs}

    def encode(
        self,
        inputs: Nested,
        shown: Shown,
        counts: Mapping[str, int | None],
        placement: Placement,
    ) -> dict[str, Tensor]:
        """Rows `[N, H]` by table: encoded inputs, and what decoders feed their generation tokens.

        Modalities come in one order on every rank, with or without inputs: what stands in for an
        absent one joins the same collectives.
        """
        rows = {}
        for modality, submodule in self.modality_submodules.items():
            given, count = inputs.get(modality), counts.get(modality) or 0
            if modality in self.mimo_config.special_token_ids:
                rows[modality] = self._encode_modality(modality, given, placement)
            if submodule.generation_input is None:
                continue
            shares_token = generation_table(modality) not in placement.names
            if shares_token and given is not None:
                count = 0  # its positions read
            fed = submodule.generation_rows(shown.get(modality), count, self._rows_like)
            if not shares_token:
                rows[generation_table(modality)] = fed
            elif count:
                rows[modality] = with_idle(fed, [rows[modality]])
            else:
                rows[modality] = with_idle(rows[modality], [fed])
        return rows

    def _encode_modality(self, modality: str, given: Mapping | None, placement: Placement) -> Tensor:
        submodule = self.modality_submodules[modality]
        if given is None:
            return submodule.encode_nothing(self._rows_like)
        rows, rows_per_item = submodule.encode_items(given)
        if rows_per_item is not None and len(rows_per_item) == 1:
            rows_per_item = None  # one item may hold the rows of several samples, packed
        placement.check_rows(modality, rows.shape[0], rows_per_item)
        if submodule.encode_is_overridden:  # it may leave out modules that other ranks use
            return with_idle(rows, [submodule.encode_nothing(self._rows_like)])
        return rows

    @property
    def _rows_like(self) -> Tensor:
        """A tensor with the width, dtype and device of embedded rows."""
        return self.language_model.embedding.word_embeddings.weight

    def exchange(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows that this rank's part of the language model needs.

        Identity: encoders and language model are laid out alike. Layouts that differ move rows here.
        """
        return rows

    def align(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Mapping[str, Tensor],
        placement: Placement,
        shard: SequenceShard,
    ) -> Tensor:
        """Text and modality rows at their positions, `[S_local, B, H]`, this rank's only."""
        return align(
            self.language_model.embedding,
            input_ids,
            position_ids,
            rows,
            placement,
            shard,
            tp_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
        )

    def run_language_model(
        self,
        decoder_input: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
        inference_context,
    ) -> tuple[Tensor, Tensor]:
        """What the language model returns (hidden states, logits or per-token loss), and its states.

        The states are the transformer stack's output `[S_local, B, H]`, on the last pipeline stage
        after the final norm.
        """
        known = {"loss_mask": loss_mask} if "loss_mask" in self._language_keywords else {}
        with HiddenStates(self.language_model.decoder) as states:
            output = self.language_model(
                input_ids=None,  # decoder_input stands in for the lookup
                position_ids=position_ids,
                attention_mask=attention_mask,
                decoder_input=decoder_input,
                labels=labels,
                packed_seq_params=packed_seq_params,
                inference_context=inference_context,
                **known,
            )
        return output, states.last

    def route(
        self,
        hidden: Tensor,
        counts: Mapping[str, int | None],
        placement: Placement,
        shard: SequenceShard,
    ) -> dict[str, Tensor]:
        """Hidden states `[N, H]` at every modality's generation tokens, where their count is known."""
        groups, context_group = self._row_groups()
        rows = {}
        for modality, count in counts.items():
            if count is not None:
                rule = self.modality_submodules[modality].position_rule
                positions = placement.generation_positions(modality, count, rule)
                rows[modality] = route(hidden, positions, shard, groups, context_group)
        return rows

    def decode_losses(self, states: Tensor, hidden: Mapping[str, Tensor], targets: Nested) -> dict[str, ModalityOutput]:
        """Each output modality's hidden states and its decoders' loss terms.

        Args:
            states: `[S_local, B, H]`, which rows that are not there would look like.
            hidden: modality -> `[N, H]`.
            targets: prepared targets.
        """
        context = self.pg_collection.cp
        share = (context.rank(), context.size())
        outputs = {}
        for modality in self.mimo_config.generation_token_ids:
            rows = hidden.get(modality)
            submodule = self.modality_submodules[modality]
            read = states if rows is None else rows
            outputs[modality] = ModalityOutput(rows, submodule.loss(read, targets.get(modality, {}), share))
        return outputs

    def decode(
        self, outputs: MimoOutput, options: Mapping[str, Mapping[str, Mapping]] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Images, waveforms, ... that the decoders make of an output's hidden states.

        Args:
            outputs: from `forward`.
            options: modality -> decoder -> keyword options of its `sample`. Modalities and
                decoders that are left out sample with their defaults.

        Returns:
            Modality -> decoder -> its samples, of modalities with generation tokens.

        Raises:
            ValueError: options for a modality or decoder that the model lacks, or generation tokens of a
                sample that are no whole number of images or clips.
        """
        options = options or {}
        check_modalities("options", options, outputs.modalities)
        for modality, of_decoders in options.items():
            self.modality_submodules[modality].check_decoder_names(f"options[{modality!r}]", of_decoders)
        if outputs.placement is not None:
            self._check_media(outputs)
        return {
            modality: {
                name: self.modality_submodules[modality].decode(
                    output.hidden, name, options.get(modality, {}).get(name)
                )
                for name in self.modality_submodules[modality].decoders
            }
            for modality, output in outputs.modalities.items()
            if output.hidden is not None and output.hidden.shape[0]
        }

    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: Mapping[str, Tensor],
        input_ids: Tensor,
        special_token_ids: Mapping[str, int],
    ) -> Tensor:
        """Embeddings at their tokens' positions, `[S, B, H]`, the whole sequence.

        Args:
            modality_embeddings: modality -> `[N, H]`; `"text"` holds the rows of all positions
                without a special token.
            input_ids: `[B, S]`.
            special_token_ids: modality -> token id.

        Raises:
            ValueError: a modality without a token id, or counts that differ.
        """
        return align_by_token_positions(modality_embeddings, input_ids, special_token_ids)

    # What Megatron asks of a model ---------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states `[S_local, B, H]` from the previous pipeline stage."""
        self.language_model.set_input_tensor(input_tensor)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether the language model ties its output layer to its embedding."""
        return self.language_model.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight on the first and last pipeline stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        """Checkpoint form of all parameters, as `megatron.core.dist_checkpointing` takes it."""
        return sharded_state_dict(self, prefix, sharded_offsets, metadata)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of the loss terms of text and of each modality, 1 where the configuration names none."""
        weights = self.mimo_config.modality_loss_weights
        return {name: weights.get(name, 1.0) for name in ("text", *self.mimo_config.modality_submodules)}

    def extra_repr(self) -> str:
        """One line: tokens, stage and sharding."""
        return (
            f"special_token_ids={dict(self.mimo_config.special_token_ids)}, "
            f"generation_token_ids={dict(self.mimo_config.generation_token_ids)}, "
            f"pre_process={self.pre_process}, post_process={self.post_process}"
        )

    # Below: what the stages need ------------------------------------------------------------

    def _build_submodules(self, modality: str, spec: ModuleSpec, pg_collection) -> ModalitySubmodules:
        kind = get_module(spec)
        if not (isinstance(kind, type) and issubclass(kind, ModalitySubmodules)):
            raise TypeError(f"modality_submodules[{modality!r}] must be the spec of a ModalitySubmodules, got {kind}")
        submodule = kind.from_spec(
            spec,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=pg_collection,
        )
        submodule.check_widths(modality, self.config.hidden_size)
        return submodule

    def _check_batch(self, inputs: Nested | None, targets: Nested | None) -> tuple[Nested, Nested]:
        """Inputs and targets of the modalities that have any, refused if no module takes them."""
        check_modalities("modality_inputs", inputs, self.modality_submodules)
        check_modalities("modality_targets", targets, self.modality_submodules)
        inputs, targets = _present(inputs), _present(targets)
        for modality in targets:
            if modality not in self.mimo_config.generation_token_ids:
                raise ValueError(
                    f"modality_targets has {modality!r}, but generation_token_ids has "
                    f"{sorted(self.mimo_config.generation_token_ids)}: no hidden state is decoded "
                    "for it. Configure its generation token and a decoder, or drop the targets."
                )
        for modality in inputs:
            if modality not in self.mimo_config.special_token_ids:
                raise ValueError(
                    f"modality_inputs has {modality!r}, but special_token_ids has "
                    f"{sorted(self.mimo_config.special_token_ids)}: its rows have nowhere to go. "
                    "Configure its special token or drop the inputs."
                )
        for modality, submodule in self.modality_submodules.items():
            if self.pre_process and modality in inputs:
                submodule.check_inputs(modality, inputs[modality])
            if self.post_process and modality in targets:
                submodule.check_targets(modality, targets[modality])
        return inputs, targets

    def _check_generation_inputs(self, given: Shown | None, targets: Nested) -> Shown:
        """Inputs of generation inputs, refused where nothing takes them or targets are there too."""
        check_modalities("generation_inputs", given, self.modality_submodules)
        given = _present(given)
        for modality, keywords in given.items():
            if not isinstance(keywords, Mapping):
                raise TypeError(
                    f"generation_inputs[{modality!r}] must map keyword -> value, got {type(keywords).__name__}"
                )
            if modality in targets:
                raise ValueError(
                    f"both generation_inputs and modality_targets have {modality!r}. Targets are shown to "
                    "the language model by themselves; give generation_inputs where nothing is learned."
                )
            if self.pre_process and self.modality_submodules[modality].generation_input is None:
                raise ValueError(
                    f"generation_inputs has {modality!r}, whose spec has no generation_input: its "
                    "generation tokens are looked up in the vocabulary"
                )
        return given

    def _placement(
        self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None, made: Placement | None
    ) -> Placement | None:
        """The caller's placement or a new one, on the ids' device; None where no stage reads it."""
        if not self.pre_process and not self._generates:
            return None
        if made is None:
            return self.place(input_ids, packed_seq_params)
        if (made.cu_seqlens is None) != (_boundaries(packed_seq_params) is None):
            raise ValueError(
                "placement and packed_seq_params disagree on whether sequences are packed; make the "
                "placement with model.place(input_ids, packed_seq_params)"
            )
        if made.device != input_ids.device:
            return made.to(input_ids.device, non_blocking=True)
        if input_ids.device.type == "cpu":
            self._check_made_from(made, input_ids)
        return made

    def _check_made_from(self, made: Placement, input_ids: Tensor) -> None:
        """Refuse another batch's placement (on the CPU, where looking costs no wait)."""
        tables = self.mimo_config.reading_tables
        fits = made.source.shape == input_ids.shape and made.names == tuple(tables)
        for index, token_id in enumerate(tables.values() if fits else ()):
            fits = fits and torch.equal(made.source == index, input_ids == token_id)
        if not fits:
            raise ValueError("placement was not made from these input_ids; make it with model.place")

    def _check_context_parallel(self, attention_mask, inference_context) -> None:
        if self.pg_collection.cp.size() == 1:
            return
        if attention_mask is not None:
            raise ValueError(
                "attention_mask must be None under context parallelism: attention there works on "
                "shards of the sequence. Mask by a causal attn_mask_type or by packed_seq_params."
            )
        if inference_context is not None:
            raise ValueError("inference_context must be None under context parallelism")

    def _count_generation(
        self, inputs: Nested, targets: Nested, shown: Shown, placement: Placement | None
    ) -> dict[str, int | None]:
        """Generation tokens of each modality in this batch, None where only the device knows."""
        if placement is None:
            return {}
        special = self.mimo_config.special_token_ids
        return {
            # Where reading and generating share a token, inputs say that this batch reads.
            modality: self._generation_count(
                modality,
                targets,
                shown,
                placement,
                modality in inputs and special.get(modality) == token_id,
            )
            for modality, token_id in self.mimo_config.generation_token_ids.items()
        }

    def _check_missing_inputs(self, inputs: Nested, counts: Mapping[str, int | None], placement: Placement) -> None:
        """Refuse special tokens that nothing in this batch fills."""
        for modality in self.mimo_config.special_token_ids if self.pre_process else ():
            fed = self.modality_submodules[modality].generation_input is not None and (
                generation_table(modality) not in placement.names and counts.get(modality)
            )
            if modality not in inputs and not fed:
                placement.check_rows(modality, 0)

    def _generation_count(
        self, modality: str, targets: Nested, shown: Shown, placement: Placement, reads: bool
    ) -> int | None:
        """Generation tokens of the batch as the host knows them, checked against the targets."""
        known = placement.generation_count(modality)
        submodule = self.modality_submodules[modality]
        if modality in targets:
            for name, count in submodule.count_target_rows(targets[modality]).items():
                span, medium = submodule.span_of(name), submodule.medium_of(name)
                placement.check_generation(modality, count, span, medium)
                known = count
        elif modality in shown:
            count = submodule.count_generation_inputs(modality, shown[modality])
            if count is not None:
                placement.check_generation(modality, count)
                known = count
        elif self.training and submodule.decoders and not reads:
            placement.check_generation(modality, 0)
        if known is None and not self.training:
            known = int(placement.generation_total(modality))  # inference waits for the device here
        if known is not None and not reads and submodule.rows_shown_together > 1:
            placement.check_generation(modality, known, medium=submodule.rows_shown_together)
        return known

    def _check_media(self, outputs: MimoOutput) -> None:
        """Refuse images or clips that would be assembled from rows of two samples."""
        for modality, output in outputs.modalities.items():
            submodule = self.modality_submodules[modality]
            for name in submodule.decoders if output.hidden is not None else ():
                span, medium = submodule.span_of(name), submodule.medium_of(name)
                outputs.placement.check_generation(modality, output.hidden.shape[0], span, medium)
        outputs.placement.raise_deferred()

    def _row_groups(self):
        """Groups whose ranks own different rows, and the one whose ranks decode different rows."""
        groups = []
        if self.config.sequence_parallel and self.pg_collection.tp.size() > 1:
            groups.append(self.pg_collection.tp)
        context_group = self.pg_collection.cp if self.pg_collection.cp.size() > 1 else None
        if context_group is not None:
            groups.append(context_group)
        return tuple(groups), context_group


def _present(given: Nested | None) -> Nested:
    """Without the modalities that have nothing in this batch: None or an empty mapping."""
    return {
        name: value
        for name, value in (given or {}).items()
        if value is not None and not (isinstance(value, Mapping) and not value)
    }


def _cut(shard: SequenceShard, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else shard.cut(tensor)


def _boundaries(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """Padded boundaries `[sequences + 1]` of packed sequences, None where nothing is packed."""
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    if packed_seq_params.cu_seqlens_q_padded is not None:
        return packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q
