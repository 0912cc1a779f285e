"""Alignment on one rank: rows, gradients against autograd, every kind of embedding, bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mimo.align import align, align_by_token_positions
from megatron_mimo.lookup import plain_lookup
from megatron_mimo.placement import build_placement
from megatron_mimo.sharding import sequence_shard

IMAGES, AUDIO = -200, 10**12
TABLES = {"images": IMAGES, "audio": AUDIO}
HIDDEN, VOCABULARY, LENGTH = 8, 32, 12

pytestmark = pytest.mark.usefixtures("single_process")


def embedding(dtype=torch.float64, positions="rope", tokentypes=0, **config) -> LanguageModelEmbedding:
    settings = dict(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, hidden_dropout=0.0)
    module = LanguageModelEmbedding(
        TransformerConfig(**{**settings, **config}),
        VOCABULARY,
        LENGTH,
        position_embedding_type=positions,
        num_tokentypes=tokentypes,
    )
    return module.to("cpu", dtype)


def draw(batch=3, length=LENGTH, seed=0, dtype=torch.float64):
    """Ids with both modalities, and one table of rows for each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    for token in TABLES.values():
        ids[torch.rand(batch, length, generator=generator) < 0.3] = token
    tables = {
        name: torch.randn(int((ids == token).sum()), HIDDEN, generator=generator, dtype=dtype).requires_grad_()
        for name, token in TABLES.items()
    }
    return ids, tables


def aligned(words, ids, tables, position_ids=None, **keywords):
    placement = build_placement(ids, TABLES, vocabulary_size=VOCABULARY)
    return align(words, ids, position_ids, tables, placement, sequence_shard(ids.shape[1]), **keywords)


def expected_rows(text_BSH, ids, tables):
    """The same rows by autograd's own operations."""
    for name, token in TABLES.items():
        text_BSH = text_BSH.masked_scatter((ids == token).unsqueeze(-1), tables[name].to(text_BSH.dtype))
    return text_BSH.transpose(0, 1)


def looked_up(words, ids):
    return F.embedding(ids.where((ids >= 0) & (ids < VOCABULARY), 0), words.word_embeddings.weight)


def assert_same_gradients(ours, expected, inputs, exactly=False):
    grad = torch.randn_like(expected)
    mine = torch.autograd.grad(ours, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **(dict(rtol=0, atol=0) if exactly else {}))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_rows_and_gradients_are_autograds_in_float64(batch, length, seed):
    words = embedding()
    ids, tables = draw(batch, length, seed)
    ours = aligned(words, ids, tables)
    expected = expected_rows(looked_up(words, ids), ids, tables)
    assert torch.equal(ours, expected) and ours.is_contiguous()
    assert_same_gradients(ours, expected, [*tables.values(), words.word_embeddings.weight])


def test_special_positions_contribute_nothing_to_the_table():
    words = embedding()
    ids = torch.tensor([[IMAGES, 3, AUDIO, 3]])
    tables = {name: torch.randn(1, HIDDEN, dtype=torch.float64) for name in TABLES}
    aligned(words, ids, tables).sum().backward()
    gradient = words.word_embeddings.weight.grad
    assert gradient[3].eq(2).all()
    gradient[3] = 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_take_the_text_rows_dtype_and_get_gradients_of_their_own(dtype):
    words = embedding(dtype)
    ids, tables = draw(dtype=torch.float32)
    ours = aligned(words, ids, tables)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected_rows(looked_up(words, ids), ids, tables))
    ours.sum().backward()
    assert all(table.grad.dtype == torch.float32 and table.grad.eq(1).all() for table in tables.values())


def test_tables_need_not_be_contiguous_nor_the_gradient():
    words = embedding()
    ids, tables = draw()
    spread = {name: table.detach().t().contiguous().t().requires_grad_() for name, table in tables.items()}
    ours = aligned(words, ids, spread)
    assert torch.equal(ours, aligned(words, ids, tables))
    inputs = [*spread.values(), words.word_embeddings.weight]
    expanded = torch.autograd.grad(ours.sum(), inputs, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(ours, inputs, torch.ones_like(ours)), strict=True):
        assert torch.equal(a, b)


def test_what_is_frozen_gets_no_gradient_and_disturbs_nobody():
    words = embedding()
    ids, tables = draw()
    words.requires_grad_(False)
    tables["audio"].requires_grad_(False)
    aligned(words, ids, tables).sum().backward()
    assert tables["images"].grad.eq(1).all()
    assert tables["audio"].grad is None and words.word_embeddings.weight.grad is None
    tables["images"].requires_grad_(False)
    assert not aligned(words, ids, tables).requires_grad


def test_a_table_without_rows_may_be_empty_or_left_out():
    words = embedding()
    ids = torch.tensor([[1, 2, 3, 4]])
    empty = torch.randn(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    rows = aligned(words, ids, {"images": empty})
    assert torch.equal(rows, looked_up(words, ids).transpose(0, 1))
    rows.sum().backward()
    assert empty.grad.shape == (0, HIDDEN)


def test_ids_overwritten_before_backward_are_noticed():
    words = embedding()
    ids, tables = draw()
    rows = aligned(words, ids, tables)
    ids.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


# Embeddings that do more than look up


class Scaled(nn.Module):
    """An embedding of nobody's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)

    def forward(self, input_ids, position_ids):
        return self.table(input_ids).transpose(0, 1) * 3


class Doubled(LanguageModelEmbedding):
    """Megatron's, overridden."""

    def forward(self, input_ids, position_ids):
        return super().forward(input_ids, position_ids) * 2


EMBEDDINGS = {
    "learned positions": lambda: embedding(positions="learned_absolute"),
    "scaling": lambda: embedding(use_mup=True, mup_embedding_mult=2.0, mup_base_hidden_size=HIDDEN),
    "float32 residual": lambda: embedding(torch.bfloat16, fp32_residual_connection=True, bf16=True),
    "of another kind": Scaled,
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_text_rows_are_the_embeddings_own(kind):
    words = EMBEDDINGS[kind]()
    assert plain_lookup(words) is None
    ids, tables = draw()
    positions = torch.arange(LENGTH).expand_as(ids).flip(1)
    text = words(ids.where((ids >= 0) & (ids < VOCABULARY), 0), positions).transpose(0, 1)
    expected = expected_rows(text, ids, tables)
    ours = aligned(words, ids, tables, positions)
    assert ours.dtype == text.dtype
    assert torch.equal(ours, expected)
    assert_same_gradients(ours, expected, [*tables.values(), *words.parameters()])


def test_positions_with_several_channels_give_their_first():
    words = embedding(positions="learned_absolute")
    ids, tables = draw()
    positions = torch.stack([torch.arange(LENGTH).expand_as(ids), torch.zeros_like(ids), torch.zeros_like(ids)])
    assert torch.equal(aligned(words, ids, tables, positions), aligned(words, ids, tables, positions[0]))


def test_token_types_are_refused():
    ids, tables = draw()
    with pytest.raises(ValueError, match="adds token types"):
        aligned(embedding(tokentypes=2), ids, tables)


def test_dropout_acts_on_text_in_training_only():
    words = embedding(hidden_dropout=0.5)
    ids, tables = draw()
    assert plain_lookup(words) is None
    torch.manual_seed(5)
    text = words(ids.where((ids >= 0) & (ids < VOCABULARY), 0), None).transpose(0, 1)
    torch.manual_seed(5)
    assert torch.equal(aligned(words, ids, tables), expected_rows(text, ids, tables))
    words.eval()
    assert plain_lookup(words) is words.word_embeddings
    assert torch.equal(aligned(words, ids, tables), expected_rows(looked_up(words, ids), ids, tables))


def test_a_subclass_that_overrides_forward_is_called():
    words = embedding()
    ids, tables = draw()
    plain = aligned(words, ids, tables)
    words.__class__ = Doubled
    assert plain_lookup(words) is None
    text = ((ids != IMAGES) & (ids != AUDIO)).t()
    assert torch.equal(aligned(words, ids, tables)[text], 2 * plain[text])


@pytest.mark.parametrize("of_words", [False, True])
def test_hooks_on_the_embedding_run(of_words):
    words = embedding()
    ids, tables = draw()
    module, seen = words.word_embeddings if of_words else words, []
    plain = aligned(words, ids, tables)
    before = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert plain_lookup(words) is words.word_embeddings
    assert torch.equal(aligned(words, ids, tables), plain)
    assert seen == [ids.shape]
    before.remove()
    after = module.register_forward_hook(lambda module, args, output: output + 1)
    text = ((ids != IMAGES) & (ids != AUDIO)).t()
    assert torch.equal(aligned(words, ids, tables)[text], plain[text] + 1)
    after.remove()
    assert torch.equal(aligned(words, ids, tables), plain)


# Bad input


def test_counts_that_do_not_fit_are_named():
    ids, tables = draw()
    with pytest.raises(ValueError, match="images: sample . has . special tokens but . embeddings"):
        aligned(embedding(), ids, tables | {"images": tables["images"][1:]})
    with pytest.raises(ValueError, match="images: sample 0 has . special tokens but 0 embeddings"):
        aligned(embedding(), ids, {"audio": tables["audio"]})


def test_embeddings_without_a_token_are_refused():
    ids, tables = draw()
    with pytest.raises(ValueError, match=r"'video' have no special token in this placement, which reads \['images'"):
        aligned(embedding(), ids, tables | {"video": tables["audio"]})


def test_embeddings_must_be_rows():
    ids, tables = draw()
    with pytest.raises(ValueError, match=r"images: expected embeddings \[N, H\], found shape"):
        aligned(embedding(), ids, tables | {"images": tables["images"].unsqueeze(0)})


def test_embeddings_must_be_as_wide_as_the_model():
    ids, tables = draw()
    with pytest.raises(ValueError, match="audio: embeddings are 7 wide, the language model's text rows 8"):
        aligned(embedding(), ids, tables | {"audio": tables["audio"][:, :7]})


def test_placement_and_shard_must_be_of_these_ids():
    words, (ids, tables) = embedding(), draw()
    placement, shard = build_placement(ids, TABLES), sequence_shard(LENGTH)
    with pytest.raises(ValueError, match=r"input_ids is \[3, 11\], but the placement was built for \[3, 12\]"):
        align(words, ids[:, 1:], None, tables, placement, shard)
    with pytest.raises(ValueError, match="and the shard for a sequence of 10"):
        align(words, ids, None, tables, placement, sequence_shard(10))
    with pytest.raises(ValueError, match="input_ids is on cpu and the placement on meta: move it"):
        align(words, ids, None, tables, placement.to("meta"), shard)
    with pytest.raises(ValueError, match="the shard splits the sequence over 2 tensor-parallel ranks, but .* over 1"):
        align(words, ids, None, tables, placement, sequence_shard(LENGTH, tp_size=2))


@pytest.mark.parametrize("size", [None, VOCABULARY + 1])
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_text_outside_the_table_is_reported_where_the_placement_did_not_look(size, positions):
    ids = torch.tensor([[1, 2], [3, VOCABULARY]])
    placement = build_placement(ids, TABLES, vocabulary_size=size)
    with pytest.raises(ValueError, match=r"text: sample 1 has 1 token ids outside the vocabulary \(0 to 31\)"):
        align(embedding(positions=positions), ids, torch.zeros_like(ids), {}, placement, sequence_shard(2))


# align_by_token_positions


def test_rows_by_token_positions_differentiate_to_every_table():
    ids, tables = draw()
    count = int((ids != IMAGES).logical_and(ids != AUDIO).sum())
    text = torch.randn(count, HIDDEN, dtype=torch.float64, requires_grad=True)
    rows = align_by_token_positions({"text": text, **tables}, ids, TABLES)
    is_text = (ids != IMAGES) & (ids != AUDIO)
    expected = torch.zeros(*ids.shape, HIDDEN, dtype=torch.float64).masked_scatter(is_text.unsqueeze(-1), text)
    expected = expected_rows(expected, ids, tables)
    assert torch.equal(rows, expected)
    assert_same_gradients(rows, expected, [text, *tables.values()], exactly=True)


def test_positions_without_text_rows_are_zero():
    ids, tables = draw()
    rows = align_by_token_positions(tables, ids, TABLES)
    assert rows[((ids != IMAGES) & (ids != AUDIO)).t()].eq(0).all()
    assert rows.dtype == torch.float64


def test_rows_by_token_positions_refuse_what_does_not_fit():
    ids, tables = draw()
    with pytest.raises(ValueError, match="no embeddings to align"):
        align_by_token_positions({}, ids, TABLES)
    with pytest.raises(ValueError, match="'video' have no special token"):
        align_by_token_positions({"video": tables["audio"]}, ids, TABLES)
    with pytest.raises(ValueError, match="text: sample 0 has . special tokens but 0 embeddings"):
        align_by_token_positions({"text": torch.zeros(0, HIDDEN), **tables}, ids, TABLES)
