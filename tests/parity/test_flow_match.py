"""Flow loss and Euler sampling against `diffusers`' FlowMatchEulerDiscreteScheduler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from megatron_mimo.decoders import FlowDecoder, FlowTransformerDecoder

# Both sides compute in float32, at most in another order; values are of unit size.
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


def decoder(kind: str):
    """A decoder of 3 rows and 3 targets an item, every weight drawn."""
    torch.manual_seed(0)
    if kind == "head":
        made = FlowDecoder(width=6, target_width=4, hidden_width=16, depth=2, rows_per_item=3)
    else:
        made = FlowTransformerDecoder(
            width=6,
            target_width=4,
            targets_per_item=3,
            rows_per_item=3,
            hidden_width=16,
            depth=2,
            heads=2,
        )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("kind", ["head", "transformer"])
def test_the_loss_is_that_of_the_schedulers_noised_sample_and_its_velocity(kind):
    made = decoder(kind)
    scheduler = FlowMatchEulerDiscreteScheduler()
    rows, clean, noise = torch.randn(5 * 3, 6), torch.randn(5 * 3, 4), torch.randn(5 * 3, 4)
    timesteps = scheduler.timesteps[torch.tensor([0, 100, 500, 900, 999])]
    noised = scheduler.scale_noise(clean.reshape(5, 3, 4), timesteps, noise.reshape(5, 3, 4))
    time = timesteps / scheduler.config.num_train_timesteps
    with torch.no_grad():
        predicted = made.velocity(rows, noised.flatten(0, 1), time)
    wanted = torch.nn.functional.mse_loss(predicted, noise - clean)
    targets = made.prepare({"target": clean, "noise": noise, "time": time})
    torch.testing.assert_close(made.loss(rows, targets).mean(), wanted, **TOLERANCE)


@pytest.mark.parametrize("kind", ["head", "transformer"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_sampling_takes_the_schedulers_steps(kind, shift):
    made, steps = decoder(kind), 12
    rows, noise = torch.randn(2 * 3, 6), torch.randn(2 * 3, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # The grid that the library's pipelines ask for: even from 1 down to 1 / steps, then 0.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    sample = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = made.velocity(rows, sample, timestep / scheduler.config.num_train_timesteps)
            sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]
    ours = made.sample(rows, steps=steps, shift=shift, noise=noise)
    torch.testing.assert_close(ours, sample, **TOLERANCE)
