"""The trainer reads a data source, and its checkpoint knows how far."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_mimo import MimoModel
from megatron_mimo.data.messages import conversation_of
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.packs import packed, padded
from megatron_mimo.data.sources import JsonLines
from megatron_mimo.training import DataSource, PackSource
from megatron_mimo.training.sources import batch_of
from tests import data_samples as made
from tests import tiny
from tests.unit.test_training_trainer import one_batch, trainer


def losses(history) -> list[dict]:
    return [dict(report.losses) for report in history.steps]


def config():
    return tiny.mimo_config(modality_submodules={"images": tiny.image_spec()}, special_token_ids={"images": tiny.READ})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_resumes_sees_the_packs_that_it_would_have_seen(single_process, tmp_path, workers):
    path = made.tiny_records(tmp_path)
    unbroken = trainer(single_process, config(), steps=6, save_every=3, directory=tmp_path / "out")
    source = PackSource(made.tiny_data(path, workers=workers), microbatches=2)
    assert isinstance(source, DataSource)
    expected = losses(unbroken.train(source))
    source.data.close()
    resumed = trainer(single_process, config(), steps=6, directory=tmp_path / "out")
    assert resumed.load(tmp_path / "out" / "step_00000003") == 3
    assert losses(resumed.train(PackSource(made.tiny_data(path), microbatches=2))) == expected[3:]
    state = json.loads((tmp_path / "out" / "step_00000006" / "data.json").read_text())
    assert state["size"] == 1 and state["ranks"]["0"]["next"] > 12


def test_a_second_call_of_train_goes_on_in_the_source(single_process, tmp_path):
    path = made.tiny_records(tmp_path)
    source, seen = PackSource(made.tiny_data(path)), []
    give = source.next_step
    source.next_step = lambda: [seen.append(batch["input_ids"]) or batch for batch in give()]
    ours = trainer(single_process, config(), steps=2)
    ours.train(source)
    ours.settings = replace(ours.settings, steps=4)
    ours.train(source)
    expected = [next(data).input_ids for data in [made.tiny_data(path)] for _ in range(4)]
    assert all(torch.equal(found, pack) for found, pack in zip(seen, expected, strict=True))


def test_a_checkpoint_of_a_run_with_a_function_has_no_state_of_data(single_process, tmp_path):
    ours = trainer(single_process, steps=1, directory=tmp_path)
    ours.train(one_batch)
    assert not (tmp_path / "step_00000001" / "data.json").exists()


def test_a_step_has_at_least_one_microbatch(tmp_path):
    with pytest.raises(ValueError, match="microbatches should be at least 1"):
        PackSource(made.tiny_data(made.tiny_records(tmp_path)), microbatches=0)


def test_a_pack_gives_the_loss_of_its_samples_as_rows_of_a_batch(single_process, tmp_path):
    made.tiny_records(tmp_path, 6)
    process = made.tiny_processor()
    source = JsonLines(tmp_path / "train.jsonl")
    samples = [process(conversation_of(source.record(index)), tmp_path) for index in range(6)]
    torch.manual_seed(0)
    model = MimoModel(config())
    together = packed(samples, PackShape(length=64, multiple=2))
    rows = padded(samples, 16)
    assert together.loss_mask.sum() == rows.loss_mask.sum() > 0
    assert "images" in together.modality_inputs and "images" in together.modality_targets
    found, expected = (tiny.total(model, batch_of(pack)) for pack in (together, rows))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [packed, padded])
def test_padding_of_packs_and_batches_counts_in_no_balance_of_experts(single_process, tmp_path, kind):
    made.tiny_records(tmp_path, 1)
    source = JsonLines(tmp_path / "train.jsonl")
    sample = made.tiny_processor()(conversation_of(source.record(0)), tmp_path)
    torch.manual_seed(0)
    experts = tiny.language_config(
        num_moe_experts=4,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1.0,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        add_bias_linear=False,
    )
    model = MimoModel(replace(config(), language_model=tiny.language_spec(experts)))
    gradients = []
    for length in (len(sample), len(sample) + 9):
        model.zero_grad()
        pack = kind([sample], PackShape(length=length) if kind is packed else length, pad_id=7)
        batch = batch_of(pack) | {"loss_mask": torch.zeros_like(pack.loss_mask)}
        (tiny.total(model, batch) * 0).backward()
        gradients.append([p.grad.clone() for name, p in model.named_parameters() if "router" in name])
    assert gradients[0] and all(gradient.any() for gradient in gradients[0])
    for alone, with_padding in zip(*gradients, strict=True):
        torch.testing.assert_close(with_padding, alone, rtol=1e-5, atol=1e-7)


def test_media_of_a_modality_that_asks_for_it_see_the_whole_of_themselves(tmp_path):
    path = made.tiny_records(tmp_path)
    pack = next(made.tiny_data(path, whole=True))
    params = batch_of(pack)["packed_seq_params"]
    assert params.spans is not None and any(params.spanned)
    media = (pack.input_ids[0] == tiny.READ) | (pack.input_ids[0] == tiny.WRITE)
    assert torch.equal(params.spans >= 0, media)
    assert next(made.tiny_data(path)).spans is None


def test_media_that_see_the_whole_of_themselves_do_so_in_rows_too(single_process, tmp_path):
    path = made.tiny_records(tmp_path)
    data = made.tiny_data(path, whole=True)
    pack = next(data)
    rows = padded([data.sample_at(position)[1] for position in pack.positions], 32)
    assert rows.spans.shape == (len(pack.positions), 32)
    torch.manual_seed(0)
    model = MimoModel(config())
    with torch.no_grad():
        # Megatron's own draws depend on the tests before, and are so small that nobody would see where attention looks.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    found, expected = (tiny.total(model, batch_of(one)) for one in (rows, pack))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    blind = batch_of(rows)
    del blind["attention_mask"]
    assert abs(tiny.total(model, blind) - expected) > 1e-3 * expected
