"""A step as one CUDA graph when what it was captured with changes: captured anew, refused or told. Captures are
recordings here."""

import copy
import logging
import random
from argparse import Namespace
from dataclasses import dataclass, field, replace

import numpy
import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_mimo.training import StepGraphs, Trainer, TrainingControl
from megatron_mimo.training.parts.captured import Captures
from megatron_mimo.training.parts.graphed import GraphedForward
from megatron_mimo.training.pretraining.step_graphs import step_graphs_from_args
from megatron_mimo.training.sources import DataSource
from tests import tiny
from tests.distributed.cases.graphs import Normed
from tests.recorded_graphs import record_graphs
from tests.unit.test_whole_step import assert_same_steps, batch_of, config_of, pair, predicting, trainer_of

EXPERTS = dict(
    num_moe_experts=4, moe_router_topk=2, moe_token_dispatcher_type="alltoall", add_bias_linear=False,
    moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.05, moe_expert_capacity_factor=1.5,
    moe_pad_expert_input_to_capacity=True,
)  # fmt: skip
#: Two kinds of balancing, with a coefficient each.
SEVERAL = EXPERTS | dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.1, 0.1], moe_z_loss_coeff=None
)


@pytest.fixture
def recorded(single_process, monkeypatch):
    """A run whose random numbers a graph could use, and captures that are recordings."""
    record_graphs(monkeypatch)
    return replace(single_process, graph_safe_rng=True)


class Scaled(tiny.PatchEncoder):
    """Has a buffer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def encoding(encoder: type[nn.Module]):
    """A model whose images go through an encoder."""
    encoders = {"patches": ModuleSpec(module=encoder)}
    spec = tiny.image_spec(decoders={}, output_projections=[], encoders=encoders)
    return config_of(modality_submodules={"images": spec})


def _encoders(trainer: Trainer) -> nn.ModuleDict:
    return trainer.models[0].modality_submodules["images"].encoders


def _another_module(trainer: Trainer) -> None:
    other = copy.deepcopy(_encoders(trainer)["patches"])
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(3)
    _encoders(trainer)["patches"] = other


def _other_parameters(trainer: Trainer) -> None:
    for module in _encoders(trainer).modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(3 * weight.detach(), requires_grad=False))


def _another_buffer(trainer: Trainer) -> None:
    _encoders(trainer)["patches"].scale = torch.tensor(5.0)


@pytest.mark.parametrize("change", [_another_module, _other_parameters, _another_buffer])
def test_tensors_that_took_the_place_of_others_are_computed_with(recorded, change):
    eager, graphed = pair(
        recorded, StepGraphs(warmup=1), config=encoding(Scaled), control=TrainingControl(frozen=["images/encoders"])
    )
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 3)
    before = [list(trainer.models[0].parameters()) for trainer in (eager, graphed)]  # which lie where they lay
    for trainer in (eager, graphed):
        change(trainer)
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 3)
    assert graphed.graphs.counts.replayed == 4 and before


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        (lambda: config_of(tiny.language_spec(tiny.language_config(**EXPERTS))), "moe_aux_loss_coeff", 10.0),
        (lambda: config_of(tiny.language_spec(tiny.language_config(**EXPERTS))), "moe_z_loss_coeff", 1.0),
        (lambda: config_of(tiny.language_spec(tiny.language_config(**SEVERAL))), "moe_aux_loss_coeff", [10.0, 0.1]),
        (predicting, "mtp_loss_scaling_factor", 5.0),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_settings_that_a_layer_looks_up_in_each_pass_are_followed(recorded, config, setting, value):
    eager, graphed = (trainer_of(recorded, graphs, config=config()) for graphs in (None, StepGraphs(warmup=1)))
    graphed.models[0].load_state_dict(eager.models[0].state_dict())
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 3)
    norms = []
    for trainer in (eager, graphed):
        settings = trainer.models[0].language_model.config
        if isinstance(value, list):
            getattr(settings, setting)[:] = value
        else:
            setattr(settings, setting, value)
        norms.append(trainer.train_step(lambda *_: [batch_of(2)]).gradient_norm)
    assert norms[0] == norms[1]
    assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 2)


class Blend(DataSource):
    """Two sources, one a sample."""

    def __init__(self, *names: str) -> None:
        self.source_names, self._step = list(names), 0

    def next_step(self) -> list[dict]:
        batch = batch_of(self._step)
        self._step += 1
        return [batch | {"sources": torch.tensor([[0], [1]]).expand(batch["input_ids"].shape).contiguous()}]

    def state_dict(self) -> dict:
        return {"ranks": []}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_losses_are_told_under_the_names_of_their_own_sources(recorded):
    told = []
    for trainer in pair(recorded, StepGraphs(warmup=1), steps=3):
        first = trainer.train(Blend("stories", "poems"))
        trainer.settings = replace(trainer.settings, steps=6)
        second = trainer.train(Blend("letters", "songs"))
        told.append([step.losses for step in (*first.steps, *second.steps)])
    assert told[0] == told[1] and {"text of letters", "text of songs"} <= told[1][-1].keys()


def test_captures_of_what_has_changed_make_room_for_others(recorded):
    eager, graphed = pair(recorded, StepGraphs(warmup=1, captures=1))
    for turn in range(4):
        for trainer in (eager, graphed):
            trainer.models[0].modality_submodules["images"].requires_grad_(turn % 2 == 0)
        assert_same_steps(eager, graphed, lambda step: [batch_of(step)], 3)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (4, 8, 4)
    assert len(graphed.graphs._brought) == 1


def test_a_bucket_for_items_that_see_one_another_is_refused(recorded):
    with pytest.raises(ValueError, match=r"buckets has 'images', whose encoders.patches.norm \(BatchNorm1d\)"):
        trainer_of(recorded, StepGraphs({"images": 8}), config=encoding(Normed))
    trainer_of(recorded, StepGraphs(), config=encoding(Normed))


class Masked(nn.Module):
    """Attends to the patches that a mask shows: none of them would give no number."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(tiny.PIXELS, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = self.linear(x)
        shown = (rows @ rows.transpose(1, 2)).masked_fill(~mask[:, None].bool(), float("-inf"))
        return shown.softmax(-1) @ rows


def _with_mask(batch: dict) -> None:
    batch["modality_inputs"]["images"]["patches"]["mask"] = torch.ones(2, 4)


def _with_rows(batch: dict) -> None:
    batch["modality_inputs"]["images"]["patches"]["rows_per_item"] = [4, 4]


def _with_rows_as_a_tensor(batch: dict) -> None:
    batch["modality_inputs"]["images"]["patches"]["rows_per_item"] = torch.tensor([4, 4])


@pytest.mark.parametrize(
    ("encoder", "more"),
    [(Masked, _with_mask), (tiny.PatchEncoder, _with_rows), (tiny.PatchEncoder, _with_rows_as_a_tensor)],
)
def test_what_fills_a_bucket_is_an_item_like_the_others(recorded, encoder, more):
    eager, graphed = pair(recorded, StepGraphs({"images": 8}, warmup=1), config=encoding(encoder))

    def data(step: int) -> list[dict]:
        batch = batch_of(step)
        more(batch)
        return [batch]

    for step in range(3):
        expected, found = (trainer.train_step(lambda *_: data(step)) for trainer in (eager, graphed))
        assert found.losses["text"] == pytest.approx(expected.losses["text"], rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    assert graphed.graphs.counts.replayed == 2


@pytest.mark.parametrize(("name", "draw"), [("random", random.random), ("numpy", numpy.random.random)])
def test_a_capture_in_which_the_host_draws_says_so(recorded, caplog, name, draw):
    class Dropping(tiny.PatchEncoder):
        def forward(self, x: Tensor) -> Tensor:
            rows = super().forward(x)
            return rows if draw() < 2 else 0 * rows

    trainer = trainer_of(recorded, StepGraphs(warmup=1), config=encoding(Dropping))
    quiet = trainer_of(recorded, StepGraphs(warmup=1))
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            quiet.train_step(lambda *_: [batch_of(step)])
        assert not caplog.messages
        for step in range(2):
            trainer.train_step(lambda *_: [batch_of(step)])
    assert [f"drawn on the host ({name})" in message for message in caplog.messages] == [True]


def test_a_capture_in_which_the_host_draws_torchs_numbers_says_so(single_process, monkeypatch, caplog):
    record_graphs(monkeypatch)
    captures = Captures(1, 0, torch.device("meta"))  # a device whose numbers are not the host's
    with caplog.at_level(logging.WARNING):
        captures("step", (), lambda _: torch.rand(()), graph=True)
    (message,) = caplog.messages
    assert "drawn on the host (torch)" in message


@dataclass
class Grid:
    """Inputs of an encoder, of which it looks at one on the host."""

    x: Tensor
    scale: Tensor = field(metadata={"on_host": True})


class Stretched(tiny.PatchEncoder):
    def forward(self, grid: Grid) -> Tensor:
        return super().forward(grid.x) * float(grid.scale)


def test_what_an_input_of_ones_own_says_on_the_host_is_part_of_the_shape(recorded):
    eager, graphed = pair(recorded, StepGraphs(warmup=1), config=encoding(Stretched))

    def data(step: int) -> list[dict]:
        batch = batch_of(step)
        (images,) = batch["modality_inputs"]["images"].values()
        batch["modality_inputs"]["images"]["patches"] = {"grid": Grid(images["x"], torch.tensor(1.0 + step))}
        return [batch]

    assert_same_steps(eager, graphed, data, 4)
    assert graphed.graphs.counts.replayed == 0


def test_an_encoder_that_is_replayed_follows_a_buffer_that_took_the_place_of_another(single_process, monkeypatch):
    record_graphs(monkeypatch)
    encoder = Scaled()
    replayed, x = GraphedForward(encoder), torch.randn(2, 4, tiny.PIXELS)
    for scale in (1.0, 1.0, 5.0, 5.0):
        if scale != float(encoder.scale):
            encoder.scale = torch.tensor(scale)
        with torch.no_grad():
            assert torch.equal(replayed(x), encoder(x)), scale


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(cuda_graph_warmup_steps=0), "--cuda-graph-warmup-steps must be at least 1, got 0"),
        (dict(cuda_graph_label_rows=0), "--cuda-graph-label-rows must be at least 1, got 0"),
        (dict(cuda_graph_packed_sequences=-4), "--cuda-graph-packed-sequences must be at least 1, got -4"),
        (dict(cuda_graph_buckets=[("images", 0)]), r"--cuda-graph-buckets \['images'\] must be at least 1, got 0"),
    ],
)
def test_a_number_that_no_step_can_have_is_refused_by_its_argument(given, match):
    asked = dict(cuda_graph_buckets=[], cuda_graph_label_rows=None, cuda_graph_packed_sequences=None)
    args = Namespace(**(asked | dict(cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=3) | given))
    with pytest.raises(ValueError, match=match):
        step_graphs_from_args(args)
