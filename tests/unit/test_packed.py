"""Packed sequences through a whole model: the loss terms and gradients of the same sequences apart."""

import pytest
import torch

from megatron_mimo import MimoModel, deferred, sample_one_by_one
from megatron_mimo.decoders import RegressionDecoder, TargetInput
from tests import packed, tiny
from tests.distributed.cases import decoders as cases
from tests.distributed.cases.layouts import close

KINDS = {
    "discrete, predecessor": cases.kinds()["discrete"],
    "flow, own": cases.kinds()["flow"],
    "flow transformer, own": cases.kinds()["flow_transformer"],
    "regression, predecessor": cases.Kind(
        RegressionDecoder,
        dict(width=cases.WIDTH, target_width=4, position_rule="predecessor"),
        cases.feed(TargetInput, target_width=4),
        cases.regression_targets,
        sharded=False,
    ),
}


def model_of(kind: cases.Kind) -> MimoModel:
    torch.manual_seed(0)
    model = cases.build(kind, packed.language_spec(tiny.language_config()), reads=True)
    cases.spread(model)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_batch_gives_the_losses_and_gradients_of_its_sequences_apart(single_process, name):
    model, targets = model_of(KINDS[name]), KINDS[name].targets(sum(packed.spans()))
    alone = packed.alone(opens="own" in name)
    counts = packed.step_counts(model, alone, targets)
    expected, gradients = packed.step(model, list(zip(alone, packed.shares(model, targets))), counts)
    assert all(gradient.any() for key, gradient in gradients.items() if not key.endswith("null"))
    for together in (packed.packed(alone), packed.packed(alone, padded=False), packed.padded(alone)):
        found, theirs = packed.step(model, [(together, targets)], counts)
        for term in expected:
            close(found[term].count, expected[term].count, f"count of {term}")
            close(found[term].sum, expected[term].sum, term)
        for key, gradient in gradients.items():
            close(theirs[key], gradient, key)


def codes(**changes) -> tuple[MimoModel, dict]:
    kind = KINDS["discrete, predecessor"]
    batch = packed.packed(packed.alone())
    targets = {"images": {"out": kind.targets(sum(packed.spans()))}}
    return model_of(kind), {**batch, "modality_targets": targets, **changes}


def packed_lengths(batch: dict) -> list[int]:
    return batch["packed_seq_params"].cu_seqlens_q_padded.diff().tolist()


def test_padding_of_packed_sequences_counts_nothing_without_a_mask(single_process):
    model, batch = codes(loss_mask=None)
    _, loss_mask = model(**batch)
    text = (batch["labels"] >= 0) & (batch["labels"] != tiny.READ) & (batch["labels"] != tiny.WRITE)
    written = batch["labels"] == tiny.WRITE
    own = torch.zeros_like(text)
    start = 0
    for length, padded in zip((length for length, _, _, _ in packed.SEQUENCES), packed_lengths(batch), strict=True):
        own[:, start : start + length] = True
        start += padded
    assert torch.equal(loss_mask[own & text], torch.ones(int((own & text).sum())))
    assert not loss_mask[~own].any() and loss_mask.sum() - (own & text).sum() <= written.sum()
    assert loss_mask[0, 23] == 0 and loss_mask[0, 22] == 1  # the third sequence: 11 of 12


@pytest.mark.parametrize(("token", "what"), [(tiny.READ, "special"), (tiny.WRITE, "generation")])
def test_what_is_read_or_written_in_padding_is_refused(single_process, token, what):
    model, batch = codes()
    batch["input_ids"][0, 31] = token
    with pytest.raises(ValueError, match=f"images: its {what} token at position 31 of sample 0 stands in padding"):
        model(**batch)


def test_a_predecessor_beyond_a_packed_boundary_is_refused(single_process):
    kind = KINDS["discrete, predecessor"]
    batch = packed.packed(packed.alone(opens=True))
    targets = {"images": {"out": kind.targets(sum(packed.spans()))}}
    with pytest.raises(ValueError, match="images: the generation token at position 24 of sample 0 opens its"):
        model_of(kind)(**batch, modality_targets=targets)


def test_boundaries_that_do_not_belong_together_are_refused(single_process):
    model, batch = codes()
    batch["packed_seq_params"].cu_seqlens_q = torch.tensor([0, 8, 30], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q has shape \[3\] but cu_seqlens_q_padded \[5\]"):
        model(**batch)


def test_packed_samples_are_drawn_as_apart(single_process):
    model = model_of(KINDS["discrete, predecessor"]).eval()
    alone = packed.alone()

    def drawn(batch):
        names = ("input_ids", "modality_inputs", "packed_seq_params")
        given = {name: batch[name] for name in names if name in batch}
        return sample_one_by_one(model, modality="images", options=dict(temperature=0), **given)

    assert torch.equal(drawn(packed.packed(alone)), torch.cat([drawn(batch) for batch in alone]))


@pytest.mark.parametrize("made_ahead", [False, True])
def test_a_step_waits_for_no_check_of_its_own(single_process, monkeypatch, made_ahead):
    made, waited = [], []
    first_of, wait = deferred.Arrival.__init__, deferred.Arrival.wait
    monkeypatch.setattr(
        deferred.Arrival, "__init__", lambda self, values: (made.append(self), first_of(self, values))[1]
    )
    monkeypatch.setattr(deferred.Arrival, "here", lambda self: False)
    monkeypatch.setattr(deferred.Arrival, "wait", lambda self: (waited.append(self), wait(self))[1])
    model, batch = codes()
    ids, params = batch["input_ids"], batch["packed_seq_params"]
    placement = model.place(ids, params) if made_ahead else None
    model(**batch, placement=placement)
    first = list(made)
    assert len(first) >= 3 and not waited  # boundaries, padding and labels at least
    model(**batch, placement=placement)
    assert waited and set(map(id, waited)) <= set(map(id, first))
    model.finish_checks()
