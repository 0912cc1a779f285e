"""What the losses of a batch will count is known from its masks and targets, before anything runs."""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo import MimoModel, loss_terms
from megatron_mimo.data.step import read_step
from megatron_mimo.decoders import (
    DiscreteDecoder,
    FlowDecoder,
    FlowTransformerDecoder,
    RegressionDecoder,
)
from megatron_mimo.training.reading import placed_batches
from megatron_mimo.training.speed.counts import TOKENS, count_batch, items, rows_read, rows_written, term
from megatron_mimo.training.speed.flops import part_sizes
from megatron_mimo.training.speed.throughput import Throughput
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


def test_a_modality_with_a_space_in_its_name_goes_through_the_throughput_log(single_process):
    named = dict(
        modality_submodules={"my images": tiny.image_spec(encoders={"my patches": ModuleSpec(tiny.PatchEncoder)})},
        special_token_ids={"my images": tiny.READ},
        generation_token_ids={"my images": tiny.WRITE},
        modality_loss_weights={},
    )
    model = MimoModel(tiny.mimo_config(**named))
    batch = tiny.batch()
    batch["input_ids"][batch["input_ids"] == tiny.HEAR] = 1
    batch["modality_inputs"] = {"my images": {"my patches": batch["modality_inputs"]["images"]["patches"]}}
    batch["modality_targets"] = {"my images": batch["modality_targets"]["images"]}
    counts = count_batch(batch, model)
    assert (counts[rows_read("my images")], counts[rows_written("my images")]) == (4, 5)
    assert counts[items("my images", "my patches")] == 2
    assert counts[term("my images/pixels")] == loss_terms(*model(**batch))["my images/pixels"].count.item()
    reports = []
    Throughput(part_sizes([model]), None, lambda _, rates: reports.append(rates), every=1).add(1, counts, seconds=2.0)
    (rates,) = reports
    assert rates["my images tokens read/s"] == 2.0 and rates["my images tokens written/s"] == 2.5
    assert rates["my images/my patches items/s"] == 1.0


def test_rows_are_counted_in_the_placement_that_the_reader_made_and_tokens_are_compared_once(
    single_process, monkeypatch
):
    model, placed = MimoModel(tiny.mimo_config()), []
    place = model.place
    monkeypatch.setattr(model, "place", lambda *given: placed.append(place(*given)) or placed[-1])
    (batch,) = placed_batches(iter([tiny.batch()]), model)
    batch["input_ids"] = torch.zeros_like(batch["input_ids"])  # which has none of the tokens
    counts = count_batch(batch, model)
    found = [counts[rows_read("images")], counts[rows_read("audio")], counts[rows_written("images")]]
    assert found == [4, 3, 5] and len(placed) == 1


def test_batches_of_what_has_no_more_than_a_next_one_are_placed_when_their_turn_comes(single_process):
    class Data:  # as Megatron's RerunDataIterator
        left = 2

        def __next__(self):
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return tiny.batch()

    batches = placed_batches(data := Data(), MimoModel(tiny.mimo_config()))
    assert data.left == 2 and "placement" in next(batches) and data.left == 1
    assert len(list(batches)) == 1


def test_a_rank_that_reads_without_an_iterator_is_told_so(single_process):
    with pytest.raises(ValueError, match="expected an iterator over batches on rank 0 .* found None"):
        read_step(
            None, 1, keep=dict, count=lambda batch: {}, tensor_group=single_process.groups.tp, data_group=None,
            device=torch.device("cpu"),
        )  # fmt: skip
