"""The language model: built from its spec, run once, its last hidden states kept on the way."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self, cast

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mimo.attention_mask import joined_with_causal
from megatron_mimo.build import build, constructor_parameters, maker, name_of, takes_any
from megatron_mimo.check.positions import PositionKind
from megatron_mimo.compat.hybrid import with_output_processor
from megatron_mimo.fp8 import check_fp8_layers, check_fp8_widths
from megatron_mimo.multi_token import LaterRows, embedding_handed_to
from megatron_mimo.plan import Learned, Plan
from megatron_mimo.rotary import GridGPT, rotary_kind, turn_of
from megatron_mimo.segments import turned
from megatron_mimo.sharding import SequenceShard
from megatron_mimo.token_loss import TokenLoss, only_counted

if TYPE_CHECKING:
    from megatron.core.inference.contexts import BaseInferenceContext
    from megatron.core.packed_seq_params import PackedSeqParams

# GPTModel wants a number even where positions are rotary and nothing has that length. This is
# what Megatron's own multimodal model assumes for a spec without it.
DEFAULT_MAX_SEQUENCE_LENGTH = 4096


def build_language_model(
    spec: ModuleSpec, *, pre_process: bool, post_process: bool, vp_stage: int | None, pg_collection
) -> MegatronModule:
    """The language model's part on this pipeline stage.

    Args:
        spec: of `GPTModel`, `HybridModel` or a model with their interface. Its own params win
            over the stage's. `max_sequence_length`, if left out, is 4096. A `transformer_layer_spec`
            that differs from stage to stage is given as a function, called with the model's
            configuration and `vp_stage` on each of them.
        pre_process, post_process: whether this stage is the first, the last.
        vp_stage: index of the virtual pipeline stage.
        pg_collection: process groups; None for Megatron's global ones.

    Raises:
        ValueError: an interleaved schedule over two stages that would mix up its messages; CUDA graphs of single
            layers; fp8 with widths or layers that cannot multiply in it; activations on the host without
            TransformerEngine.
    """
    check_interleaving(spec.params["config"])
    check_graphs(spec.params["config"])
    check_fp8_widths(spec.params["config"])
    check_offloading(spec.params["config"])
    taken = constructor_parameters(spec)
    offered = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
    _check_stage(spec, offered, taken)
    _check_multi_token(spec, whole=pre_process and post_process)
    if pg_collection is not None:
        offered["pg_collection"] = pg_collection
    length = taken.get("max_sequence_length")
    if length is not None and length.default is inspect.Parameter.empty:
        offered["max_sequence_length"] = DEFAULT_MAX_SEQUENCE_LENGTH
    model = build(_with_own_layers(spec, vp_stage), offered, through_keywords=True, what="language_model")
    check_fp8_layers(model)
    return model


def check_graphs(config: TransformerConfig) -> None:
    """Refuses Megatron's CUDA graphs of single layers.

    Raises:
        ValueError: naming what works in their place.
    """
    why = {
        "transformer_engine": "looks for the layers of a language model alone and would silently capture none",
        "local": "captures at the first training step for the whole process, where any later shape (an evaluation, "
        "generation, a second model) fails",
    }.get(config.cuda_graph_impl)
    if why is not None:
        raise ValueError(
            f"cuda_graph_impl={config.cuda_graph_impl!r} {why}. Set it to 'full_iteration', or give Trainer "
            "graphs=StepGraphs(...), which replay the whole step; TrainingControl(graphed=...) replays encoders."
        )


def check_offloading(config: TransformerConfig) -> None:
    """Refuses activations on the host without TransformerEngine, which moves them.

    Raises:
        ValueError: naming what works in their place.
    """
    if config.cpu_offloading and not HAVE_TE:
        raise ValueError(
            "cpu_offloading is TransformerEngine's, which is not installed here. Install it, or set "
            "TransformerConfig.cpu_offloading=False and compute activations again (recompute_granularity)."
        )


def _check_stage(spec: ModuleSpec, stage: Mapping[str, object], taken: Mapping[str, inspect.Parameter]) -> None:
    """Refuses a spec that would build another part of the model than this stage's.

    Raises:
        ValueError: stage arguments in the spec that disagree with the stage, or a class that takes none on a
            pipeline, where every stage would build the whole model.
    """
    for name in ("pre_process", "post_process"):
        given = spec.params.get(name, stage[name])
        if given != stage[name]:
            raise ValueError(
                f"language_model's params have {name}={given}, but this pipeline stage has {name}={stage[name]}. "
                "Leave it out: MimoModel says which part a stage builds."
            )
        if name not in taken and not takes_any(taken) and not stage[name]:
            raise ValueError(
                f"{name_of(maker(spec))} takes no {name}, so that every pipeline stage would build the whole "
                "model. Give its constructor pre_process and post_process, or **kwargs that it hands on, or use "
                "pipeline_model_parallel_size=1."
            )


def _check_multi_token(spec: ModuleSpec, whole: bool) -> None:
    """Refuses multi-token prediction where the rows of later positions are not at hand.

    Raises:
        ValueError: without layers for it; on a pipeline, whose last stage has no rows; of another class; with mrope on
            shards.
    """
    config = spec.params["config"]
    if not config.mtp_num_layers:
        return
    kind = maker(spec)
    if not (isinstance(kind, type) and issubclass(kind, GPTModel)):
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers} works with GPTModel alone, found {kind}. Set it to None."
        )
    if not whole:
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers} needs the embedded rows on the last pipeline stage, which only "
            "the first one has. Set it to None, or pipeline_model_parallel_size to 1."
        )
    if spec.params.get("mtp_block_spec") is None:
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers}, but the language model is given no layers for it and would "
            "predict one token alone. Give its spec mtp_block_spec, or set mtp_num_layers to None."
        )
    if spec.params.get("position_embedding_type") == "mrope" and config.context_parallel_size > 1:
        raise ValueError(
            "mtp_num_layers with mrope under context parallelism would roll positions that are not cut as the ids "
            "are. Set mtp_num_layers to None, or context_parallel_size to 1."
        )


def position_kind(spec: ModuleSpec) -> PositionKind:
    """What the language model of a spec makes of position ids, read from its params and its constructor."""
    taken = constructor_parameters(spec)

    def setting(name: str) -> Any:
        parameter = taken.get(name)
        default = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        return spec.params.get(name, default)

    kind = setting("position_embedding_type")
    table = (setting("max_sequence_length") or DEFAULT_MAX_SEQUENCE_LENGTH) if kind == "learned_absolute" else None
    model = maker(spec)
    return PositionKind(kind, table, own_angles=isinstance(model, type) and issubclass(model, GridGPT))


def _with_own_layers(spec: ModuleSpec, vp_stage: int | None) -> ModuleSpec:
    """`spec` with the layers of this stage in place of the function that gives them."""
    layers = spec.params.get("transformer_layer_spec")
    if isinstance(layers, (ModuleSpec, type)) or not callable(layers):
        return spec
    own = layers(spec.params["config"], vp_stage=vp_stage)
    return dataclasses.replace(spec, params={**spec.params, "transformer_layer_spec": own})


def check_interleaving(config: TransformerConfig) -> None:
    """Refuse what silently trains on the wrong activations.

    With two stages, the one before is also the one behind. Sent in one batch, the two messages are
    told apart by their order alone, and both sides use the same order.
    """
    interleaves = config.virtual_pipeline_model_parallel_size is not None
    if interleaves and config.pipeline_model_parallel_size == 2 and not config.overlap_p2p_comm:
        raise ValueError(
            "virtual_pipeline_model_parallel_size with pipeline_model_parallel_size=2 needs "
            "overlap_p2p_comm=True and batch_p2p_comm=False in the language model's configuration, "
            f"found overlap_p2p_comm={config.overlap_p2p_comm}. Otherwise forward and backward "
            "messages between the two stages are taken for each other."
        )


class LanguageCall:
    """Calls a language model with what its `forward` takes of what a batch brings.

    Args:
        model: this stage's part of the language model.
        parallel_output: whether it leaves logits cut over tensor-parallel ranks by itself.
        loss_where_counted: whether the loss is 0, and as far as possible not computed, where a label does not count.
    """

    def __init__(self, model: MegatronModule, parallel_output: bool = True, loss_where_counted: bool = True) -> None:
        self._model, self._parallel_output = model, parallel_output
        self._loss_where_counted = loss_where_counted
        self._takes = inspect.signature(model.forward).parameters.keys()
        self._experts = model.config.num_moe_experts is not None
        self._predicts_more = bool(model.config.mtp_num_layers) and model.post_process

    @property
    def reads_ids(self) -> bool:
        """Whether this stage reads token ids beside the embedded rows: multi-token prediction does."""
        return self._predicts_more

    def __call__(
        self,
        input_ids: Tensor | None,
        decoder_input: Tensor | None,
        rows: Mapping[str, Tensor],
        attention_mask: Tensor | None,
        learned: Learned,
        plan: Plan,
        packed_seq_params: PackedSeqParams | None,
        inference_context: BaseInferenceContext | None,
        runtime_gather_output: bool | None,
    ) -> tuple[Tensor, Tensor]:
        """What the language model returns (hidden states, logits or per-token loss), and its states.

        Args:
            input_ids: `[B, S]`, global sequence, where `reads_ids`.
            decoder_input: `[S_local, B, H]`, rank-local; None behind the first pipeline stage.
            rows: reading table -> `[N, H]`, placed in `decoder_input`.
            attention_mask: as `joined_with_causal` takes it, or None.
            learned: labels and loss mask, and which labels count.
            plan: of the batch.
            packed_seq_params, inference_context: Megatron's, or None.
            runtime_gather_output: whether logits are gathered over tensor-parallel ranks; None gathers them in
                inference and leaves them to the model's own `parallel_output` elsewhere.

        Returns:
            `(output, states)`. The states are the transformer stack's output `[S_local, B, H]`, on the last pipeline
            stage after the final norm.
        """
        if attention_mask is not None:
            attention_mask = joined_with_causal(attention_mask, self._model.decoder)
        self._check_gathered(learned.labels, runtime_gather_output)
        if runtime_gather_output is None and (inference_context is not None or InferenceMode.is_active()):
            runtime_gather_output = True
        offered = {
            "loss_mask": learned.loss_mask,
            "runtime_gather_output": runtime_gather_output,
            "padding_mask": self._padding_mask(plan),
        }
        known = {name: value for name, value in offered.items() if name in self._takes}
        ids, positions = None, plan.positions  # decoder_input stands in for the lookup
        more: AbstractContextManager[None] = nullcontext()
        if self._predicts_more and not InferenceMode.is_active():
            ids, positions = plan.shard.cut(cast(Tensor, input_ids)), plan.shard.cut(positions)
            later = self._later_rows(rows, plan, packed_seq_params)
            more = embedding_handed_to(self._model.mtp, later)
            known["loss_mask"] = later.text if learned.loss_mask is None else learned.loss_mask
        turn = None
        if packed_seq_params is not None and inference_context is None:
            turn = turn_of(rotary_kind(self._model), plan.shard, plan.counted, packed_seq_params)
        with HiddenStates(self._model.decoder) as states, more:
            output = self._run(
                learned,
                plan.shard,
                input_ids=ids,
                position_ids=positions,
                attention_mask=attention_mask,
                decoder_input=decoder_input,
                packed_seq_params=turned(packed_seq_params, turn),
                inference_context=inference_context,
                **known,
            )
        return output, cast(Tensor, states.last)

    def _run(self, learned: Learned, shard: SequenceShard, **call: Any) -> Tensor:
        """The language model's output; a loss is 0 where a label does not count, and not computed where the host knows.

        On a model without a hook for its output the loss runs everywhere, and where Megatron puts off the output
        layer's weight gradients (`defer_embedding_wgrad_compute`), of which it keeps one a microbatch.
        """
        model, labels = self._model, learned.labels
        if labels is None or not model.post_process or not self._loss_where_counted:
            return model(labels=labels, **call)
        hybrid = isinstance(model, HybridModel)
        hooked = (hybrid or "output_processor" in self._takes) and not model.config.defer_embedding_wgrad_compute
        if learned.counted is None or not hooked:
            return only_counted(model(labels=labels, **call), cast(Tensor, learned.loss_mask))
        loss = TokenLoss(learned.counted, shard, model.pg_collection.tp if model.config.sequence_parallel else None)
        if hybrid:
            return with_output_processor(model, loss, labels, **call)
        return model(labels=labels, output_processor=loss, **call)

    def _check_gathered(self, labels: Tensor | None, gathered: bool | None) -> None:
        """Refuses labels beside gathered logits, of which Megatron's loss over vocabulary shards makes another loss."""
        if gathered is None:
            gathered = not self._parallel_output
        if labels is not None and gathered and self._model.post_process and self._model.pg_collection.tp.size() > 1:
            raise ValueError(
                "labels are given with gathered logits (runtime_gather_output=True or parallel_output=False) on "
                "several tensor-parallel ranks: the loss is taken over shards of the vocabulary. Leave one of them out."
            )

    def _later_rows(
        self, rows: Mapping[str, Tensor], plan: Plan, packed_seq_params: PackedSeqParams | None
    ) -> LaterRows:
        groups, split = self._model.pg_collection, self._model.config.sequence_parallel
        return LaterRows(self._model.embedding, rows, plan, packed_seq_params, groups.cp, groups.tp, split)

    def _padding_mask(self, plan: Plan) -> Tensor | None:
        """Bool `[B, S_local]`, which of this rank's positions experts shall not count, or None.

        Beside a `decoder_input` GPTModel does not cut it.
        """
        if plan.padding is None or not self._experts:
            return None
        padding = plan.padding.expand(plan.batch_size, -1)
        return padding if plan.shard.is_whole else padding.index_select(1, plan.shard.positions).contiguous()


class HiddenStates:
    """Keeps what the transformer stack gave while the language model ran.

    The decoders read the very states that the logits come from, so the language model runs once.
    A forward hook serves every model class alike; it is there only as long as the `with` block.

    Args:
        stack: the language model's transformer stack, on the last pipeline stage.

    Attributes:
        last: `[S_local, B, H]` of the last forward pass, after the final norm, rank-local.

    Example:
        >>> stack = nn.Linear(2, 2)
        >>> with HiddenStates(stack) as states:
        ...     output = stack(stack.weight)
        >>> states.last is output
        True
    """

    def __init__(self, stack: nn.Module) -> None:
        self._stack = stack
        self.last: Tensor | None = None

    def __enter__(self) -> Self:
        self._hook = self._stack.register_forward_hook(self._keep)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()

    def _keep(self, module, inputs, output) -> None:
        self.last = output[0] if isinstance(output, tuple) else output
