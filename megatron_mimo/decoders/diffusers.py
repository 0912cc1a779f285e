"""Adapters that put the `diffusers` library's models behind the decoder protocol.

The image generator is a UNet or DiT of that library, trained or frozen, which reads a span's rows as
it would read a text encoder's (Koh et al., arXiv 2305.17216; Wu et al., "NExT-GPT", arXiv 2309.05519;
Dong et al., "DreamLLM", arXiv 2309.11499). The library is optional and imported on construction.

Shapes: `N` rows, `n` items (images), `W` width of the rows, `C, h, w` of an image or latent.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from megatron_mimo.assemble import images_to_patches
from megatron_mimo.decoders.arguments import at_least_one, finite
from megatron_mimo.decoders.base import Decoder, PositionRule, phase, usable, weighted_sum
from megatron_mimo.decoders.guidance import ConditionDropout, guided
from megatron_mimo.decoders.image_targets import ImageTargets
from megatron_mimo.decoders.targets import Prepared, Targets
from megatron_mimo.decoders.tokenizers import LatentTokenizer, built
from megatron_mimo.losses import LossTerm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SchedulerMixin, VQModel
    from megatron.core.transformer.spec_utils import ModuleSpec

# The library's schedulers share no class that declares what all of them have, nor what their `config` holds.
type _Scheduler = Any


class DiffusersDecoder(Decoder):
    """Trains and samples a `diffusers` UNet or DiT that attends to a span's rows.

    With a scheduler of the DDPM family the model predicts what the scheduler's configuration says:
    the noise (`"epsilon"`), the velocity (`"v_prediction"`) or the image (`"sample"`). With
    `FlowMatchEulerDiscreteScheduler` it predicts `noise - image`. The loss of an image is the squared
    error's mean over its values.

    Targets: `target` `[n, C, h, w]` floating; or, with a tokenizer, `media` `[n, ...]`. Optionally
    `weight` `[n]`; optionally the draws `step` int64 `[n]` (an index into the scheduler's training
    steps), `noise` `[n, C, h, w]`, `drop` bool `[n]`, which `prepare` adds otherwise.

    Args:
        model: the library's model or its spec, called with `timestep` and `encoder_hidden_states`:
            `UNet2DConditionModel`, `Transformer2DModel`, `PixArtTransformer2DModel` and alike.
        scheduler: the library's scheduler, which stays unchanged. Training adds noise by its
            configuration, sampling takes its own steps.
        width: `W`, the model's `cross_attention_dim`.
        rows_per_item: length of a span.
        sample_shape: `(C, h, w)` of what the model generates.
        condition_dropout: how often a span's rows are replaced by a learned null condition in
            training, for guidance in sampling.
        tokenizer: frozen VAE, or the spec of one, with patches of one pixel.
        position_rule: see `Decoder`.

    Raises:
        ImportError: `diffusers` is not installed.
        TypeError: a model that reads no `encoder_hidden_states`, or another library's scheduler.
        ValueError: widths that differ, or a scheduler that no training objective is known for.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DConditionModel
        >>> unet = UNet2DConditionModel(sample_size=8, in_channels=1, out_channels=1,
        ...     block_out_channels=(8,), layers_per_block=1, cross_attention_dim=16,
        ...     down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        ...     norm_num_groups=4, attention_head_dim=4)
        >>> decoder = DiffusersDecoder(model=unet, scheduler=DDPMScheduler(), width=16,
        ...     rows_per_item=4, sample_shape=(1, 8, 8))
        >>> targets = decoder.prepare({"target": torch.zeros(2, 1, 8, 8)})
        >>> decoder.loss(torch.ones(2 * 4, 16), targets).count
        tensor(2.)
        >>> decoder.sample(torch.ones(2 * 4, 16), steps=2).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        *,
        model: nn.Module | ModuleSpec,
        scheduler: SchedulerMixin,
        width: int,
        rows_per_item: int,
        sample_shape: tuple[int, int, int],
        condition_dropout: float = 0.0,
        tokenizer: LatentTokenizer | ModuleSpec | None = None,
        position_rule: PositionRule = "own",
    ) -> None:
        library = _library()
        if not isinstance(scheduler, library.SchedulerMixin):
            raise TypeError(f"DiffusersDecoder needs a scheduler of diffusers, got {type(scheduler).__name__}")
        objective = _objective(library, scheduler, sample_shape)
        channels, height, across = sample_shape
        targets = ImageTargets(
            sample_shape=(channels, height, across),
            rows_per_item=rows_per_item,
            steps=objective.steps,
            tokenizer=tokenizer,
        )
        super().__init__(width=width, position_rule=position_rule, targets=targets)
        self.model = built(model)
        _check_model(self.model, width)
        self.scheduler: _Scheduler = scheduler
        self.objective = objective
        self.sample_shape = targets.sample_shape
        self.condition_dropout = ConditionDropout(width, condition_dropout)
        if self.tokenizer is not None and self.tokenizer.latent_shape != self.sample_shape:
            raise ValueError(
                f"DiffusersDecoder: sample_shape {self.sample_shape} differs from the tokenizer's "
                f"latent_shape {self.tokenizer.latent_shape}"
            )

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """The targets with `target`, `step`, `noise` and, where conditions are dropped, `drop`."""
        prepared, stream = super().prepare(targets, stream), phase(self, stream)
        return self.condition_dropout.drawn(prepared, prepared["target"].device, stream)

    def loss(self, rows: Tensor, targets: Targets) -> LossTerm:
        """Squared error of the prediction, its mean over an image, summed; and the images' weight."""
        targets = self.prepared(targets)
        self.check_rows(rows, expected=targets.num_rows)
        if rows.shape[0] == 0:
            return self.zero_loss(rows)
        clean = usable(targets["target"].float(), targets.get("weight"))
        noise, step = targets["noise"].float(), targets["step"]
        condition = self.condition_dropout(rows, targets.get("drop"))
        x, time, wanted = self.objective(clean, noise, step)
        error = (self.predict(condition, x, time) - wanted).square().flatten(1).mean(dim=1)
        return weighted_sum(error, targets.get("weight"))

    def predict(self, rows: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The model's prediction `[n, C, h, w]`, float32.

        Args:
            rows: `[N, W]` conditions, span by span.
            x: `[n, C, h, w]` noised images.
            time: `[n]` or a scalar, as the scheduler counts it.
        """
        dtype = next(self.model.parameters()).dtype
        conditions = rows.to(dtype).unflatten(0, (-1, self.rows_per_item))
        output = self.model(
            x.to(dtype),
            timestep=time.expand(x.shape[0]),
            encoder_hidden_states=conditions,
            return_dict=False,
        )
        # A model that learns the variance too gives it in the channels after the prediction's.
        return output[0][:, : self.sample_shape[0]].float()

    @torch.no_grad()
    def sample(
        self,
        rows: Tensor,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        unconditional_rows: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images or latents `[n, C, h, w]`, float32, drawn for rows `[N, W]`.

        Args:
            rows: conditions, span by span.
            steps: of the scheduler.
            guidance: scale of classifier-free guidance, 1 is off.
            unconditional_rows: `[N, W]` to contrast `rows` with; None takes the null condition
                learned with `condition_dropout`.
            noise: `[n, C, h, w]` to start from; None draws it from `generator`, or torch's default.
            generator: on the rows' device; also for schedulers that add noise at their steps.
        """
        self.check_rows(rows)
        finite(type(self).__name__, guidance=guidance)
        at_least_one("DiffusersDecoder", steps=steps)
        shape = (rows.shape[0] // self.rows_per_item, *self.sample_shape)
        if noise is None:
            noise = torch.randn(shape, device=rows.device, generator=generator)
        self.check_noise(noise, shape)
        if guidance != 1:
            null = self.condition_dropout.unconditional(rows, unconditional_rows)
        # A copy: setting the steps rewrites a scheduler's tables.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=rows.device)
        draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if draws_noise else {}
        x = noise * self.objective.noise_scale(scheduler)
        for time in scheduler.timesteps:
            x_in = self.objective.scaled(scheduler, x, time)
            predicted = self.predict(rows, x_in, time)
            if guidance != 1:
                predicted = guided(predicted, self.predict(null, x_in, time), guidance)
            x = scheduler.step(predicted, time, x, return_dict=False, **options)[0]
        return x

    def render(self, samples: Tensor) -> Tensor:
        """Images of sampled latents if there is a tokenizer, else the samples."""
        if self.tokenizer is None:
            return samples
        vae = cast(LatentTokenizer, self.tokenizer)
        return vae.decode(images_to_patches(samples, vae.patch))


class _Table(nn.Module):
    """A scheduler's table, float32 on the model's device whatever dtype the model is cast to.

    The scheduler's own table would be copied to the device in the first step, which waits for it;
    a float buffer would be rounded when the model is cast to bf16, but its bits are not.
    """

    bits: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("bits", values.float().clone().view(torch.int32), persistent=False)

    def forward(self, step: Tensor) -> Tensor:
        """Float32 entries at `step`."""
        return self.bits.view(torch.float32)[step]


class _Diffusion(nn.Module):
    """Objective of the DDPM family: noise by the scheduler's table of signal shares."""

    def __init__(self, scheduler: _Scheduler, kind: str) -> None:
        super().__init__()
        self.steps = scheduler.config.num_train_timesteps
        self.kind = kind
        self.signal = _Table(scheduler.alphas_cumprod)

    def forward(self, clean: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noised image, time and what to predict (Ho et al., arXiv 2006.11239, eq. 4; velocity:
        Salimans and Ho, arXiv 2202.00512, section 4)."""
        signal = self.signal(step).reshape(-1, 1, 1, 1)
        keep, add = signal.sqrt(), (1 - signal).sqrt()
        wanted = {"epsilon": noise, "sample": clean, "v_prediction": keep * noise - add * clean}
        return keep * clean + add * noise, step, wanted[self.kind]

    def noise_scale(self, scheduler: _Scheduler) -> float | Tensor:
        return scheduler.init_noise_sigma

    def scaled(self, scheduler: _Scheduler, x: Tensor, time: Tensor) -> Tensor:
        return scheduler.scale_model_input(x, time)


class _FlowMatching(nn.Module):
    """Objective of rectified flow: the scheduler's own times, velocity `noise - clean`."""

    def __init__(self, scheduler: _Scheduler) -> None:
        super().__init__()
        self.steps = scheduler.config.num_train_timesteps
        fresh = type(scheduler).from_config(scheduler.config)
        self.share, self.time = _Table(fresh.sigmas), _Table(fresh.timesteps)

    def forward(self, clean: Tensor, noise: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noised image, time and velocity (Liu et al., arXiv 2209.03003)."""
        share = self.share(step).reshape(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise, self.time(step), noise - clean

    def noise_scale(self, scheduler: _Scheduler) -> float:
        return 1.0

    def scaled(self, scheduler: _Scheduler, x: Tensor, time: Tensor) -> Tensor:
        return x


class AutoencoderCodec(nn.Module):
    """A `diffusers` `AutoencoderKL` as the codec of a `LatentTokenizer`.

    Args:
        model: the VAE or its spec. Give its `config.scaling_factor` and `config.shift_factor` to
            the tokenizer as `scale` and `shift`.
    """

    def __init__(self, model: AutoencoderKL | ModuleSpec) -> None:
        super().__init__()
        self.model: Any = built(model)

    def encode(self, images: Tensor) -> Tensor:
        """Latents `[n, C, h, w]`, the mode of their distribution, of images."""
        return self.model.encode(images.to(self.model.dtype)).latent_dist.mode()

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents `[n, C, h, w]`."""
        return self.model.decode(latents.to(self.model.dtype)).sample


class VQCodec(nn.Module):
    """A `diffusers` `VQModel` as the codec of a `CodeTokenizer`.

    Args:
        model: the VQ model or its spec.
    """

    def __init__(self, model: VQModel | ModuleSpec) -> None:
        super().__init__()
        self.model: Any = built(model)

    def encode(self, images: Tensor) -> Tensor:
        """Codes `[n, h, w]` int64 of images."""
        latents = self.model.encode(images.to(self.model.dtype)).latents
        _, _, (_, _, codes) = self.model.quantize(latents)
        return codes.reshape(latents.shape[0], *latents.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes `[n, h, w]`."""
        width = self.model.config.vq_embed_dim or self.model.config.latent_channels
        entries = self.model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, width))
        return self.model.decode(entries).sample  # which quantises them to themselves


def _library() -> ModuleType:
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(
            "DiffusersDecoder needs the diffusers library: pip install 'megatron-mimo[diffusers]'"
        ) from error


def _objective(
    library: ModuleType, scheduler: _Scheduler, sample_shape: tuple[int, int, int]
) -> _Diffusion | _FlowMatching:
    if len(sample_shape) != 3:
        raise ValueError(f"DiffusersDecoder: sample_shape must be (C, h, w), got {sample_shape}")
    if isinstance(scheduler, library.FlowMatchEulerDiscreteScheduler):
        return _FlowMatching(scheduler)
    kind = scheduler.config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"DiffusersDecoder knows no training objective for {type(scheduler).__name__} with "
            f"prediction_type {kind!r}. Take a scheduler with prediction_type 'epsilon', 'v_prediction' "
            "or 'sample', or FlowMatchEulerDiscreteScheduler."
        )
    # All of the family convert into one another by their configuration; this one has the table.
    return _Diffusion(library.DDPMScheduler.from_config(scheduler.config), kind)


def _check_model(model: nn.Module, width: int) -> None:
    accepted = inspect.signature(model.forward).parameters
    if not {"timestep", "encoder_hidden_states"} <= accepted.keys():
        raise TypeError(
            f"DiffusersDecoder's model must take `timestep` and `encoder_hidden_states`; "
            f"{type(model).__name__} takes {sorted(accepted)}"
        )
    settings = cast(Mapping[str, Any], model.config)
    reads = settings.get("caption_channels") or settings.get("cross_attention_dim")
    if isinstance(reads, int) and reads != width:
        raise ValueError(
            f"DiffusersDecoder: width {width} differs from the {reads} that {type(model).__name__} "
            "reads (its cross_attention_dim). Let the output projection end at that width."
        )
