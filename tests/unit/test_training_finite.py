"""A step whose losses or gradients are not finite stops the run; one in which nothing is learned moves nothing."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo.training import CheckpointSettings, Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.finite import check_weights
from tests import tiny

PRECISIONS = {
    "fp32": {},
    "bf16": dict(bf16=True, params_dtype=torch.bfloat16),
    "fp16": dict(fp16=True, params_dtype=torch.float16),
}


def trainer(
    run, precision="fp32", *, submodules=None, distributed=False, overlap=False, checkpoints=None, control=None,
    optimizer=None, **settings,
) -> Trainer:  # fmt: skip
    torch.manual_seed(3)
    changes = {} if submodules is None else {"modality_submodules": submodules}
    options = dict(lr=1e-2, weight_decay=0.1, initial_loss_scale=8.0, **(optimizer or {}))
    return Trainer(
        tiny.mimo_config(tiny.language_spec(tiny.language_config(**PRECISIONS[precision])), **changes),
        run,
        TrainerSettings(**{**dict(steps=4, decay="linear", progress=False), **settings}),
        optimizer=OptimizerConfig(use_distributed_optimizer=distributed, **options),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=overlap,
            overlap_param_gather=distributed and overlap,
        ),
        control=control,
        checkpoints=checkpoints,
    )  # fmt: skip


def state_of(ours: Trainer) -> dict[str, torch.Tensor]:
    """Weights, the optimizer's copies and moments, and the schedule's step."""
    found = {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}
    for index, each in enumerate(ours.optimizer.chained_optimizers):
        for group in each.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                found[f"copy {index} {number}"] = parameter.detach().clone()
                for name, value in each.optimizer.state.get(parameter, {}).items():
                    found[f"{name} {index} {number}"] = torch.as_tensor(value).clone()
    return found | {"schedule": torch.tensor(ours.schedule.num_steps)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    changed = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not changed, changed


def good(step, rank, size):
    return [tiny.batch(step), tiny.batch(step + 10)]


def spoiled(value: float, where: str, at: int = 2):
    """Good data, but for one number of the second microbatch of a step."""

    def data(step, rank, size):
        batches = good(step, rank, size)
        if step == at and where == "image":
            batches[1]["modality_inputs"]["images"]["patches"]["x"][0, 0, 0] = value
        elif step == at:
            batches[1]["modality_targets"]["images"]["pixels"]["pixels"][0, 0] = value
        return batches

    return data


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("value", "where", "said"),
    [
        (float("nan"), "image", r"loss 'text' sums to nan in microbatch 1 of 2 and loss 'images/pixels' sums to nan"),
        (float("nan"), "target", r"rank 0: loss 'images/pixels' sums to nan in microbatch 1 of 2\. The"),
        (float("inf"), "target", r"rank 0: loss 'images/pixels' sums to inf in microbatch 1 of 2\. The"),
    ],
    ids=["NaN image", "NaN target", "infinite target"],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_moves(
    value, where, said, precision, single_process, tmp_path
):
    ours = trainer(single_process, precision, save_every=1, directory=tmp_path)
    with pytest.raises(FloatingPointError, match=rf"step 2 is not finite\. rank 0: {said.removeprefix('rank 0: ')}"):
        ours.train(spoiled(value, where))
    assert ours.steps_done == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    kept = trainer(single_process, precision, directory=tmp_path)
    kept.load()
    assert_same(state_of(ours), state_of(kept))
    assert ours.train_step(good).losses["loss"] > 0  # it can go on


class Exploding(torch.autograd.Function):
    """The identity, whose gradient is not finite once it is told so."""

    value = 1.0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * Exploding.value


class ExplodingEncoder(tiny.PatchEncoder):
    def forward(self, x):
        return Exploding.apply(super().forward(x))


EXPLODING = {
    "images": tiny.image_spec(encoders={"patches": ModuleSpec(module=ExplodingEncoder)}),
    "audio": tiny.audio_spec(),
}


@pytest.fixture
def exploding():
    yield Exploding
    Exploding.value = 1.0


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "infinite"])
def test_a_nan_that_first_shows_in_a_gradient_is_named_and_moves_nothing(
    value, distributed, overlap, single_process, exploding
):
    ours = trainer(single_process, submodules=EXPLODING, distributed=distributed, overlap=overlap)
    ours.train_step(good)
    before = state_of(ours)
    exploding.value = value
    said = r"step 1 is not finite\. rank 0: the gradient of \S*images\.encoders\.patches\.linear\.\S+ and of 1 more"
    with pytest.raises(FloatingPointError, match=said):
        ours.train_step(good)
    assert_same(state_of(ours), before)
    exploding.value = 1.0
    assert not ours.train_step(good).skipped


def test_a_gradient_that_overflows_in_fp16_is_skipped_and_lowers_the_loss_scale(single_process, exploding):
    ours = trainer(single_process, "fp16", submodules=EXPLODING, optimizer=dict(hysteresis=1))
    ours.train_step(good)
    before, scale = state_of(ours), ours.optimizer.get_loss_scale().item()
    exploding.value = float("inf")
    report = ours.train_step(good)
    assert report.skipped and report.gradient_norm is None
    assert_same(state_of(ours), before)
    assert ours.optimizer.get_loss_scale().item() < scale
    exploding.value = 1.0
    assert not ours.train_step(good).skipped


def nothing(step, rank, size):
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(step))
    return [dict(input_ids=ids, labels=ids, loss_mask=torch.zeros(2, 16))]


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_in_which_nothing_is_learned_is_skipped_and_moves_nothing(
    precision, distributed, overlap, single_process
):
    ours = trainer(single_process, precision, distributed=distributed, overlap=overlap)
    ours.train_step(good)  # moments that would go on moving
    before = state_of(ours)
    report = ours.train_step(nothing)
    assert report.skipped and report.gradient_norm is None and report.step == 1
    assert set(report.losses) <= {"loss"} and not any(report.losses.values())
    assert_same(state_of(ours), before)
    assert not ours.train_step(good).skipped


def test_a_step_whose_gradients_are_all_zero_moves_nothing(single_process):
    ours = trainer(single_process, control=TrainingControl(frozen=["language_model", "audio", "images/decoders"]))
    ours.train_step(good)
    before = state_of(ours)
    ids = torch.randint(0, 60, (2, 16))
    report = ours.train_step(lambda *_: [dict(input_ids=ids, labels=ids)])  # text, of which nothing trains
    assert report.skipped and report.losses["text"] > 0
    assert_same(state_of(ours), before)


def test_the_last_good_checkpoint_is_finished_in_the_background_before_the_run_stops(single_process, tmp_path):
    background = CheckpointSettings(background=True, keep_last=1)
    ours = trainer(single_process, save_every=1, directory=tmp_path, checkpoints=background)
    with pytest.raises(FloatingPointError, match=r"the newest checkpoint is \S*step_00000002\."):
        ours.train(spoiled(float("nan"), "image"))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert trainer(single_process, directory=tmp_path).load() == 2


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(single_process, tmp_path):
    ours = trainer(single_process, directory=tmp_path, checkpoints=CheckpointSettings(keep_last=1))
    path = ours.save()
    with torch.no_grad():
        ours.models[0].language_model.output_layer.weight[0, 0] = float("nan")
    ours.steps_done = 1
    with pytest.raises(FloatingPointError, match=r"language_model\.output_layer\.weight is not finite: no checkpoint"):
        ours.save()
    assert list(tmp_path.iterdir()) == [path]


def test_frozen_weights_may_hold_infinities_as_masks_do():
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.bias[0] = float("-inf")
    with pytest.raises(FloatingPointError, match="bias is not finite"):
        check_weights([module])
    module.bias.requires_grad_(False)
    check_weights([module])


def test_the_best_checkpoint_is_none_whose_evaluation_was_nan(single_process, tmp_path):
    best = CheckpointSettings(keep_last=1, keep_best="loss")
    ours = trainer(single_process, directory=tmp_path, checkpoints=best)
    for step, loss in enumerate((float("nan"), 2.0, float("nan"), 3.0)):
        ours.steps_done = step
        ours.save(losses={"loss": loss})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
