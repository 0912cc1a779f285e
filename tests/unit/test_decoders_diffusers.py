"""The diffusers adapter: objectives, one overfitted batch, guidance, codecs, and what it refuses."""

import importlib
import warnings

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    VQModel,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo.decoders import (
    AutoencoderCodec,
    CodeTokenizer,
    DiffusersDecoder,
    LatentTokenizer,
    VQCodec,
)

UNET = dict(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16,),
    layers_per_block=1,
    cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    norm_num_groups=4,
    attention_head_dim=8,
)


def decoder(scheduler=None, **options) -> DiffusersDecoder:
    settings = dict(
        model=ModuleSpec(module=UNet2DConditionModel, params=UNET),
        scheduler=scheduler or DDPMScheduler(num_train_timesteps=100),
        width=12,
        rows_per_item=3,
        sample_shape=(1, 8, 8),
    )
    return DiffusersDecoder(**{**settings, **options})


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_objective_is_the_librarys_own(kind):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
    made = decoder(scheduler)
    clean, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    step = torch.tensor([0, 30, 60, 99])
    x, time, wanted = made.objective(clean, noise, step)
    torch.testing.assert_close(x, scheduler.add_noise(clean, noise, step))
    library = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": scheduler.get_velocity(clean, noise, step),
    }
    torch.testing.assert_close(wanted, library[kind])
    rows = torch.randn(12, 12)
    term = made.loss(rows, {"target": clean, "noise": noise, "step": step})
    with torch.no_grad():
        predicted = made.model(x, time, encoder_hidden_states=rows.reshape(4, 3, 12)).sample
    torch.testing.assert_close(term.mean(), (predicted - wanted).square().mean())
    assert term.count == 4


def test_flow_matching_noises_as_the_librarys_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = decoder(scheduler)
    clean, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    step = torch.tensor([10, 900])
    x, time, wanted = made.objective(clean, noise, step)
    assert torch.equal(time, scheduler.timesteps[step])
    torch.testing.assert_close(x, scheduler.scale_noise(clean, time, noise))
    assert torch.equal(wanted, noise - clean)


def test_casting_the_model_leaves_the_schedulers_tables_exact():
    made = decoder()
    before = made.objective.signal(torch.arange(100))
    after = made.bfloat16().objective.signal(torch.arange(100))
    assert after.dtype == torch.float32 and torch.equal(after, before)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_the_adapter_overfits_one_batch(scheduler):
    torch.manual_seed(0)
    made = decoder(scheduler())
    rows = torch.randn(2 * 3, 12, requires_grad=True)
    clean = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8)])
    optimizer = torch.optim.Adam([*made.parameters(), rows], lr=1e-2)
    losses = []
    for _ in range(70):
        targets = made.prepare({"target": clean.repeat(3, 1, 1, 1)})
        term = made.loss(rows.repeat(3, 1), targets).mean()
        term.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(term.item())
    # A model that knew the noise level alone could not tell the two images apart.
    assert sum(losses[-10:]) < 0.25 * 10 * sum(losses[:3]) / 3
    drawn = made.sample(rows.detach(), steps=20, generator=torch.Generator().manual_seed(0))
    assert drawn[0].mean() > drawn[1].mean() + 0.5


def test_every_parameter_and_the_rows_get_a_gradient_and_zero_ones_without_rows():
    made = decoder(condition_dropout=0.5)
    rows = torch.randn(6, 12, requires_grad=True)
    targets = made.prepare({"target": torch.randn(2, 1, 8, 8), "drop": torch.tensor([True, False])})
    made.loss(rows, targets).mean().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert made.condition_dropout.null.grad.any() and rows.grad[3:].any()
    assert not rows.grad[:3].any()
    made.zero_grad()
    empty = made.prepare({"target": torch.zeros(0, 1, 8, 8)})
    made.loss(rows[:0], empty).sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_sampling_leaves_the_scheduler_unchanged_and_repeats_with_the_generator(scheduler):
    made = decoder(scheduler(num_train_timesteps=100))
    steps_before = made.scheduler.timesteps.clone()
    rows = torch.randn(3, 12)
    first, second = (made.sample(rows, steps=4, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (1, 1, 8, 8)
    assert torch.equal(made.scheduler.timesteps, steps_before)


def test_guidance_contrasts_with_the_null_condition_and_warns_once_without_one():
    made = decoder(condition_dropout=0.1)
    torch.nn.init.normal_(made.condition_dropout.null)
    rows, noise = torch.randn(3, 12), torch.randn(1, 1, 8, 8)
    given = made.condition_dropout.null.detach().expand(3, 12)
    options = dict(steps=2, guidance=3.0, noise=noise)
    first = made.sample(rows, generator=torch.Generator().manual_seed(0), **options)
    second = made.sample(rows, generator=torch.Generator().manual_seed(0), unconditional_rows=given, **options)
    assert torch.equal(first, second)
    plain = decoder()
    with pytest.warns(UserWarning, match="trained without dropped conditions"):
        plain.sample(rows, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.sample(rows, **options)


def test_noise_of_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match=r"DiffusersDecoder's noise must be \[1, 1, 8, 8\] for these rows"):
        decoder().sample(torch.randn(3, 12), steps=2, noise=torch.randn(5, 1, 8, 8))


def test_a_dit_with_learned_variance_reads_the_rows_as_a_caption():
    made = decoder(model=pixart())
    targets = made.prepare({"target": torch.randn(2, 1, 8, 8)})
    rows = torch.randn(6, 12, requires_grad=True)
    made.loss(rows, targets).mean().backward()
    assert rows.grad.any()
    assert made.sample(rows.detach(), steps=2).shape == (2, 1, 8, 8)


def vae() -> LatentTokenizer:
    model = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=16,
    )
    return LatentTokenizer(AutoencoderCodec(model), latent_shape=(2, 8, 8), scale=0.5)


def test_a_frozen_vae_encodes_targets_and_renders_samples():
    tokenizer = vae()
    model = UNet2DConditionModel(**{**UNET, "in_channels": 2, "out_channels": 2})
    made = decoder(model=model, sample_shape=(2, 8, 8), tokenizer=tokenizer)
    media = torch.randn(2, 1, 16, 16)
    assert made.num_rows({"media": media}) == 6
    prepared = made.prepare({"media": media})
    latents = tokenizer.module.model.encode(media).latent_dist.mode()
    torch.testing.assert_close(prepared["target"], 0.5 * latents)
    made.loss(torch.randn(6, 12), prepared).mean().backward()
    assert all(p.grad is None for p in tokenizer.parameters())
    wanted = tokenizer.module.model.decode(latents).sample
    torch.testing.assert_close(made.render(prepared["target"]), wanted)
    assert decoder().render(latents) is latents


def test_a_vq_model_encodes_to_codes_and_back():
    model = VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        num_vq_embeddings=16,
    )
    tokenizer = CodeTokenizer(VQCodec(model), grid=(8, 8))
    images = torch.randn(3, 1, 16, 16)
    codes = tokenizer.encode(images)
    assert codes.shape == (3 * 64,) and codes.dtype == torch.int64
    torch.testing.assert_close(tokenizer.decode(codes), model(images).sample)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"width": 10}, ValueError, "width 10 differs from the 12"),
        ({"sample_shape": (8, 8)}, ValueError, r"sample_shape must be \(C, h, w\)"),
        ({"scheduler": object()}, TypeError, "needs a scheduler of diffusers, got object"),
        ({"scheduler": KarrasVeScheduler()}, ValueError, "no training objective"),
        ({"tokenizer": vae()}, ValueError, "differs from the tokenizer's"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        decoder(**options)


def test_a_model_that_reads_no_condition_is_refused():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8
    )
    with pytest.raises(TypeError, match="DiTTransformer2DModel takes .*class_labels"):
        decoder(model=model)


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"target must be \[n, 1, 8, 8\], got \[2, 1, 4, 4\]"):
        decoder().num_rows({"target": torch.zeros(2, 1, 4, 4)})


@pytest.mark.parametrize("name", ["step", "weight", "noise"])
def test_draws_and_weights_of_another_shape_are_refused_before_the_loss(name):
    targets = {"target": torch.zeros(2, 1, 8, 8), name: torch.zeros(1).long()}
    with pytest.raises(ValueError, match=rf"{name} must have shape \[2.*got \[1\]"):
        decoder().prepare(targets)


def test_an_image_that_does_not_count_may_be_nan():
    made = decoder()
    target = torch.rand(2, 1, 8, 8)
    target[1] = torch.nan
    rows = torch.randn(6, 12, requires_grad=True)
    term = made.loss(rows, made.prepare({"target": target, "weight": torch.tensor([1, 0])}))
    term.mean().backward()
    assert term.count == 1 and term.sum.isfinite() and rows.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'megatron-mimo\[diffusers\]'"):
        decoder()
