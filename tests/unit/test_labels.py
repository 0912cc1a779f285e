"""What is learned as text where a batch brings no loss mask."""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo.config import MimoModelConfig
from megatron_mimo.labels import default_loss_mask

VOCABULARY, READ, WRITE, BEGIN, END = 100, 60, 61, 62, 63


class Written(nn.Module):
    """Stands in for submodules whose one decoder takes `rows` generation tokens a media item."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.decoders = {"out": None}
        self.rows = rows

    def medium_of(self, name: str) -> int:
        return self.rows


def learned(ids: list[int], rows: int = 1, reads=(), labels=None, read: int = READ, **tokens) -> list[int]:
    config = MimoModelConfig(
        ModuleSpec(module=object, params={"vocab_size": VOCABULARY}),
        {"images": ModuleSpec(module=object)},
        special_token_ids={"images": read},
        generation_token_ids={"images": WRITE},
        **tokens,
    )
    ids = torch.tensor([ids])
    labels = ids.roll(-1, 1) if labels is None else torch.tensor([labels])
    labels[:, -1] = -1
    mask = default_loss_mask(ids, labels, None, config, {"images": Written(rows)}, reads)
    return mask[0].long().tolist()


@pytest.mark.parametrize("read", [READ, -200])
def test_special_tokens_are_never_labels_inside_the_vocabulary_or_out(read):
    assert learned([1, read, read, 2, 3], read=read) == [0, 0, 1, 1, 0]


def test_without_a_begin_token_the_first_generation_token_opens_the_span():
    assert learned([1, WRITE, WRITE, WRITE, 2, 3]) == [1, 0, 0, 1, 1, 0]


def test_a_begin_token_opens_the_span_and_the_end_token_is_text():
    tokens = {"begin_token_ids": {"images": BEGIN}, "end_token_ids": {"images": END}}
    assert learned([1, BEGIN, WRITE, WRITE, END, 3], **tokens) == [1, 0, 0, 1, 1, 0]


def test_each_of_two_media_items_side_by_side_is_opened():
    assert learned([1, WRITE, WRITE, WRITE, WRITE, 2], rows=2) == [1, 0, 1, 0, 1, 0]
    assert learned([1, WRITE, WRITE, WRITE, WRITE, 2], rows=4) == [1, 0, 0, 0, 1, 0]


def test_where_one_token_reads_and_writes_the_inputs_of_the_batch_say_which():
    ids = [1, WRITE, WRITE, 2, 3]
    assert learned(ids, read=WRITE) == [1, 0, 1, 1, 0]
    assert learned(ids, read=WRITE, reads=["images"]) == [0, 0, 1, 1, 0]


def test_negative_labels_are_not_learned():
    assert learned([1, 2, 3, 4], labels=[2, -1, -100, -1]) == [1, 0, 0, 0]
