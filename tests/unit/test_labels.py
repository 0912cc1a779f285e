"""What is learned as text where a batch brings no loss mask."""

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo import AudioModalitySubmodules, MimoModel, loss_terms
from megatron_mimo.config import MimoModelConfig
from megatron_mimo.decoders import (
    CodeInput,
    CodeTargets,
    CodeTokenizer,
    DiscreteDecoder,
    RegressionDecoder,
    VectorTargets,
)
from megatron_mimo.labels import default_loss_mask
from megatron_mimo.training.speed.counts import count_batch, term
from tests import tiny

VOCABULARY, READ, WRITE, BEGIN, END = 100, 60, 61, 62, 63


class Written(nn.Module):
    """Stands in for submodules whose one decoder takes `rows` generation tokens a media item, 0 for a variable
    number."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.spans_vary = rows == 0
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


def test_a_model_learns_as_much_from_a_special_id_inside_the_vocabulary_as_from_one_outside(single_process):
    found, weights = [], None
    for read in (tiny.READ, READ):
        only = {"special_token_ids": {"images": read}, "modality_submodules": {"images": tiny.image_spec()}}
        model = MimoModel(tiny.mimo_config(**only))
        model.load_state_dict(weights := weights or model.state_dict())
        ids = torch.tensor([[1, read, read, 2, 3, read, read, 4]])
        given = {"images": {"patches": {"x": torch.ones(4, tiny.PIXELS)}}}
        term = loss_terms(*model(ids, labels=ids.roll(-1, 1), modality_inputs=given))["text"]
        found.append((float(term.count), float(term.sum.detach())))
    assert found[0] == found[1]


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


@pytest.mark.parametrize("begin", [{}, {"begin_token_ids": {"images": BEGIN}}])
def test_each_token_of_a_span_of_variable_length_is_learned_and_so_is_its_end(begin):
    tokens = {**begin, "end_token_ids": {"images": END}}
    assert learned([1, BEGIN, WRITE, WRITE, WRITE, END, 3], rows=0, **tokens) == [1, 1, 1, 1, 1, 1, 0]


def speech(targets, decoder=DiscreteDecoder, **tokens) -> MimoModelConfig:
    params = dict(width=tiny.HIDDEN, targets=targets)
    parts = dict(decoders={"codes": ModuleSpec(module=decoder, params=params)})
    return MimoModelConfig(
        tiny.language_spec(),
        {"speech": ModuleSpec(module=AudioModalitySubmodules, submodules=parts)},
        generation_token_ids={"speech": WRITE},
        **tokens,
    )


VARIABLE = CodeTargets(8, variable=True)


def test_a_description_says_whether_spans_vary_and_the_model_learns_them_so(single_process):
    ids = torch.tensor([[1, BEGIN, WRITE, WRITE, WRITE, END, 3]])
    for targets, expected in ((CodeTargets(8), [1, 0, 0, 0, 1, 1, 0]), (VARIABLE, [1, 1, 1, 1, 1, 1, 0])):
        tokens = dict(begin_token_ids={"speech": BEGIN}, end_token_ids={"speech": END})
        model = MimoModel(speech(targets, **tokens))
        labels = ids.roll(-1, 1)
        labels[:, -1] = -1
        codes = {"speech": {"codes": {"codes": torch.arange(3)}}}
        _, mask = model(ids, labels=labels, modality_targets=codes)
        assert mask[0].long().tolist() == expected
        counted = count_batch(dict(input_ids=ids, labels=labels, modality_targets=codes), model)
        assert counted[term("text")] == sum(expected)


@pytest.mark.parametrize("stage", [{}, {"post_process": False}, {"pre_process": False}])
def test_spans_of_variable_length_without_an_end_token_are_refused_on_every_stage(stage, single_process):
    with pytest.raises(ValueError, match=r"'speech': decoders \['codes'\] write a variable .* end_token_ids has"):
        MimoModel(speech(VARIABLE), **stage)


class Codec(nn.Module):
    def encode(self, media):
        return media.long()

    def decode(self, codes):
        return codes


def test_spans_of_variable_length_that_do_not_fit_are_refused(single_process):
    ends = dict(end_token_ids={"speech": END})
    fixed = speech(VectorTargets(4, variable=True), RegressionDecoder, **ends)
    fixed.modality_submodules["speech"].params["frames_per_clip"] = 2
    with pytest.raises(ValueError, match="assembled by a fixed one. Leave out image_shape or frames_per_clip"):
        MimoModel(fixed)
    two = speech(VARIABLE, **ends)
    other = ModuleSpec(module=DiscreteDecoder, params=dict(width=tiny.HIDDEN, targets=CodeTargets(8)))
    two.modality_submodules["speech"].submodules["decoders"]["other"] = other
    with pytest.raises(ValueError, match="which read the same positions, .* alone write a variable"):
        MimoModel(two)
    with pytest.raises(ValueError, match="variable=True, but its tokenizer makes the same number"):
        CodeTargets(8, CodeTokenizer(Codec(), grid=(2, 2)), variable=True)
    outside = speech(VARIABLE, **ends)
    feed = ModuleSpec(module=CodeInput, params=dict(hidden_size=tiny.HIDDEN))
    outside.modality_submodules["speech"].submodules["generation_input"] = feed
    with pytest.raises(ValueError, match="learns its generation token -7 as text"):
        MimoModel(replace(outside, generation_token_ids={"speech": -7}))
