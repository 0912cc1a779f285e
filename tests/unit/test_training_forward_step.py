"""The forward step and its loss: microbatches add up to the whole batch, wrong counts are found, evaluation means."""

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_mimo.decoders import FlowDecoder
from megatron_mimo.losses import LossTerm
from megatron_mimo.output import MimoOutput, ModalityOutput
from megatron_mimo.training import StepScale, Trainer, TrainerSettings, loss_func
from tests import tiny


def trainer(run, config=None, **settings) -> Trainer:
    settings = TrainerSettings(**{**dict(steps=8, decay="constant", progress=False), **settings})
    return Trainer(config or tiny.mimo_config(), run, settings, optimizer=OptimizerConfig(lr=1e-2))


def four_samples() -> list[dict]:
    """One that reads and writes, one that writes, two of text; their losses count differently."""
    draw = torch.Generator().manual_seed(4)
    samples = []
    for read, write, kept in ((2, 3, 0.9), (0, 2, 0.5), (0, 0, 0.2), (0, 0, 0.7)):
        ids = torch.randint(0, 60, (1, 16), generator=draw)
        ids[0, 1 : 1 + read] = tiny.READ
        ids[0, 9 : 9 + write] = tiny.WRITE
        sample = dict(
            input_ids=ids,
            labels=ids.roll(-1, 1).clamp(0, 63),
            loss_mask=(torch.rand(1, 16, generator=draw) < kept).float(),
        )
        if read:
            sample["modality_inputs"] = {
                "images": {"patches": {"x": torch.randn(1, read, tiny.PIXELS, generator=draw)}}
            }
        if write:
            sample["modality_targets"] = {
                "images": {"pixels": {"pixels": torch.randn(write, tiny.PIXELS, generator=draw)}}
            }
        samples.append(sample)
    return samples


def merged(samples: list[dict]) -> dict:
    """Samples as one batch; their rows come one sample after the other."""
    batch = {name: torch.cat([sample[name] for sample in samples]) for name in ("input_ids", "labels", "loss_mask")}
    for key, encoder, keyword in (("modality_inputs", "patches", "x"), ("modality_targets", "pixels", "pixels")):
        parts = [sample[key]["images"][encoder][keyword] for sample in samples if key in sample]
        if parts:
            batch[key] = {"images": {encoder: {keyword: torch.cat(parts)}}}
    return batch


def gradients(ours: Trainer) -> dict[str, Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in ours.models[0].named_parameters()}


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("cuts", [[4], [2, 2], [1, 3], [3, 1]], ids=str)
def test_microbatches_give_the_gradient_and_losses_of_the_whole_batch_however_uneven(per_token, cuts, single_process):
    config = tiny.mimo_config(tiny.language_spec(tiny.language_config(calculate_per_token_loss=per_token)))
    one_by_one, ours = trainer(single_process, config), trainer(single_process, config)
    ours.models[0].load_state_dict(one_by_one.models[0].state_dict())
    samples, starts = four_samples(), [sum(cuts[:i]) for i in range(len(cuts))]
    batches = [merged(samples[start : start + cut]) for start, cut in zip(starts, cuts)]
    expected = one_by_one.train_step(lambda *_: samples)
    found = ours.train_step(lambda *_: batches)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    for name, gradient in gradients(one_by_one).items():
        # Of float32 sums in another order.
        torch.testing.assert_close(gradients(ours)[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_the_reported_loss_is_the_weighted_sum_of_the_terms(single_process):
    losses = trainer(single_process).train_step(lambda *_: four_samples()).losses
    assert set(losses) == {"text", "images/pixels", "loss"}
    assert losses["loss"] == pytest.approx(losses["text"] + 0.5 * losses["images/pixels"], rel=1e-6)


def test_evaluation_is_the_mean_over_its_steps_and_changes_nothing(single_process):
    ours = trainer(single_process, evaluation_steps=2)
    before = {name: tensor.clone() for name, tensor in ours.models[0].state_dict().items() if tensor is not None}
    found = ours.evaluate(lambda step, rank, size: four_samples()[2 * step : 2 * step + 2])
    assert found == ours.evaluate(lambda step, rank, size: four_samples()[2 * step : 2 * step + 2])
    assert ours.models[0].training
    assert all(tensor.equal(before[name]) for name, tensor in ours.models[0].state_dict().items() if name in before)
    report = ours.train_step(lambda *_: four_samples())  # the same four samples, before they change a weight
    assert found == pytest.approx(report.losses, rel=1e-5)


def with_flow(run) -> Trainer:
    spec = ModuleSpec(
        module=FlowDecoder, params=dict(width=tiny.HIDDEN, target_width=tiny.PIXELS, hidden_width=16, depth=1)
    )
    images = tiny.image_spec(decoders={"pixels": spec}, output_projections=[])
    return trainer(run, tiny.mimo_config(modality_submodules={"images": images, "audio": tiny.audio_spec()}))


def drawing(step: int, rank: int, size: int) -> list[dict]:
    batch = tiny.batch(0)
    batch["modality_targets"] = {
        "images": {"pixels": {"target": batch["modality_targets"]["images"]["pixels"]["pixels"]}}
    }
    return [batch]


def test_evaluations_draw_the_same_and_training_goes_on_as_without_them(single_process):
    plain, ours = with_flow(single_process), with_flow(single_process)
    ours.models[0].load_state_dict(plain.models[0].state_dict())
    first = ours.evaluate(drawing)
    assert first == ours.evaluate(drawing)
    losses = []
    for _ in range(3):
        losses.append(ours.train_step(drawing).losses)
        ours.evaluate(drawing)
    assert losses == [plain.train_step(drawing).losses for _ in range(3)]


def test_each_microbatch_of_a_step_draws_its_own_noise(single_process):
    ours, seen = with_flow(single_process), []
    decoder = ours.models[0].modality_submodules["images"].decoders["pixels"]
    whole = decoder.loss
    decoder.loss = lambda rows, targets: (
        seen.append({k: v.clone() for k, v in targets.items()}),
        whole(rows, targets),
    )[1]
    for _ in range(2):
        ours.train_step(lambda *_: drawing(0, 0, 1) * 2)
    drawn = [[name for name in seen[0] if not seen[0][name].equal(other[name])] for other in seen[1:]]
    assert len(drawn) == 3 and all(drawn), "two microbatches of two steps drew alike"


class Miscounting(tiny.LinearDecoder):
    """Tells another count ahead than its loss has."""

    def loss_shape(self, targets):
        return (targets["pixels"].shape[0],)


@pytest.mark.parametrize("position", [0, 1])
def test_a_decoder_that_tells_another_count_than_its_loss_has_is_found_in_the_first_step(position, single_process):
    text = dict(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long))
    batches = [text, text]
    batches[position] = tiny.batch(0)
    images = tiny.image_spec(decoders={"pixels": ModuleSpec(module=Miscounting)})
    ours = trainer(single_process, tiny.mimo_config(modality_submodules={"images": images, "audio": tiny.audio_spec()}))
    with pytest.raises(ValueError, match=r"'images/pixels' counted 30 but 5 were told ahead.*loss_shape"):
        ours.train_step(lambda *_: batches)


def test_a_batch_without_labels_is_refused(single_process):
    with pytest.raises(ValueError, match=r"no labels, found \['input_ids'\]"):
        trainer(single_process).train_step(lambda *_: [dict(input_ids=torch.ones(1, 4, dtype=torch.long))])


def test_a_step_without_microbatches_is_refused(single_process):
    with pytest.raises(ValueError, match="at least one for every step"):
        trainer(single_process).train_step(lambda *_: [])


def outputs() -> MimoOutput:
    terms = {"pixels": LossTerm(torch.tensor(6.0, requires_grad=True), torch.tensor(2.0))}
    return MimoOutput(torch.tensor([[1.0, 3.0]]), {"images": ModalityOutput(None, terms)})


def scaled(per_token: bool, **counts: float) -> tuple:
    scale = StepScale({"text": 4.0, "images/pixels": 8.0, **counts}, tokens=5.0, parts=3, per_token=per_token)
    mask = torch.tensor([[1.0, 1.0]])
    return loss_func(
        outputs(), loss_mask=mask, weights={"images": 0.5}, names=["text", "images/pixels", "tones/waves"], scale=scale
    )


@pytest.mark.parametrize(("per_token", "factor", "tokens"), [(True, 5.0, 2), (False, 3.0, 1)])
def test_loss_func_divides_by_the_steps_counts_and_multiplies_by_what_megatron_divides_by(per_token, factor, tokens):
    loss, counted, logged = scaled(per_token, **{"tones/waves": 1.0})
    one = (1 + 3) / 4 + 0.5 * 6 / 8
    assert loss.item() == pytest.approx(one * factor) and counted.item() == tokens and counted.dtype == torch.int32
    assert {name: entry.tolist() for name, entry in logged.items()} == {
        "text loss": [4.0, 2.0], "images/pixels loss": [6.0, 2.0], "tones/waves loss": [0.0, 0.0],
        "loss": [pytest.approx(one), pytest.approx(1 / 3)],
    }  # fmt: skip


def test_terms_that_the_whole_step_lacks_read_zero_over_one_for_megatrons_mean():
    _, _, logged = scaled(True, **{"tones/waves": 0.0})
    assert logged["tones/waves loss"].tolist() == [0.0, 1.0]


def test_loss_func_in_evaluation_reports_sums_and_counts_and_gives_outputs_back_where_asked():
    made = outputs()
    mask = torch.tensor([[1.0, 0.0]])
    _, _, logged = loss_func(made, loss_mask=mask, weights={}, names=["text", "images/pixels"], scale=None)
    assert {name: entry.tolist() for name, entry in logged.items()} == {
        "text loss": [1.0, 1.0],
        "images/pixels loss": [6.0, 2.0],
    }
    assert loss_func(made, loss_mask=mask, weights={}, names=[], scale=None, non_loss_data=True) is made
