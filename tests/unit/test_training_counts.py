"""What a decoder's loss will count is known from its targets, before anything runs."""

import pytest
import torch

from megatron_mimo.decoders import (
    DiscreteDecoder,
    FlowDecoder,
    FlowTransformerDecoder,
    RegressionDecoder,
)
from tests import tiny

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
