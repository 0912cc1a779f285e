"""The language loss runs where a label counts, and is what it was when it ran everywhere."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import megatron_mimo
from megatron_mimo import token_loss
from megatron_mimo.check.tokens import check_counted
from megatron_mimo.deferred import Checks
from megatron_mimo.draws import restart_draws
from megatron_mimo.output import MimoOutput
from megatron_mimo.sharding import sequence_shard
from megatron_mimo.training.reading import placed_batches
from tests import tiny
from tests.unit.test_language import mtp_spec

WIDE = 96  # a vocabulary as wide as nothing else in the model
EMPTY = torch.zeros(3, 16)
MASKS = {
    "some": (torch.arange(48).view(3, 16) % 3 == 0).float(),
    "weights": torch.linspace(-1, 1, 48).view(3, 16).clamp(min=0),
    "one": EMPTY.index_put((torch.tensor(2), torch.tensor(15)), torch.tensor(0.5)),
    "none": EMPTY,
    "all": torch.ones(3, 16),
}
LANGUAGES = {
    "gpt": tiny.language_spec,
    "gpt, tied": lambda: tiny.language_spec(share_embeddings_and_output_weights=True),
    "gpt, tokens ahead": mtp_spec,
    "hybrid": lambda: tiny.hybrid_spec(tiny.language_config()),
    "hybrid, tied": lambda: tiny.hybrid_spec(tiny.language_config(), share_embeddings_and_output_weights=True),
}


def model_of(language: str, **changes) -> megatron_mimo.MimoModel:
    return megatron_mimo.MimoModel(tiny.mimo_config(LANGUAGES[language](), **changes))


def pair(language: str) -> tuple[megatron_mimo.MimoModel, megatron_mimo.MimoModel]:
    """A model whose loss runs where labels count, and its like whose loss runs everywhere."""
    here, everywhere = model_of(language), model_of(language, loss_where_counted=False)
    everywhere.load_state_dict(here.state_dict())
    return here, everywhere


def step(model: megatron_mimo.MimoModel, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Language losses `[B, S]`, and the gradient of their weighted sum."""
    restart_draws(0, 0, 0)
    outputs, mask = model(**{**tiny.batch(), "loss_mask": mask})
    assert isinstance(outputs, MimoOutput)
    (outputs.language * mask).sum().backward()
    return outputs.language.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_loss_and_gradients_are_those_of_the_loss_everywhere(single_process, language, mask) -> None:
    here, everywhere = pair(language)
    (found, gradients), (expected, theirs) = step(here, mask), step(everywhere, mask)
    torch.testing.assert_close(found, expected * (mask != 0), rtol=1e-6, atol=1e-6)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, theirs[name], rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_chunks_that_are_computed_again_give_the_same(single_process, monkeypatch, mask) -> None:
    here, everywhere = pair("gpt")
    called = rows_of_output_layer(here)
    monkeypatch.setattr(token_loss, "CHUNK", 5 * tiny.VOCABULARY)
    (found, gradients), (expected, theirs) = step(here, mask), step(everywhere, mask)
    count = max(1, int(mask.count_nonzero()))
    assert max(called) <= 5 and sum(called) == (count if count <= 5 else 2 * count - 5)  # the last 5 are kept
    torch.testing.assert_close(found, expected * (mask != 0), rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=2e-6)


def rows_of_output_layer(model: megatron_mimo.MimoModel) -> list[int]:
    """How many rows went through the output layer, a number a call; filled as the model runs."""
    rows: list[int] = []
    model.language_model.output_layer.register_forward_hook(
        lambda layer, given, output: rows.append(output[0].shape[0])
    )
    return rows


@pytest.mark.parametrize("language", ["gpt", "hybrid"])
def test_the_output_layer_reads_rows_whose_label_counts_alone(single_process, language) -> None:
    here, everywhere = pair(language)
    mine, theirs = rows_of_output_layer(here), rows_of_output_layer(everywhere)
    step(here, MASKS["some"])
    step(everywhere, MASKS["some"])
    assert [rows for rows in mine if rows] == [16]
    assert theirs == [16] and everywhere.language_model.output_layer.weight.shape[0] == tiny.VOCABULARY
    # [16, 3, V] there, [16, 1, V] here
    here.eval()(tiny.batch()["input_ids"][2:])
    assert mine[-1] == 16  # logits are those of every position


def kept_for_backward(model: megatron_mimo.MimoModel, mask: Tensor) -> int:
    """Elements of float tensors that are as wide as the vocabulary and kept for the backward pass."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] == WIDE:
            kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**{**tiny.batch(), "loss_mask": mask})
    return kept


def test_logits_kept_for_backward_do_not_grow_with_the_labels(single_process, monkeypatch) -> None:
    model = megatron_mimo.MimoModel(tiny.mimo_config(tiny.language_spec(vocab_size=WIDE)))
    assert kept_for_backward(model, MASKS["some"]) >= 16 * WIDE
    monkeypatch.setattr(token_loss, "CHUNK", 5 * WIDE)
    one = kept_for_backward(model, MASKS["some"])
    assert 5 * WIDE <= one == kept_for_backward(model, MASKS["all"]) < 16 * WIDE


def test_labels_that_do_not_count_may_be_anything_and_their_loss_is_zero(single_process) -> None:
    batch = tiny.batch()
    wild = batch["labels"].masked_fill(batch["loss_mask"] == 0, -(2**40))
    here, everywhere = pair("gpt")
    found = here(**{**batch, "labels": wild})[0].language
    assert (found[batch["loss_mask"] == 0] == 0).all() and (found[batch["loss_mask"] != 0] > 0).all()
    del everywhere


def test_without_a_loss_mask_the_labels_that_can_be_learned_count(single_process) -> None:
    here, everywhere = pair("gpt")
    batch = {**tiny.batch(), "loss_mask": None}
    found, mask = here(**batch)
    expected, _ = everywhere(**batch)
    assert mask.count_nonzero() < mask.numel()
    torch.testing.assert_close(found.language, expected.language * mask, rtol=1e-6, atol=1e-6)


def test_a_language_model_without_a_hook_gives_zeros_where_no_label_counts(single_process) -> None:
    losses = token_loss.only_counted(torch.tensor([[1.0, float("nan"), 3.0]]), torch.tensor([[0.5, 0.0, 1.0]]))
    assert losses.tolist() == [[1.0, 0.0, 3.0]]


# What the reader of batches tells the host


def test_the_reader_sends_the_mask_and_tells_the_placement_which_labels_count(single_process) -> None:
    model = model_of("gpt")
    batch = tiny.batch()
    (read,) = placed_batches(iter([{**batch, "loss_mask": None}]), model)
    assert torch.equal(read["loss_mask"], model(**{**batch, "loss_mask": None})[1])
    assert torch.equal(read["placement"].host.counted, read["loss_mask"] != 0)
    moved = read["placement"].to("meta")
    assert moved.host.counted.device.type == "cpu"
    weights = MASKS["weights"]
    (read,) = placed_batches(iter([{**batch, "loss_mask": weights}]), model)
    assert read["loss_mask"] is weights
    assert torch.equal(read["placement"].host.counted, weights > 0)
    (read,) = placed_batches(iter([{"input_ids": batch["input_ids"]}]), model)
    assert read["placement"].host.counted is None and "loss_mask" not in read


def test_rows_are_looked_up_by_shard_and_on_a_device_rounded_up() -> None:
    counts = torch.zeros(2, 8, dtype=torch.bool)
    counts[0, [0, 3, 7]] = counts[1, 6] = True
    shards = [sequence_shard(8, cp_rank=rank, cp_size=2) for rank in (0, 1)]
    mine = token_loss.counted_labels(shards[0].cut(counts), shards[0], 3)
    assert mine.positions.tolist() == [0, 7, 14] and mine.places.tolist() == [0, 3, 6]
    other = token_loss.counted_labels(shards[1].cut(counts), shards[1], 3)
    assert other.positions.tolist()[0] == 3 and other.places.tolist() == [1, 8, 8]
    assert other.positions.tolist()[1:] == [3, 4], "rows that do not count queue for one position"
    gpu = torch.device("cuda")
    assert [token_loss.rows_of_labels(count, 16_384, gpu) for count in (0, 1, 512, 513)] == [512, 512, 512, 1024]
    assert token_loss.rows_of_labels(1, 48, gpu) == token_loss.ROUND


def test_rows_beyond_those_that_count_change_neither_losses_nor_gradients(single_process, monkeypatch) -> None:
    exact, padded = model_of("gpt"), model_of("gpt")
    padded.load_state_dict(exact.state_dict())
    expected = step(exact, MASKS["some"])
    monkeypatch.setattr("megatron_mimo.plan.rows_of_labels", lambda count, *given: count + 7)
    found = step(padded, MASKS["some"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("told", [1, 3])
def test_a_placement_that_counts_fewer_or_more_labels_than_the_mask_is_refused(told) -> None:
    mask = torch.tensor([[0.0, 1.0, 0.5, 0.0]])
    with pytest.raises(ValueError, match=rf"loss_mask counts 2 labels, expected the {told} that the placement counts"):
        check_counted(mask, told, Checks())
    check_counted(mask, 2, Checks())


def test_the_setting_is_kept_when_a_configuration_is_replaced() -> None:
    config = tiny.mimo_config(loss_where_counted=False)
    assert replace(config, modality_loss_weights={}).loss_where_counted is False
