"""fp8 of the language model on a GPU: every recipe trains, encoders stay in bf16, weights are the last step's."""

import functools

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.training import StepGraphs, Trainer, TrainerSettings
from tests import tiny
from tests.unit.test_marks import Encoder

pytestmark = pytest.mark.gpu

RECIPES = ["delayed", "tensorwise", "blockwise"]
WIDTH, LENGTH = 256, 128


@pytest.fixture(scope="module", autouse=True)
def run():
    pytest.importorskip("transformer_engine")
    megatron_mimo.shutdown()
    yield megatron_mimo.initialize(seed=1, graph_safe_rng=True)
    megatron_mimo.shutdown()


class Halves(Encoder):
    """In bf16, whose inputs it takes in float32 too."""

    def __init__(self) -> None:
        super().__init__()
        self.width: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x.to(self.layers[1].weight.dtype))
        self.width.append(found.dtype)
        return found


def trainer_of(run, graphs: StepGraphs | None = None, length: int = LENGTH, **fp8) -> Trainer:
    config = tiny.language_config(
        hidden_size=WIDTH, ffn_hidden_size=2 * WIDTH, num_attention_heads=2, bf16=True, params_dtype=torch.bfloat16,
        masked_softmax_fusion=False, **fp8,
    )  # fmt: skip
    layers = functools.partial(specs.language_layer_spec, backend="transformer_engine")
    language = tiny.language_spec(config, transformer_layer_spec=layers, max_sequence_length=length)
    images = tiny.image_spec(
        encoders={"patches": ModuleSpec(module=Halves)}, decoders={}, output_projections=[],
        input_projections=[tiny.linear(16, WIDTH)],
    )  # fmt: skip
    mimo = tiny.mimo_config(
        language, modality_submodules={"images": images}, special_token_ids={"images": tiny.READ},
        generation_token_ids={}, modality_loss_weights={},
    )  # fmt: skip
    torch.manual_seed(1)
    settings = TrainerSettings(steps=20, decay="constant", progress=False)
    trainer = Trainer(mimo, run, settings, optimizer=OptimizerConfig(lr=3e-4), graphs=graphs)
    draw = torch.Generator().manual_seed(2)
    state = trainer.models[0].state_dict()
    with torch.no_grad():  # alike for every recipe
        for name in sorted(state):
            value = state[name]
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
                value.copy_(0.1 * torch.randn(value.shape, generator=draw))
    trainer.optimizer.reload_model_params()
    return trainer


def batch_of(seed: int, length: int = LENGTH) -> dict:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (2, length), generator=draw)
    ids[:, 2:6] = tiny.READ
    pixels = torch.randn(2, 4, tiny.PIXELS, generator=draw)
    labels = ids.roll(-1, 1).clamp(0, tiny.VOCABULARY - 1)
    inputs = {"images": {"patches": {"x": pixels}}}
    return dict(input_ids=ids, labels=labels, loss_mask=(ids >= 0).float(), modality_inputs=inputs)


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    data = lambda *_: [batch_of(0), batch_of(1)]  # noqa: E731
    return [trainer.train_step(data).losses["text"] for _ in range(steps)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_beside_encoders_in_bf16_and_near_what_bf16_does(run, recipe):
    plain, trainer = trainer_of(run), trainer_of(run, fp8="hybrid", fp8_recipe=recipe)
    expected, found = losses_of(plain, 8), losses_of(trainer, 8)
    assert found[0] != expected[0]  # it does multiply in fp8
    assert found == pytest.approx(expected, rel=0.05)
    assert found[-1] < found[0] - 0.2
    encoder = trainer.models[0].modality_submodules["images"].encoders["patches"]
    assert set(encoder.width) == {torch.bfloat16}


def test_what_is_evaluated_after_steps_is_what_new_weights_give(run):
    """Kept fp8 weights of the last step's first microbatch would give another loss."""
    trainer, other = (trainer_of(run, fp8="hybrid", fp8_recipe="tensorwise") for _ in range(2))
    losses_of(trainer, 4)
    data = lambda *_: [batch_of(7)]  # noqa: E731
    stale = other.evaluate(data)
    other.models[0].load_state_dict(trainer.models[0].state_dict())
    expected, found = other.evaluate(data), trainer.evaluate(data)
    assert found == expected
    assert stale != expected


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_replayed_steps_are_the_eager_ones_bit_by_bit(run, recipe):
    """Weights are made fp8 in every replay, and what a recipe keeps from step to step goes on."""
    fp8 = dict(fp8="hybrid", fp8_recipe=recipe, length=4096)
    eager, graphed = trainer_of(run, **fp8), trainer_of(run, graphs=StepGraphs(), **fp8)
    for step in range(8):
        data = lambda *_: [batch_of(2 * step, 4096), batch_of(2 * step + 1, 4096)]  # noqa: E731
        expected, found = eager.train_step(data), graphed.train_step(data)
        assert found.losses == expected.losses
        if step == 5:
            evaluated = lambda *_: [batch_of(99, 4096)]  # noqa: E731
            assert graphed.evaluate(evaluated) == eager.evaluate(evaluated)
    counts = graphed.graphs.counts
    assert (counts.captured, counts.replayed, counts.eager) == (1, 6, 2)
    for one, other in zip(graphed.models[0].parameters(), eager.models[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_that_fp8_cannot_multiply_is_refused(run):
    trainer = trainer_of(run, fp8="hybrid", fp8_recipe="tensorwise")
    with pytest.raises(ValueError, match="multiple of 16 .* found 250"):
        trainer.train_step(lambda *_: [batch_of(0, 125)])
