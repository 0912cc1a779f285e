"""A small VQ tokenizer of the digits, trained before the model that draws with its codes.

An image becomes a grid of 4 x 4 codes, each the nearest entry of a codebook to what an encoder makes of a
neighbourhood of pixels (van den Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937;
the codebook follows moving averages as in its appendix A.1).

Shapes: `n` images, `V` entries of the codebook, `D` their width.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GRID = (4, 4)
"""Codes of an image: one for every 2 x 2 pixels."""
CODES = 32
"""Entries of the codebook."""
WIDTH = 8
"""Width of an entry."""


class DigitCodec(nn.Module):
    """Images `[n, 1, 8, 8]` in [-1, 1] to codes `[n, *GRID]`, and back.

    Args:
        weights: a file that `save` wrote; None starts untrained.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(64, WIDTH, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(WIDTH, 64, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(64, 32, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )
        self.register_buffer("codebook", torch.randn(CODES, WIDTH))
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True))

    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 `[n, *GRID]` of images `[n, 1, 8, 8]`."""
        return self.nearest(self.features(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Images `[n, 1, 8, 8]` of codes `[n, *GRID]`."""
        return self.draw(self.codebook[codes]).clamp(-1, 1)

    def features(self, images: Tensor) -> Tensor:
        """`[n, 1, 8, 8] -> [n, *GRID, D]`, not yet rounded to the codebook."""
        return self.encoder(images).movedim(1, -1)

    def nearest(self, features: Tensor) -> Tensor:
        """Codes `[...]` of the entries nearest to features `[..., D]`."""
        return torch.cdist(features.flatten(0, -2), self.codebook).argmin(-1).view(features.shape[:-1])

    def draw(self, features: Tensor) -> Tensor:
        """`[n, *GRID, D] -> [n, 1, 8, 8]`."""
        return self.decoder(features.movedim(-1, 1))

    def save(self, path: Path) -> None:
        """Writes the weights, codebook included."""
        torch.save(self.state_dict(), path)


class MovingCodebook:
    """Moves each entry of a codec's codebook to the mean of the features that it was nearest to of late.

    An entry starts at one of the batch's features, as if used once a step, and starts again at another when its
    uses have fallen below `IDLE` a step: 40 steps without any. So none lies idle for long.
    """

    DECAY = 0.97
    IDLE = 0.3

    def __init__(self, codebook: Tensor, generator: torch.Generator) -> None:
        self.codebook, self.generator = codebook, generator
        self.uses = torch.zeros(len(codebook))
        self.sums = torch.zeros_like(codebook)

    @torch.no_grad()
    def follow(self, features: Tensor, codes: Tensor) -> None:
        """Takes in a batch's features `[m, D]` and the codes `[m]` that they were rounded to."""
        chosen = F.one_hot(codes, len(self.codebook)).to(features)
        self.uses.lerp_(chosen.sum(0), 1 - self.DECAY)
        self.sums.lerp_(chosen.T @ features, 1 - self.DECAY)
        idle = self.uses < self.IDLE
        fresh = features[torch.randint(len(features), (int(idle.sum()),), generator=self.generator)]
        self.uses[idle], self.sums[idle] = 1.0, fresh
        self.codebook.copy_(self.sums / self.uses[:, None])


def train_codec(images: Tensor, *, steps: int, seed: int, batch_size: int = 64) -> DigitCodec:
    """A codec trained to give images `[n, 8, 8]` back, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codec = DigitCodec()
    book = MovingCodebook(codec.codebook, generator)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (batch_size,), generator=generator), None]
        features = codec.features(batch)
        codes = codec.nearest(features)
        rounded = codec.codebook[codes]
        straight_through = features + (rounded - features).detach()
        loss = F.mse_loss(codec.draw(straight_through), batch) + 0.25 * F.mse_loss(features, rounded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        book.follow(features.flatten(0, -2), codes.flatten())
    return codec.eval().requires_grad_(False)
