"""Alignment is bitwise that of Megatron-Core's own MIMO, on drawn batches; so is what both refuse."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mimo.align import align, align_by_token_positions
from megatron_mimo.placement import build_placement
from megatron_mimo.sharding import sequence_shard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models.mimo import MimoModel as Upstream

VOCABULARY = 40
TOKENS = [-1, -200, -(2**63), VOCABULARY, 32000, 10**12, 2**63 - 1, 0, 7]  # negative, huge, and inside the vocabulary


@pytest.fixture(scope="module")
def words(single_process):
    """Megatron's embedding, one rank, no dropout."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=1, hidden_dropout=0.0)
    return LanguageModelEmbedding(config, VOCABULARY, 64, position_embedding_type="rope")


def upstream(words):
    return SimpleNamespace(language_model=SimpleNamespace(embedding=words), partition_adapter=None)


@st.composite
def batches(draw):
    """Ids, special tokens, and rows of special bit patterns; samples may be empty of any modality."""
    batch, length = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    tokens = draw(st.lists(st.sampled_from(TOKENS), max_size=4, unique=True))
    text = [token for token in range(VOCABULARY) if token not in tokens]
    of_sample = st.lists(
        st.one_of(st.sampled_from(text), st.sampled_from(tokens or text)), min_size=length, max_size=length
    )
    sample = st.one_of(of_sample, st.just([text[0]] * length), st.just([(tokens or text)[0]] * length))
    ids = torch.tensor(draw(st.lists(sample, min_size=batch, max_size=batch)))
    special = {f"modality{i}": token for i, token in enumerate(tokens)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tables = {}
    for name, token in special.items():
        rows = torch.randn(int((ids == token).sum()), 6, generator=generator)
        rows[rows > 1.5] = draw(st.sampled_from([torch.inf, -0.0, torch.nan, 1e-45]))
        tables[name] = rows
    return ids, special, tables


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


@given(batches(), st.sampled_from(["now", "deferred"]))
def test_align_is_bitwise_upstreams(words, batch, validate):
    ids, special, tables = batch
    model = upstream(words)
    text = Upstream.get_text_embeddings(model, ids, None, special)
    expected = Upstream.align_embeddings_by_token_positions(model, {"text": text, **tables}, ids, special)
    placement = build_placement(ids, special, vocabulary_size=VOCABULARY, validate=validate)
    ours = align(words, ids, None, tables, placement, sequence_shard(ids.shape[1]))
    assert same_bits(ours, expected)
    assert same_bits(align_by_token_positions({"text": text, **tables}, ids, special), expected)


@settings(max_examples=200, deadline=None)
@given(batches(), st.data())
def test_counts_that_upstream_refuses_are_refused(words, batch, data):
    ids, special, tables = batch
    if not special:
        return
    name = data.draw(st.sampled_from(sorted(special)))
    change = data.draw(st.sampled_from([-1, 1, 3]))
    rows = max(tables[name].shape[0] + change, 0)
    if rows == tables[name].shape[0]:
        return
    wrong = tables | {name: torch.zeros(rows, 6)}
    with pytest.raises(ValueError):
        Upstream.align_embeddings_by_token_positions(upstream(words), wrong, ids, special)
    with pytest.raises(ValueError, match=rf"{name}: sample \d+ has \d+ special tokens but \d+ embeddings"):
        align_by_token_positions(wrong, ids, special)
