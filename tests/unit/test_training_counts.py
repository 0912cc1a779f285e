"""What the losses of a batch will count is known from its masks and targets, before anything runs."""

import pytest
import torch

from megatron_mimo import MimoModel, loss_terms
from megatron_mimo.decoders import (
    DiscreteDecoder,
    FlowDecoder,
    FlowTransformerDecoder,
    RegressionDecoder,
)
from megatron_mimo.training.speed.counts import TOKENS, count_batch, term
from tests import packed, tiny

WIDTH = 16
CODES = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]])
DECODERS = {
    "regression": (RegressionDecoder(width=WIDTH, target_width=3), {"target": torch.randn(4, 3)}),
    "one codebook": (DiscreteDecoder(width=WIDTH, codebook_sizes=5), {"codes": CODES[:, 0]}),
    "two codebooks": (DiscreteDecoder(width=WIDTH, codebook_sizes=(5, 5)), {"codes": CODES}),
    "flow of rows": (FlowDecoder(width=WIDTH, target_width=3), {"target": torch.randn(4, 3)}),
    "flow of spans": (
        FlowTransformerDecoder(
            width=WIDTH, target_width=3, rows_per_item=2, targets_per_item=4, hidden_width=8, depth=1, heads=2
        ),
        {"target": torch.randn(8, 3)},
    ),
    "elements": (tiny.LinearDecoder(width=WIDTH), {"pixels": torch.randn(4, tiny.PIXELS)}),
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_count_equals_the_count_of_the_loss(name, weighted):
    decoder, targets = DECODERS[name]
    if weighted:
        if isinstance(decoder, tiny.LinearDecoder):
            pytest.skip("takes no weight")
        targets = {**targets, "weight": torch.rand(len(next(iter(targets.values()))))}
    term = decoder.loss(torch.randn(4, WIDTH), decoder.prepare(targets))
    assert decoder.count(targets) == pytest.approx(term.count.item())


def test_text_counts_without_a_mask_what_the_loss_counts_without_one(single_process):
    model = MimoModel(tiny.mimo_config())
    batch = tiny.batch()
    del batch["loss_mask"]
    batch["labels"][:, 3:7] = -100
    counts = count_batch(batch, model)
    behind_the_first = 2 + 1  # of three and two generation tokens, all but the one that opens the image
    assert counts[term("text")] == counts[TOKENS] == 3 * 12 - behind_the_first
    assert counts[term("text")] == loss_terms(*model(**batch))["text"].count.item()


def test_padding_of_packed_sequences_does_not_count_where_there_is_no_mask(single_process):
    model = MimoModel(tiny.mimo_config(packed.language_spec(tiny.language_config())))
    ids = torch.arange(1, 13)[None]
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "packed_seq_params": packed.packed_params([5, 3], [8, 4])}
    counts = count_batch(batch, model)
    assert counts[term("text")] == counts[TOKENS] == 5 + 3
    assert counts[term("text")] == loss_terms(*model(**batch))["text"].count.item()
