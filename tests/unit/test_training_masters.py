"""The optimizer's float32 copies of half-precision weights follow the weights."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from torch import nn

from megatron_mimo.training import Trainer, TrainerSettings
from tests import tiny

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def trainer(run, half="bf16", distributed=False, **settings) -> Trainer:
    torch.manual_seed(3)
    precision = {half: True, "params_dtype": HALVES[half]} if half else {}
    return Trainer(
        tiny.mimo_config(tiny.language_spec(tiny.language_config(**precision))),
        run,
        TrainerSettings(**{**dict(steps=4, decay="constant", progress=False), **settings}),
        optimizer=OptimizerConfig(
            lr=1e-6, weight_decay=0.0, use_distributed_optimizer=distributed, initial_loss_scale=1.0
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=distributed),
    )  # fmt: skip


def one_batch(step, rank, size):
    return [tiny.batch(0)]


def doubled(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value * 2 if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }


def parts(ours: Trainer) -> dict[str, nn.Module]:
    model = ours.models[0]
    return {
        "wrapped": ours.chunks[0],
        "model": model,
        "language model": model.language_model,
        "one layer": model.language_model.decoder.layers[1].mlp,
        "an encoder": model.modality_submodules["images"].encoders["patches"],
    }


@pytest.mark.parametrize("depth", ["wrapped", "model", "language model", "one layer", "an encoder"])
@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed"])
@pytest.mark.parametrize("half", ["bf16", "fp16", None])
def test_loaded_weights_are_what_the_next_step_moves(half, distributed, depth, single_process):
    ours = trainer(single_process, half, distributed)
    ours.train_step(one_batch)
    part = parts(ours)[depth]
    part.load_state_dict(doubled(part))
    expected = {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}
    ours.train_step(one_batch)
    for name, parameter in ours.models[0].named_parameters():
        # Adam at lr 1e-6 moves a copy by at most 1e-6, and so a half-precision weight by its last bit.
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("change", ["copy_", "data.copy_", "a buffer under it"])
@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed"])
def test_a_weight_that_other_code_changed_is_refused_by_name_until_it_is_synced(change, distributed, single_process):
    ours = trainer(single_process, distributed=distributed)
    ours.train_step(one_batch)
    weight = ours.models[0].modality_submodules["images"].encoders["patches"].linear.weight
    with torch.no_grad():
        if change == "copy_":
            weight.copy_(weight * 2)
        elif change == "data.copy_":
            weight.data.copy_(weight.data * 2)
        else:  # what shares the storage and counts no version of the parameter
            torch.empty(0, dtype=weight.dtype).set_(
                weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride()
            ).mul_(2)
    changed = weight.detach().clone()
    with pytest.raises(ValueError, match=r"images\.encoders\.patches\.linear\.weight changed .*trainer\.sync_weights"):
        ours.train_step(one_batch)
    ours.sync_weights()
    ours.train_step(one_batch)
    torch.testing.assert_close(weight.detach(), changed, rtol=1e-2, atol=1e-4)


def test_several_changed_weights_are_counted(single_process):
    ours = trainer(single_process)
    with torch.no_grad():
        for parameter in ours.models[0].modality_submodules["audio"].parameters():
            parameter.add_(1)
    with pytest.raises(ValueError, match=r"modality_submodules\.audio\.\S+ and 3 more tensors changed"):
        ours.train_step(one_batch)


def test_a_parameter_that_took_the_place_of_the_trained_one_is_refused(single_process):
    ours = trainer(single_process, half=None)
    part = ours.models[0].language_model.decoder
    part.load_state_dict(doubled(part), assign=True)
    with pytest.raises(ValueError, match=r"language_model\.decoder\.\S+ is another parameter than .* the optimizer"):
        ours.train_step(one_batch)


def test_copies_of_weights_that_were_not_loaded_keep_all_their_bits(single_process):
    ours = trainer(single_process)
    ours.train_step(one_batch)
    optimizer = ours.optimizer.chained_optimizers[0]
    before = [master.detach().clone() for group in optimizer.fp32_from_float16_groups for master in group]
    assert any((master != master.bfloat16().float()).any() for master in before)  # there are bits to lose
    images = ours.models[0].modality_submodules["images"]
    images.load_state_dict(images.state_dict())
    ours.sync_weights()
    after = [master for group in optimizer.fp32_from_float16_groups for master in group]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before))


def test_a_checkpoint_saved_after_load_state_dict_holds_what_was_loaded(single_process, tmp_path):
    ours = trainer(single_process, directory=tmp_path)
    ours.train_step(one_batch)
    part = ours.models[0].language_model
    part.load_state_dict(doubled(part))
    expected = part.output_layer.weight.detach().clone()
    path = ours.save()
    other = trainer(single_process, directory=tmp_path)
    other.load(path)
    other.train_step(one_batch)
    torch.testing.assert_close(
        other.models[0].language_model.output_layer.weight.detach(), expected, rtol=1e-2, atol=1e-4
    )


def test_parts_that_were_loaded_are_stepped_and_copies_of_the_others_keep_all_their_bits(single_process, tmp_path):
    first = trainer(single_process, directory=tmp_path)
    first.models[0].language_model.load_state_dict(doubled(first.models[0].language_model))
    path = first.save()
    ours = trainer(single_process)
    for _ in range(2):
        ours.train_step(one_batch)
    optimizer = ours.optimizer.chained_optimizers[0]
    groups = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups)
    pairs = [pair for group in groups for pair in zip(*group)]
    language = {id(p) for p in ours.models[0].language_model.parameters()}
    others = [(weight, master, master.detach().clone()) for weight, master in pairs if id(weight) not in language]
    assert any((before != before.bfloat16().float()).any() for _, _, before in others)  # there are bits to lose
    ours.load_parts(path, ["language_model"])
    assert all(torch.equal(master, before) for _, master, before in others)
    expected = first.models[0].language_model.output_layer.weight.detach()
    ours.train_step(one_batch)
    # Adam at lr 1e-6 moves a copy by at most 1e-6, and so a half-precision weight by its last bit.
    found = ours.models[0].language_model.output_layer.weight.detach()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
