"""Alignment on several ranks equals one rank's: rows and gradients, for every split of the vocabulary and sequence.

Everything is drawn from one seed on every rank, so the reference needs no communication: autograd's own lookup and
`masked_scatter` of the whole batch. float64, so that the order of a sum cannot hide a wrong one.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mimo.align import align
from megatron_mimo.launch import Run
from megatron_mimo.lookup import plain_lookup
from megatron_mimo.placement import build_placement
from megatron_mimo.sharding import sequence_shard
from tests.distributed.harness import case

HIDDEN, VOCABULARY, LENGTH = 10, 64, 48
TABLES = {"images": -200, "audio": 10**9, "absent": -7}
PACKED = torch.tensor([0, 8, 8, 32, 48], dtype=torch.int32)  # multiples of 2 * cp, one of them empty


class Reference:
    """The whole batch on one rank: inputs, aligned rows [S, B, H], and gradients for one drawn output gradient."""

    def __init__(self, batch: int, positions: bool) -> None:
        draw = torch.Generator().manual_seed(11)
        self.ids = torch.randint(0, VOCABULARY, (batch, LENGTH), generator=draw)
        for token in (-200, 10**9):
            self.ids[torch.rand(batch, LENGTH, generator=draw) < 0.3] = token
        self.position_ids = torch.arange(LENGTH).flip(0).expand(batch, LENGTH)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

        self.weight, self.positions = normal(VOCABULARY, HIDDEN), normal(LENGTH, HIDDEN)
        self.tables = {
            name: normal(int((self.ids == token).sum()), HIDDEN) for name, token in TABLES.items() if name != "absent"
        }
        rows = F.embedding(self.ids.where((self.ids >= 0) & (self.ids < VOCABULARY), 0), self.weight)
        if positions:
            rows = rows + F.embedding(self.position_ids, self.positions)
        for name, table in self.tables.items():
            rows = rows.masked_scatter((self.ids == TABLES[name]).unsqueeze(-1), table)
        self.rows = rows.transpose(0, 1)
        self.grad = torch.randn(self.rows.shape, generator=draw, dtype=torch.float64)

    def gradients(self, positions: torch.Tensor) -> list[torch.Tensor]:
        """Of the tables and the vocabulary, if only these positions have an output gradient."""
        inputs = [*self.tables.values(), self.weight]
        return torch.autograd.grad(self.rows[positions], inputs, self.grad[positions], retain_graph=True)


def embedding(run: Run, whole: Reference, positions: bool, sequence_parallel: bool, scatters: bool):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        hidden_dropout=0.0,
        tensor_model_parallel_size=run.groups.tp.size(),
        sequence_parallel=sequence_parallel,
    )
    words = LanguageModelEmbedding(
        config,
        VOCABULARY,
        LENGTH,
        position_embedding_type="learned_absolute" if positions else "rope",
        scatter_to_sequence_parallel=scatters,
        tp_group=run.groups.tp,
    ).double()
    with torch.no_grad():
        words.word_embeddings.weight.copy_(whole.weight.chunk(run.groups.tp.size())[run.tensor_rank])
        if positions:
            words.position_embeddings.weight.copy_(whole.positions)
    return words


def check(
    run: Run,
    sequence_parallel: bool = False,
    packed: bool = False,
    positions: bool = False,
    scatters: bool = True,
    frozen: bool = False,
    validate: str = "now",
) -> None:
    """Aligns on this rank and holds rows and gradients against the reference's."""
    whole = Reference(1 if packed else 3, positions)
    words = embedding(run, whole, positions, sequence_parallel, scatters)
    words.requires_grad_(not frozen)
    assert (plain_lookup(words) is None) == positions
    split = {"tp_rank": run.tensor_rank, "tp_size": run.groups.tp.size()} if sequence_parallel else {}
    shard = sequence_shard(
        LENGTH,
        cp_rank=run.context_rank,
        cp_size=run.groups.cp.size(),
        cu_seqlens=PACKED if packed else None,
        **split,
    )
    placement = build_placement(whole.ids, TABLES, vocabulary_size=VOCABULARY, validate=validate)
    tables = {name: table.detach().clone().requires_grad_() for name, table in whole.tables.items()}
    rows = align(words, whole.ids, whole.position_ids, tables, placement, shard, run.groups.tp, sequence_parallel)
    assert torch.equal(rows, whole.rows[shard.positions])

    rows.backward(whole.grad[shard.positions])
    # Complete on every tensor-parallel rank; over context-parallel ranks each has the share of its positions.
    *expected, weight = whole.gradients(shard.whole_cp.positions)
    for table, gradient in zip(tables.values(), expected, strict=True):
        torch.testing.assert_close(table.grad, gradient, rtol=0, atol=0)
    if frozen:
        assert words.word_embeddings.weight.grad is None
        return
    mine = weight.chunk(run.groups.tp.size())[run.tensor_rank]
    torch.testing.assert_close(words.word_embeddings.weight.grad, mine)

    for gradient in (*(table.grad for table in tables.values()), words.word_embeddings.weight.grad):
        dist.all_reduce(gradient, group=run.groups.cp)
    *expected, weight = whole.gradients(torch.arange(LENGTH))
    for table, gradient in zip(tables.values(), expected, strict=True):
        torch.testing.assert_close(table.grad, gradient)
    mine = weight.chunk(run.groups.tp.size())[run.tensor_rank]
    torch.testing.assert_close(words.word_embeddings.weight.grad, mine)


@case(ranks=2, tensor_model_parallel_size=2)
@case(ranks=2, context_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2)
def alignment_equals_one_ranks(run: Run) -> None:
    check(run)
    check(run, frozen=True)
    check(run, positions=True)
    check(run, validate="deferred")


@case(ranks=2, tensor_model_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=4)
def alignment_under_sequence_parallelism_equals_one_ranks(run: Run) -> None:
    for scatters in (True, False):
        check(run, sequence_parallel=True, scatters=scatters)
        check(run, sequence_parallel=True, scatters=scatters, positions=True)
    check(run, sequence_parallel=True, frozen=True)


@case(ranks=2, context_parallel_size=2)
@case(ranks=4, tensor_model_parallel_size=2, context_parallel_size=2)
def alignment_of_packed_sequences_equals_one_ranks(run: Run) -> None:
    check(run, packed=True)
    check(run, packed=True, positions=True)
    if run.groups.tp.size() > 1:
        check(run, packed=True, sequence_parallel=True)


@case(ranks=2, tensor_model_parallel_size=2)
def a_bad_batch_raises_on_every_rank_before_any_collective(run: Run) -> None:
    whole = Reference(3, positions=False)
    words = embedding(run, whole, False, False, True)
    placement = build_placement(whole.ids, TABLES, vocabulary_size=VOCABULARY)
    with pytest.raises(ValueError, match="images: sample 0 has"):
        align(words, whole.ids, None, {}, placement, sequence_shard(LENGTH), run.groups.tp)
    # Nothing is left behind on the group: the next collective pairs up.
    counted = torch.ones(1)
    dist.all_reduce(counted, group=run.groups.tp)
    assert counted.item() == 2


@case(ranks=2, tensor_model_parallel_size=2)
def no_rank_holds_the_width_of_the_model_over_the_whole_sequence(run: Run) -> None:
    whole = Reference(3, positions=False)
    words = embedding(run, whole, False, True, True)
    shard = sequence_shard(LENGTH, tp_rank=run.tensor_rank, tp_size=2)
    placement = build_placement(whole.ids, TABLES, vocabulary_size=VOCABULARY)
    largest = LargestResult()
    with largest:
        rows = align(words, whole.ids, None, whole.tables, placement, shard, run.groups.tp, True)
        rows.sum().backward()
    assert largest.numel <= max(rows.numel(), words.word_embeddings.weight.numel())


class LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that any operation makes, views of larger ones included as what they show."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result
