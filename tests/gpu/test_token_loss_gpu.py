"""The language loss where labels count, on a GPU: no host sync, equal numbers, wrong counts found."""

import pytest
import torch

import megatron_mimo
from megatron_mimo import MimoModel, total_loss
from megatron_mimo.draws import restart_draws
from megatron_mimo.output import loss_terms
from megatron_mimo.token_loss import ROUND
from tests import tiny
from tests.gpu.test_packed_gpu import on_gpu

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def run():
    """Megatron-Core with one rank on the GPU."""
    yield megatron_mimo.initialize(seed=1)
    megatron_mimo.shutdown()


def models(**here_alone) -> tuple[MimoModel, MimoModel]:
    """The loss where labels count, with further settings, and the loss everywhere, of equal weights."""
    here, everywhere = (
        MimoModel(
            tiny.mimo_config(
                tiny.language_spec(tiny.language_config(masked_softmax_fusion=False, **settings)),
                loss_where_counted=counted,
            )
        ).cuda()
        for counted, settings in ((True, here_alone), (False, {}))
    )
    everywhere.load_state_dict(here.state_dict())
    return here, everywhere


def batch_of(model: MimoModel, mask: torch.Tensor, told: torch.Tensor) -> dict:
    """A batch on the GPU with a mask, whose placement was told of a mask on the CPU."""
    batch = {**tiny.batch(), "loss_mask": mask}
    placement = model.place(batch["input_ids"]).counting(told).to("cuda")
    return {**on_gpu(batch), "placement": placement}


def step(model: MimoModel, batch: dict) -> torch.Tensor:
    restart_draws(0, 0, 0)
    outputs, mask = model(**batch)
    total_loss(loss_terms(outputs, mask)).backward()
    return outputs.language


#: Megatron's kernels of the cross entropy; TransformerEngine's copies nothing from the host where a graph is asked for.
KERNELS = {
    "plain": {},
    "te": {
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
        "cuda_graph_impl": "full_iteration",
    },
}


@pytest.mark.parametrize(
    ("share", "kernel"), [(0.0, "plain"), (0.4, "plain"), (1.0, "plain"), (0.0, "te"), (0.4, "te")]
)
def test_loss_and_gradients_are_those_of_the_loss_everywhere_without_waiting(run, share, kernel) -> None:
    if kernel == "te":
        pytest.importorskip("transformer_engine")
    here, everywhere = models(**KERNELS[kernel])
    mask = (torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < share).float()
    rows: list[int] = []
    here.language_model.output_layer.register_forward_hook(lambda layer, given, out: rows.append(out[0].shape[0]))
    batch = batch_of(here, mask, mask)
    step(here, batch)  # the first step compiles and loads kernels
    here.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(here, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = step(everywhere, batch)
    here.finish_checks()
    assert rows == [ROUND, ROUND]
    torch.testing.assert_close(found, expected * (batch["loss_mask"] != 0), rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(here.named_parameters(), everywhere.parameters(), strict=True):
        if theirs.grad is not None:
            difference = (mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1e-3)
            assert difference < 1e-5, name


def test_without_a_placement_that_knows_the_loss_runs_everywhere_and_is_zero_where_nothing_counts(run) -> None:
    here, everywhere = models()
    batch = on_gpu(tiny.batch())
    restart_draws(0, 0, 0)
    found = here(**batch)[0].language
    restart_draws(0, 0, 0)
    expected = everywhere(**batch)[0].language
    assert torch.equal(found, expected * (batch["loss_mask"] != 0))


def test_a_placement_that_counts_other_labels_is_refused(run) -> None:
    here, _ = models()
    mask = tiny.batch()["loss_mask"]
    batch = batch_of(here, mask, 1 - mask)
    with pytest.raises(ValueError, match="loss_mask counts"):
        step(here, batch)  # tells it here where the counts arrive early enough,
        here.finish_checks()  # or where the next step would begin
