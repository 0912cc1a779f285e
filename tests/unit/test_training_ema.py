"""The average of weights: in training, in checkpoints, in generation and exports."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from safetensors.torch import load_file

from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.training import TrainerSettings, TrainingControl
from megatron_mimo.training.checkpoints.safetensors import export_weights
from tests import tiny
from tests.unit.test_training_trainer import one_batch, sgd, trainer

HALF = dict(bf16=True, params_dtype=torch.bfloat16)


def half():
    return tiny.mimo_config(tiny.language_spec(tiny.language_config(**HALF)))


def weights(ours) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in ours.models[0].named_parameters() if p.requires_grad}


def expected_of(seen: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The average of weights after each step, of which the first are those before any."""
    average = {name: value.double() for name, value in seen[0].items()}
    for number, after in enumerate(seen[1:]):
        kept = min(decay, (1 + number) / (10 + number))
        average = {name: kept * average[name] + (1 - kept) * after[name].double() for name in average}
    return average


@pytest.mark.parametrize("config", [tiny.mimo_config, half], ids=["float32", "bf16"])
def test_averages_are_those_of_the_weights_after_each_step_and_begin_as_they_were_before(config, single_process):
    control = TrainingControl(frozen=["images/encoders"])
    ours = trainer(single_process, config(), steps=9, ema_decay=0.3, control=control)
    ours.models[0].load_state_dict(ours.models[0].state_dict())  # what is loaded before the first step counts
    seen = [weights(ours)]
    for _ in range(5):
        ours.train_step(one_batch)
        seen.append(weights(ours))
    (averages,) = ours.ema.averages
    expected = expected_of(seen, 0.3)
    assert averages.keys() == expected.keys() and not any("encoders" in name and "images" in name for name in averages)
    for name, average in averages.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average, seen[-1][name].float()) for name, average in averages.items())


def test_a_step_that_is_skipped_changes_no_average(single_process):
    ours = trainer(single_process, ema_decay=0.9)
    ours.train_step(one_batch)
    before = {name: value.clone() for name, value in ours.ema.averages[0].items()}
    nothing = [tiny.batch(0) | {"loss_mask": torch.zeros(tiny.batch(0)["labels"].shape), "modality_targets": {}}]
    nothing[0]["input_ids"] = torch.ones_like(nothing[0]["input_ids"])
    nothing[0].pop("modality_inputs"), nothing[0].pop("modality_targets")
    assert ours.train_step(lambda *_: nothing).skipped
    assert all(torch.equal(before[name], value) for name, value in ours.ema.averages[0].items())


@pytest.mark.parametrize("config", [tiny.mimo_config, half], ids=["float32", "bf16"])
def test_a_resumed_run_s_averages_are_those_of_an_unbroken_one_bit_by_bit(config, single_process, tmp_path):
    options = dict(optimizer=OptimizerConfig(lr=1e-2), ema_decay=0.9, directory=tmp_path)
    with writers_report_here():
        unbroken = trainer(single_process, config(), save_every=2, **options)
        unbroken.train(one_batch)
        resumed = trainer(single_process, config(), **options)
        assert resumed.load(tmp_path / "step_00000002") == 2
        resumed.train(one_batch)
    assert resumed.ema.updates == unbroken.ema.updates == 4
    for name, average in unbroken.ema.averages[0].items():
        assert torch.equal(resumed.ema.averages[0][name], average), name


def test_checkpoints_with_and_without_averages_load_into_runs_without_and_with_them(single_process, tmp_path):
    with writers_report_here():
        averaging = trainer(single_process, steps=2, ema_decay=0.9, directory=tmp_path / "with")
        averaging.train(one_batch)
        trainer(single_process, steps=2, directory=tmp_path / "without").train(one_batch)
    assert trainer(single_process, steps=2).load(tmp_path / "with" / "step_00000002") == 2
    begins = trainer(single_process, steps=2, ema_decay=0.9)
    begins.train_step(one_batch)
    begins.load(tmp_path / "without" / "step_00000002")
    assert begins.ema.updates == 0
    for name, weight in weights(begins).items():
        assert torch.equal(begins.ema.averages[0][name], weight), "they begin anew from what was loaded"
    with pytest.raises(ValueError, match="no averages of weights; its run had no ema_decay"):
        begins.load_parts(tmp_path / "without" / "step_00000002", ema=True)
    with pytest.raises(ValueError, match="no averages of weights; its run had no ema_decay"):
        export_weights(tmp_path / "without" / "step_00000002", tmp_path / "x.safetensors", ema=True)


@pytest.mark.parametrize("config", [tiny.mimo_config, half], ids=["float32", "bf16"])
def test_exports_and_parts_are_of_the_averages_on_request(config, single_process, tmp_path):
    ours = trainer(single_process, config(), steps=3, ema_decay=0.9, directory=tmp_path,
                   control=TrainingControl(frozen=["images/encoders"]))  # fmt: skip
    with writers_report_here():
        ours.train(one_batch)
    path = tmp_path / "step_00000003"
    names = export_weights(path, tmp_path / "weights.safetensors")
    assert export_weights(path, tmp_path / "ema.safetensors", ema=True) == names
    assert not [name for name in names if name.startswith("ema.")]
    plain, averaged = (load_file(tmp_path / f"{name}.safetensors") for name in ("weights", "ema"))
    table = "language_model.embedding.word_embeddings.weight"
    assert torch.equal(averaged[table], ours.ema.averages[0][table])
    assert torch.equal(plain[table], weights(ours)[table])
    frozen = "modality_submodules.images.encoders.patches.linear.weight"
    assert torch.equal(averaged[frozen], plain[frozen])

    other = trainer(single_process, config())
    other.load_parts(path, ema=True)
    loaded = dict(other.models[0].named_parameters())
    for name, average in ours.ema.averages[0].items():
        assert torch.equal(loaded[name], average.to(loaded[name].dtype)), name
    assert torch.equal(loaded[frozen], ours.models[0].get_parameter(frozen))


@pytest.mark.parametrize("config", [tiny.mimo_config, half], ids=["float32", "bf16"])
def test_generation_with_the_averages_leaves_the_weights_as_they_are(config, single_process):
    ours = trainer(single_process, config(), ema_decay=0.5, optimizer=sgd(lr=1.0))
    ours.train_step(one_batch)
    before, seen = weights(ours), {}
    ours.models[0].generate = lambda *given, **named: seen.update(weights(ours)) or []
    ours.generate([[1, 2, 3]], 2, ema=True)
    for name, average in ours.ema.averages[0].items():
        assert torch.equal(seen[name], average.to(seen[name].dtype))
    ours.generate([[1, 2, 3]], 2)
    for name, weight in before.items():
        assert torch.equal(seen[name], weight) and torch.equal(weights(ours)[name], weight)
    assert not ours.train_step(one_batch).skipped, "the optimizer's copies follow no average"


def test_averages_that_there_are_not_and_decays_that_average_nothing_are_refused(single_process):
    with pytest.raises(ValueError, match="averages no weights, expected TrainerSettings"):
        trainer(single_process).generate([[1]], 1, ema=True)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), such as 0.999, got"):
            TrainerSettings(steps=1, ema_decay=decay)
    with pytest.raises(TypeError, match="ema_decay must be a number, got '0.9'"):
        TrainerSettings(steps=1, ema_decay="0.9")  # type: ignore[arg-type]
