"""MimoModel: batch -> check -> plan -> encode -> exchange -> align -> language model -> route -> decode."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_mimo.align import align_by_token_positions, align_checked, in_order
from megatron_mimo.batch import Batch
from megatron_mimo.build import check_parallel_state
from megatron_mimo.check import BatchCheck, Media, Nested, Shown, check_whole_spans
from megatron_mimo.config import MimoModelConfig, generation_table
from megatron_mimo.decoders.targets import Prepared, Targets
from megatron_mimo.deferred import Checks
from megatron_mimo.encode import encoded
from megatron_mimo.exchange import exchange
from megatron_mimo.generation.engine import generate
from megatron_mimo.idle import with_idle
from megatron_mimo.language import LanguageCall, build_language_model, position_kind
from megatron_mimo.megatron_model import MegatronModel
from megatron_mimo.modality.build import build_submodules
from megatron_mimo.modality.submodules import ModalitySubmodules
from megatron_mimo.output import MimoOutput, ModalityOutput
from megatron_mimo.placement import Placement
from megatron_mimo.plan import Brought, Plan, Planner
from megatron_mimo.route import route, row_groups
from megatron_mimo.segments import blind_to_spans

logger = logging.getLogger(__name__)


class MimoModel(MegatronModel):
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
        check_parallel_state("MimoModel", pg_collection)
        config = config.with_submodules(modality_submodules or {})
        super().__init__(config.language_config)
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
                modality: build_submodules(
                    modality,
                    spec,
                    config=config,
                    pre_process=pre_process,
                    post_process=post_process,
                    pg_collection=pg_collection,
                )
                for modality, spec in config.modality_submodules.items()
            }
        )
        self.language_model = language_model
        self._generates = post_process and bool(config.generation_token_ids)
        self._run_language_model = LanguageCall(
            language_model,
            parallel_output=config.language_model.params.get("parallel_output", True),
            loss_where_counted=config.loss_where_counted,
        )
        self._checks = Checks()
        stage = (config, self._submodules, pre_process, post_process)
        positions = position_kind(config.language_model)
        blind = blind_to_spans(language_model.decoder)
        if config.whole_spans:
            which = f"MimoModel: {sorted(config.whole_spans)} have"
            check_whole_spans(which, "whole_spans of the MimoModelConfig", blind, self.pg_collection.cp.size())
        self._check = BatchCheck(*stage, self.pg_collection.cp.size(), self._checks, positions, blind)
        self._planner = Planner(*stage, self.pg_collection, self._check, self._checks)
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
        runtime_gather_output: bool | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | MimoOutput, Tensor | None]:
        """Language output and modality outputs of one microbatch, and this rank's loss mask.

        Args:
            input_ids: `[B, S]` int64, the whole sequence; so are the next four.
            position_ids: `[B, S]`; None counts from 0 (within each packed sequence).
            attention_mask: bool, True where a position is hidden; None for the language model's own causal mask.
                `[B or 1, 1, 1, S]` (padding) joins the causal mask, `[B or 1, heads or 1, S, S]` or `[S, S]`
                replaces it. Causal layers of TransformerEngine, which would ignore it, refuse it.
            labels: `[B, S]` next-token ids. With them the language model returns per-token loss, 0 where a label
                does not count. Those that count must lie in the vocabulary.
            loss_mask: `[B, S]`, returned cut to this context-parallel rank; None with labels counts every label
                that is text or opens a written span (`labels.default_loss_mask`).
            modality_inputs: modality -> encoder -> its keyword inputs.
            modality_targets: modality -> decoder -> its keyword targets, for training.
            packed_seq_params: boundaries of packed sequences (`qkv_format="thd"`, B = 1). Where
                `cu_seqlens_q_padded` is given too, it says where each starts in `input_ids`.
            placement: `self.place(input_ids)` made ahead, e.g. by the collator on the CPU.
            inference_context: passed to the language model.
            generation_inputs: modality -> keyword inputs of its `generation_input`, which the language
                model shall see without a loss: what was sampled so far. In place of its targets.
            runtime_gather_output: whether every tensor-parallel rank gets whole logits `[B, S / CP, V]` in place of
                its shard of the vocabulary `[B, S / CP, V / TP]`. None gathers them where Megatron's `InferenceMode`
                is active or an `inference_context` is given; elsewhere the language model's `parallel_output` says.
            padding_mask: bool `[B, S]`, True where a position holds nothing: no label is learned there without a loss
                mask, and experts do not count it. Attention does see it; hide it by attention_mask or pack.

        Returns:
            `(outputs, loss_mask)`. `outputs` is what the language model returns if the
            configuration has no generation tokens or this is not the last pipeline stage,
            a `MimoOutput` otherwise: which of the two is fixed when the model is built.

        Raises:
            TypeError, ValueError: a bad batch, on every rank that sees it, before its first
                collective; for device tensors counts are checked without waiting for them, and
                a mismatch is raised at the latest one step later.
        """
        # The one place that waits for checks, those of earlier steps: this step's own would stall the device.
        made = placement if isinstance(placement, Placement) else None
        self._checks.begin(None if made is None else made.arrival, settled=made is not None and made.settled)
        self._check.tokens(
            input_ids,
            position_ids,
            attention_mask,
            labels,
            loss_mask,
            packed_seq_params,
            padding_mask,
            inference_context,
        )
        media = self._check.media(modality_inputs, modality_targets, generation_inputs)
        targets = self.prepare(media.targets)
        start = 0 if inference_context is None else inference_context.sequence_len_offset
        brought = Brought.of(frozenset(media.inputs), targets, media.shown)
        plan = self._planner.plan(
            input_ids, position_ids, packed_seq_params, padding_mask, placement, brought, self.training, start
        )

        rows = self.encode(media, targets, plan) if self.pre_process else {}
        rows = exchange(rows)
        decoder_input = self.align(input_ids, rows, plan) if self.pre_process else None
        learned = self._planner.learned(input_ids, labels, loss_mask, brought.reads, plan)
        language, states = self._run_language_model(
            input_ids if self._run_language_model.reads_ids else None,
            decoder_input,
            rows,
            attention_mask,
            learned,
            plan,
            packed_seq_params,
            inference_context,
            runtime_gather_output,
        )
        hidden = self.route(states, plan)
        outputs = self.decode_losses(language, hidden, targets, plan) if self._generates else language
        if not self.training:
            self._checks.report()  # no next step will
        return outputs, learned.loss_mask

    def generate(self, prompts: Sequence, max_new_tokens: int | Sequence[int] = 128, **options) -> Any:
        """What the model answers to each prompt, parts in order: `generation.engine.generate` says how it is asked."""
        return generate(self, prompts, max_new_tokens, **options)

    def embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        modality_inputs: Nested | None = None,
        generation_inputs: Shown | None = None,
    ) -> Tensor:
        """Rows `[S_local, B, H]` that the language model reads for a batch; on the first pipeline stage.

        Args:
            input_ids, position_ids, modality_inputs, generation_inputs: as `forward` takes them.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        self._checks.settled = False
        self._check.tokens(input_ids, position_ids, None, None, None, None, None, None)
        media = self._check.media(modality_inputs, None, generation_inputs)
        brought = Brought.of(frozenset(media.inputs), {}, media.shown)
        plan = self._planner.plan(input_ids, position_ids, None, None, None, brought, False, 0)
        return self.align(input_ids, self.encode(media, {}, plan), plan)

    # The stages, in the order of the flow --------------------------------------------------

    def prepare(self, targets: Nested) -> dict[str, dict[str, Prepared]]:
        """Targets that this stage reads, checked, counted and completed with this microbatch's random draws."""
        return {
            modality: self._submodules[modality].prepare(target, stream=modality)
            for modality, target in targets.items()
        }

    def place(self, input_ids: Tensor, packed_seq_params: PackedSeqParams | None = None) -> Placement:
        """Which row fills each position of `input_ids` `[B, S]`, and which positions generate."""
        return self._planner.place(input_ids, packed_seq_params)

    def settle(self, batch: Batch) -> Placement | None:
        """The placement of a batch of CPU tensors that was checked on the host; a forward pass with it checks no more.

        It then needs no copy to the host and no pinned memory, and can be captured. None without a placement.
        """
        return self._planner.settle(batch)

    def shapes(self, placement: Placement | None) -> Hashable:
        """What a batch's numbers on the host make of this rank's shapes: `Planner.shapes`."""
        return self._planner.shapes(placement, next(self.parameters()).device)

    def encode(self, media: Media, targets: Nested, plan: Plan) -> dict[str, Tensor]:
        """Rows `[N, H]` by table: encoded inputs, and what decoders feed their generation tokens.

        Modalities come in one order on every rank, with or without inputs: what stands in for an
        absent one joins the same collectives.
        """
        rows = {}
        for modality, submodule in self._submodules.items():
            if modality in self.mimo_config.special_token_ids:
                rows[modality] = encoded(modality, submodule, media.inputs.get(modality), plan, self._rows_like)
            if submodule.generation_input is None:
                continue
            shares_token = generation_table(modality) not in plan.placed.names
            reads = shares_token and modality in media.inputs  # its positions read
            count = 0 if reads else plan.counts.get(modality) or 0
            shown: Targets | None = media.shown.get(modality)
            if modality in targets:
                shown = submodule.generation_input.pick(targets[modality])
            fed = submodule.generation_rows(shown, count, self._rows_like)
            if not shares_token:
                rows[generation_table(modality)] = fed
            elif count:
                rows[modality] = with_idle(fed, [rows[modality]])
            else:
                rows[modality] = with_idle(rows[modality], [fed])
        return rows

    def align(self, input_ids: Tensor, rows: Mapping[str, Tensor], plan: Plan) -> Tensor:
        """Text and modality rows at their positions, `[S_local, B, H]`, this rank's only."""
        words, tables, group = self.language_model.embedding, in_order(rows, plan.placed), self.pg_collection.tp
        return align_checked(words, input_ids, plan.positions, tables, plan.placed, plan.shard, group)

    def route(self, hidden: Tensor, plan: Plan) -> dict[str, Tensor]:
        """Hidden states `[N, H]` at every modality's generation tokens; none `[0, H]` where their count is unknown."""
        groups, context_group = row_groups(self.pg_collection, self.config.sequence_parallel)
        rows = {}
        for modality, count in plan.counts.items() if self._generates else ():
            rule = self._submodules[modality].position_rule
            positions = plan.placed.generation_positions(modality, count or 0, rule)
            rows[modality] = route(hidden, positions, plan.shard, groups, context_group)
        return rows

    def decode_losses(self, language: Tensor, hidden: Mapping[str, Tensor], targets: Nested, plan: Plan) -> MimoOutput:
        """Language output, each output modality's hidden states, and its decoders' loss terms.

        Args:
            language: what the language model returned.
            hidden: modality -> `[N, H]`.
            targets: prepared targets.
            plan: of the batch.
        """
        share = (self.pg_collection.cp.rank(), self.pg_collection.cp.size())
        outputs = {}
        for modality, rows in hidden.items():
            losses = self._submodules[modality].loss(rows, targets.get(modality, {}), share)
            outputs[modality] = ModalityOutput(None if plan.counts[modality] is None else rows, losses)
        return MimoOutput(language, outputs, plan.placement)

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
            TypeError: something else than an output, or an option that the decoder's `sample` does not take.
            ValueError: options for a modality or decoder that the model lacks, or generation tokens of a
                sample that are no whole number of images or clips.
        """
        options = options or {}
        self._check.decoding(outputs, options)
        return {
            modality: {
                name: self._submodules[modality].decode(output.hidden, name, options.get(modality, {}).get(name))
                for name in self._submodules[modality].decoders
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
            modality_embeddings: modality -> `[N, H]`; `"text"` holds rows of all positions without a special token.
            input_ids: `[B, S]`.
            special_token_ids: modality -> token id.

        Raises:
            ValueError: a modality without a token id, or counts that differ.
        """
        return align_by_token_positions(modality_embeddings, input_ids, special_token_ids)

    def finish_checks(self) -> None:
        """Waits for what the last batch left to check on the device; without a next step nothing else does.

        Raises:
            ValueError: for the first check that fails.
        """
        self._checks.report()

    @property
    def checks(self) -> Checks:
        """Who owns the checks of this model's batches."""
        return self._checks

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

    @property
    def _submodules(self) -> Mapping[str, ModalitySubmodules]:
        """`modality_submodules`, whose `ModuleDict` does not tell a type checker what is in it; it has no `get`."""
        return cast(Mapping[str, ModalitySubmodules], self.modality_submodules)

    @property
    def _rows_like(self) -> Tensor:
        """A tensor with the width, dtype and device of embedded rows."""
        return self.language_model.embedding.word_embeddings.weight
