"""Which parts train and how fast: frozen ones keep every bit, factors multiply, single embedding rows move alone."""

from functools import partial

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from megatron_mimo.training.parts.compiled import CompiledForward
from megatron_mimo.training.parts.control import parameter_prefixes
from tests import tiny

RATE, DECAY = 0.05, 0.1


def adam(**changes) -> OptimizerConfig:
    return OptimizerConfig(**{**dict(lr=RATE, weight_decay=DECAY, clip_grad=0.0), **changes})


def sgd(**changes) -> OptimizerConfig:
    return adam(optimizer="sgd", sgd_momentum=0.0, **changes)


def trainer(run, control=None, optimizer=None, *, tied=False, decay="constant", steps=6, **changes) -> Trainer:
    torch.manual_seed(3)
    config = tiny.mimo_config(tiny.language_spec(share_embeddings_and_output_weights=tied), **changes)
    settings = TrainerSettings(steps=steps, decay=decay, progress=False)
    return Trainer(config, run, settings, optimizer=optimizer or adam(), control=control)


def with_weights_of(other: Trainer, ours: Trainer) -> Trainer:
    """`ours`, which starts where `other` does."""
    ours.models[0].load_state_dict(other.models[0].state_dict())
    return ours


def one_batch(step: int, rank: int, size: int) -> list[dict]:
    return [tiny.batch(step)]


def weights(model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(trained: Trainer, steps: int = 3) -> set[str]:
    """Names of the parameters of which any element changed within some steps."""
    before = weights(trained.models[0])
    for _ in range(steps):
        trained.train_step(one_batch)
    return {name for name, after in weights(trained.models[0]).items() if not after.equal(before[name])}


PARTS = {
    "language_model": ("language_model.",),
    "encoders": ("modality_submodules.images.encoders.", "modality_submodules.audio.encoders."),
    "images": ("modality_submodules.images.",),
    "images/decoders": ("modality_submodules.images.decoders.",),
    "audio/encoders/frames": ("modality_submodules.audio.encoders.frames.",),
    "input_projections": (
        "modality_submodules.images.input_projections.",
        "modality_submodules.audio.input_projections.",
    ),
    "output_projections": ("modality_submodules.images.output_projections.",),
}


@pytest.mark.parametrize("part", PARTS)
def test_frozen_parts_keep_every_bit_and_have_no_optimizer_state_while_all_others_move(part, single_process):
    ours = trainer(single_process, TrainingControl(frozen=[part]))
    names = set(weights(ours.models[0]))
    frozen = {name for name in names if name.startswith(PARTS[part])}
    assert frozen
    assert moved(ours) == names - frozen
    optimized = [p for group in ours.optimizer.param_groups for p in group["params"]]
    trained = [p for name, p in ours.models[0].named_parameters() if name not in frozen]
    assert {id(p) for p in optimized} == {id(p) for p in trained}
    state = [state for each in ours.optimizer.chained_optimizers for state in each.optimizer.state]
    assert {id(p) for p in state} == {id(p) for p in trained}


def test_several_parts_freeze_together(single_process):
    ours = trainer(single_process, TrainingControl(frozen=["language_model", "encoders", "images"]))
    assert {name.split(".")[:3][-1] for name in moved(ours)} == {"input_projections"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["encoders"], ["audio/encoders", "images/encoders"]),
        (["encoders"], ["images/encoders/patches", "audio/encoders/frames"]),
        (["images"], ["images", "images/encoders"]),
    ],
)
def test_parts_that_mean_the_same_parameters_are_frozen_alike(one, other):
    config = tiny.mimo_config()
    prefixes = [TrainingControl(frozen=parts).frozen_prefixes(config) for parts in (one, other)]
    assert prefixes[0] == prefixes[1]


ROWS = [3, 17, tiny.WRITE]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [(), ("language_model",)])
def test_only_the_named_embedding_rows_move(tied, frozen, single_process):
    ours = trainer(single_process, TrainingControl(frozen=frozen, embedding_rows=ROWS), tied=tied)
    embedding = ours.models[0].language_model.embedding.word_embeddings.weight
    before = weights(ours.models[0])
    start = embedding.detach().clone()

    def with_all_rows(step, rank, size):
        batch = tiny.batch(step)
        batch["input_ids"][2, : len(ROWS)] = torch.tensor(ROWS)
        batch["input_ids"][2, 2] = 5  # the decoder's token needs targets; its row gets a gradient elsewhere
        return [batch]

    for _ in range(3):
        ours.train_step(with_all_rows)
    changed = (embedding.detach() != start).any(1).nonzero().flatten().tolist()
    assert changed == ROWS
    others = {n for n, after in weights(ours.models[0]).items() if not after.equal(before[n])}
    language = {name for name in others if name.startswith("language_model.")}
    if frozen:
        assert language == {"language_model.embedding.word_embeddings.weight"}
    else:
        assert len(language) > 10


def test_a_factor_on_the_language_models_decay_leaves_rows_that_do_not_train_as_they_are(single_process):
    control = TrainingControl(embedding_rows=ROWS, weight_decay={"language_model": 2.0})
    ours = trainer(single_process, control)
    embedding = ours.models[0].language_model.embedding.word_embeddings.weight
    start = embedding.detach().clone()
    ours.train_step(one_batch)
    changed = (embedding.detach() != start).any(1).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(ROWS)


def test_rows_move_as_they_would_with_the_whole_table(single_process):
    whole = trainer(single_process, optimizer=sgd(weight_decay=0.0))
    rows = trainer(single_process, TrainingControl(embedding_rows=ROWS), sgd(weight_decay=0.0))
    with_weights_of(whole, rows)
    for ours in (whole, rows):
        ours.train_step(one_batch)
    tables = [ours.models[0].language_model.embedding.word_embeddings.weight for ours in (whole, rows)]
    assert tables[0][ROWS].equal(tables[1][ROWS])
    assert not tables[0].equal(tables[1])


def test_a_step_of_sgd_takes_learning_rate_and_weight_decay_times_the_parts_factors(single_process):
    control = TrainingControl(
        learning_rate={"images/encoders": 0.5, "decoders": 10.0, "audio": 0.0},
        weight_decay={"language_model": 3.0, "images/decoders/pixels": 0.0},
    )
    ours = trainer(single_process, control, sgd())
    before = weights(ours.models[0])
    ours.train_step(one_batch)
    gradient = gradients(ours.models[0])
    rates = {
        "modality_submodules.images.encoders.": 0.5,
        "modality_submodules.images.decoders.": 10.0,
        "modality_submodules.audio.": 0.0,
    }
    decays = {"language_model.": 3.0, "modality_submodules.images.decoders.": 0.0}
    for name, after in weights(ours.models[0]).items():
        rate = RATE * next((factor for start, factor in rates.items() if name.startswith(start)), 1.0)
        decay = DECAY * next((factor for start, factor in decays.items() if name.startswith(start)), 1.0)
        decay = decay if after.dim() > 1 else 0.0  # Megatron decays no bias and no norm
        expected = before[name] - rate * (gradient[name] + decay * before[name])
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}")


def test_a_step_of_adam_takes_learning_rate_and_weight_decay_times_the_parts_factors(single_process):
    control = TrainingControl(learning_rate={"decoders": 4.0}, weight_decay={"decoders": 2.0})
    ours = trainer(single_process, control, adam(adam_eps=1e-3))
    before = weights(ours.models[0])
    ours.train_step(one_batch)
    gradient = gradients(ours.models[0])
    for name, after in weights(ours.models[0]).items():
        theirs = ".decoders." in name
        rate, decay = RATE * (4.0 if theirs else 1.0), DECAY * (2.0 if theirs else 1.0)
        decay = decay if after.dim() > 1 else 0.0
        g = gradient[name]  # after one step both moments, bias-corrected, are the gradient and its square
        expected = before[name] * (1 - rate * decay) - rate * g / (g.abs() + 1e-3)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}")


def test_factors_hold_through_the_whole_schedule_down_to_its_end(single_process):
    control = TrainingControl(learning_rate={"decoders": 4.0})
    ours = trainer(single_process, control, adam(min_lr=0.01), decay="linear", steps=4)
    rates = []
    for _ in range(4):
        ours.train_step(one_batch)
        rates.append({group["lr"] for group in ours.optimizer.param_groups if group["params"]})
    for at_step in rates:
        low, high = sorted(at_step)
        assert high == pytest.approx(4 * low)
    assert min(rates[-1]) == pytest.approx(0.01)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_optimizer_without_a_min_lr_decays_to_zero(decay, single_process):
    ours = trainer(single_process, TrainingControl(learning_rate={"decoders": 2.0}), decay=decay, steps=2)
    for _ in range(2):
        ours.train_step(one_batch)
    rates = sorted({group["lr"] for group in ours.optimizer.param_groups if group["params"]})
    assert rates == pytest.approx([RATE, 2 * RATE] if decay == "constant" else [0.0])


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (dict(frozen=["language"]), r"frozen: the model has no part 'language'. Expected 'language_model'"),
        (dict(frozen=["video"]), r"frozen: the model has no part 'video'.*\['audio', 'images'\]"),
        (dict(frozen=["images/encoders/clip"]), "no part 'images/encoders/clip'"),
        (dict(frozen=["images/encoders/patches/linear"]), "no part 'images/encoders/patches/linear'"),
        (dict(frozen=["generation_input"]), "no part 'generation_input'"),
        (dict(frozen=["audio/decoders"]), "no part 'audio/decoders'"),
        (dict(frozen=["images/pixels"]), "no part 'images/pixels'"),
        (dict(learning_rate={"decoder": 1.0}), "learning_rate: the model has no part 'decoder'"),
        (dict(weight_decay={"audio/decoder": 1.0}), "weight_decay: the model has no part 'audio/decoder'"),
        (dict(learning_rate={"decoders": -1.0}), r"learning_rate\['decoders'\] must be finite and at least 0, got -1"),
        (
            dict(weight_decay={"images": float("nan")}),
            r"weight_decay\['images'\] must be finite and at least 0, got nan",
        ),
        (dict(learning_rate={"decoders": float("inf")}), r"learning_rate\['decoders'\] must be finite"),
        (
            dict(frozen=["images"], learning_rate={"images/encoders": 2.0}),
            r"learning_rate\['images/encoders'\].* is frozen",
        ),
        (
            dict(frozen=["language_model"], weight_decay={"language_model": 2.0}),
            r"weight_decay\['language_model'\].* is frozen",
        ),
        (dict(compiled=["decoders"]), "compiled: 'decoders' is no encoder"),
        (dict(graphed=["images"]), "graphed: 'images' is no encoder"),
        (dict(own_precision=["images/decoders"], frozen=["images"]), "own_precision: 'images/decoders' is no encoder"),
        (dict(evaluating=["language_model"], frozen=["language_model"]), "evaluating: 'language_model' is no encoder"),
        (dict(own_precision=["images/encoders"]), "own_precision: 'images/encoders' trains, expected .* frozen"),
        (dict(evaluating=["encoders"], frozen=["images"]), "evaluating: 'encoders' trains, expected .* frozen"),
        (dict(evaluating=["images/encoders/clip"]), "evaluating: the model has no part 'images/encoders/clip'"),
        (dict(embedding_rows=[tiny.VOCABULARY]), r"embedding_rows: 64 is outside the vocabulary \[0, 64\)"),
        (dict(embedding_rows=[-200]), "embedding_rows: -200 is outside the vocabulary"),
        (
            dict(learning_rate={"images": 1.0, "images/decoders": 2.0}),
            "learning_rate: 'images' and 'images/decoders' share parameters",
        ),
        (dict(weight_decay={"encoders": 1.0, "audio": 1.0}), "weight_decay: 'encoders' and 'audio' share parameters"),
    ],
    ids=str,
)
def test_what_the_model_does_not_have_is_refused_by_name(control, message):
    with pytest.raises(ValueError, match=message):
        TrainingControl(**control).check(tiny.mimo_config())


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (dict(learning_rate={"decoders": "2"}), r"learning_rate\['decoders'\] must be a number, got '2'"),
        (dict(weight_decay={"decoders": None}), r"weight_decay\['decoders'\] must be a number, got None"),
        (dict(embedding_rows=[1.5]), "embedding_rows: a token id must be a whole number, got 1.5"),
        (dict(embedding_rows=[True]), "embedding_rows: a token id must be a whole number, got True"),
        *(
            (
                {"frozen": ["images/encoders"], option: "images/encoders"},
                f"{option} must be a list of parts, got the string 'images/encoders'",
            )
            for option in ("frozen", "compiled", "graphed", "own_precision", "evaluating")
        ),
    ],
    ids=str,
)
def test_what_is_no_number_or_no_list_is_a_type_error(control, message):
    with pytest.raises(TypeError, match=message):
        TrainingControl(**control).check(tiny.mimo_config())


def test_factors_of_parts_that_train_a_little_are_accepted():
    rows = dict(frozen=["language_model"], embedding_rows=[3], learning_rate={"language_model": 2.0})
    TrainingControl(**rows).check(tiny.mimo_config())
    TrainingControl(frozen=["images/encoders"], learning_rate={"images": 2.0}).check(tiny.mimo_config())


def test_trainer_refuses_unknown_parts_before_it_builds_a_model(single_process, monkeypatch):
    monkeypatch.setattr("megatron_mimo.training.trainer.build_chunks", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match="no part 'vision'"):
        trainer(single_process, TrainingControl(frozen=["vision"]))


def test_parts_name_the_parameters_that_the_model_gives_them(single_process):
    config = tiny.mimo_config()
    names = list(weights(tiny.megatron_mimo.MimoModel(config)))
    for part, prefixes in PARTS.items():
        found = parameter_prefixes(part, config)
        assert {n for n in names if n.startswith(found)} == {n for n in names if n.startswith(prefixes)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_encoder_gives_what_it_gives_uncompiled(backend, single_process, monkeypatch):
    # The CPU backend has torch.compile run eagerly, for want of a compiler; these two need none.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = trainer(single_process)
    ours = with_weights_of(plain, trainer(single_process, TrainingControl(compiled=["images/encoders"])))
    encoder = ours.models[0].modality_submodules["images"].encoders["patches"]
    assert isinstance(encoder.forward, CompiledForward)
    with torch.compiler.set_stance("default"):
        reports = [each.train_step(one_batch) for each in (ours, plain)]
    assert reports[0].losses == reports[1].losses
    for name, gradient in gradients(ours.models[0]).items():
        assert gradient.equal(gradients(plain.models[0])[name]), name


def test_running_statistics_of_a_frozen_encoder_stay_and_others_move(single_process):
    class Normed(tiny.PatchEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(tiny.PIXELS)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x.flatten(0, -2)).view_as(x))

    images = tiny.image_spec(encoders={"patches": ModuleSpec(module=Normed)})
    for frozen in ([], ["images/encoders"]):
        ours = trainer(
            single_process,
            TrainingControl(frozen=frozen),
            modality_submodules={"images": images, "audio": tiny.audio_spec()},
        )
        norm = ours.models[0].modality_submodules["images"].encoders["patches"].norm
        ours.train(one_batch)
        assert norm.running_mean.eq(0).all() == bool(frozen), frozen


class Regular(tiny.PatchEncoder):
    """An encoder with what differs in evaluation, and a buffer; it keeps what it saw and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(tiny.PIXELS)
        self.dropout = torch.nn.Dropout(0.5)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        given = self.dropout(super().forward(self.norm(x.flatten(0, -2)).view_as(x)))
        self.seen.append((x.detach(), given.detach()))
        return given


FROZEN = ["images/encoders"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_trainer(run, control: TrainingControl, half: str, directory=None) -> Trainer:
    torch.manual_seed(3)
    precision = {half: True, "params_dtype": HALF[half]}
    images = tiny.image_spec(encoders={"patches": ModuleSpec(module=Regular)})
    return Trainer(
        tiny.mimo_config(
            tiny.language_spec(tiny.language_config(**precision)),
            modality_submodules={"images": images, "audio": tiny.audio_spec()},
        ),
        run,
        TrainerSettings(steps=3, progress=False, directory=directory),
        optimizer=adam(initial_loss_scale=8.0),
        control=control,
    )


@pytest.mark.parametrize("half", HALF)
def test_a_frozen_encoder_keeps_float32_under_a_half_precision_trainer_and_computes_in_it(
    half, single_process, tmp_path
):
    control = TrainingControl(frozen=FROZEN, own_precision=FROZEN, evaluating=FROZEN)
    ours = half_trainer(single_process, control, half, tmp_path)
    encoder = ours.models[0].modality_submodules["images"].encoders["patches"]
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    before = {name: value.clone() for name, value in tensors.items()}
    assert {v.dtype for v in tensors.values() if v.is_floating_point()} == {torch.float32}
    assert any((v != v.to(HALF[half]).float()).any() for v in before.values()), "there are bits to lose"
    assert ours.models[0].language_model.output_layer.weight.dtype == HALF[half]
    ours.train(one_batch)
    assert len(encoder.seen) == 3
    reference = Regular().eval()
    reference.load_state_dict(before)
    for x, given in encoder.seen:
        assert x.dtype == given.dtype == torch.float32
        assert torch.equal(given, reference(x))
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    # The checkpoint has it in float32, and gives it back.
    other = half_trainer(single_process, control, half)
    theirs = other.models[0].modality_submodules["images"].encoders["patches"]
    with torch.no_grad():
        theirs.linear.weight.zero_()
    other.load(tmp_path / "step_00000003")
    assert theirs.linear.weight.dtype == torch.float32 and torch.equal(theirs.linear.weight, before["linear.weight"])
    plain = half_trainer(single_process, TrainingControl(frozen=FROZEN), half)
    assert plain.models[0].modality_submodules["images"].encoders["patches"].linear.weight.dtype == HALF[half]


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_frozen_encoder_runs_as_in_evaluation_while_the_rest_trains(evaluating, single_process):
    control = TrainingControl(frozen=FROZEN, evaluating=FROZEN if evaluating else ())
    ours = half_trainer(single_process, control, "bf16")
    ours.train(lambda *_: one_batch(0, 0, 1))
    encoder = ours.models[0].modality_submodules["images"].encoders["patches"]
    alike = all(torch.equal(encoder.seen[0][1], given) for _, given in encoder.seen[1:])
    assert alike == evaluating, "dropout draws anew in each step of training alone"
    assert encoder.dropout.training != evaluating and ours.models[0].language_model.training
    assert encoder.norm.running_mean.eq(0).all() and encoder.norm.num_batches_tracked == 0
