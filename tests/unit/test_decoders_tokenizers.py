"""Frozen tokenizers: media to targets, samples to media, never trained."""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn
from torch.nn import functional as F

from megatron_mimo.decoders import (
    CodeTokenizer,
    DiscreteDecoder,
    FlowDecoder,
    FlowTransformerDecoder,
    LatentTokenizer,
)


class TinyVQ(nn.Module):
    """2 x 2 patches of one channel by their nearest of 8 learned patches; dropout shows training."""

    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(8, 4))
        self.dropout = nn.Dropout(0.9)

    def encode(self, images):
        patches = self.dropout(F.unfold(images, 2, stride=2).transpose(1, 2))
        return torch.cdist(patches, self.codebook.expand(len(images), -1, -1)).argmin(-1)

    def decode(self, codes):
        size = [2 * side for side in codes.shape[1:]]
        return F.fold(self.codebook[codes].flatten(1, 2).transpose(1, 2), size, 2, stride=2)


class Halved(nn.Module):
    """A latent is an image at half its size."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def encode(self, images):
        return self.gain * F.avg_pool2d(images, 2)

    def decode(self, latents):
        return F.interpolate(latents / self.gain, scale_factor=2)


def codes_decoder(**options) -> DiscreteDecoder:
    tokenizer = CodeTokenizer(ModuleSpec(module=TinyVQ), grid=(3, 2))
    return DiscreteDecoder(width=5, codebook_sizes=8, tokenizer=tokenizer, **options)


def images_of_codes(decoder: DiscreteDecoder) -> torch.Tensor:
    return decoder.tokenizer.decode(torch.randint(8, (4 * 6,)))


def test_media_become_codes_and_codes_the_same_media():
    decoder = codes_decoder()
    media = images_of_codes(decoder)
    assert media.shape == (4, 1, 6, 4)
    assert decoder.num_rows({"media": media}) == 24
    prepared = decoder.prepare({"media": media})
    assert prepared["codes"].shape == (24,) and "media" not in prepared
    assert torch.equal(decoder.render(prepared["codes"]), media)
    assert decoder.num_rows(prepared) == 24


def test_a_tokenizer_may_be_given_by_spec():
    spec = ModuleSpec(module=CodeTokenizer, params=dict(module=TinyVQ(), grid=(3, 2)))
    decoder = DiscreteDecoder(width=5, codebook_sizes=8, tokenizer=spec)
    assert isinstance(decoder.tokenizer, CodeTokenizer)


def test_a_frozen_tokenizer_never_trains():
    decoder = codes_decoder().train()
    assert decoder.training and not decoder.tokenizer.training
    assert not decoder.tokenizer.module.dropout.training
    trainable = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trainable == {"heads.0.weight", "heads.0.bias"}
    rows = torch.randn(24, 5)
    decoder.loss(rows, decoder.prepare({"media": images_of_codes(decoder)})).mean().backward()
    assert decoder.tokenizer.module.codebook.grad is None


def test_without_a_tokenizer_samples_render_as_they_are():
    samples = torch.zeros(3, dtype=torch.long)
    assert DiscreteDecoder(width=5, codebook_sizes=8).render(samples) is samples


def latent_tokenizer(**options) -> LatentTokenizer:
    settings = dict(latent_shape=(1, 4, 4), patch=2, shift=0.5, scale=3.0)
    return LatentTokenizer(Halved(), **{**settings, **options})


def test_latents_are_shifted_scaled_cut_and_put_back():
    tokenizer = latent_tokenizer()
    images = F.interpolate(torch.rand(3, 1, 4, 4), scale_factor=2)
    rows = tokenizer.encode(images)
    assert rows.shape == (3 * 4, 4) and not rows.requires_grad
    torch.testing.assert_close(rows[0, 1], (2 * images[0, 0, 0, 2] - 0.5) * 3)
    torch.testing.assert_close(tokenizer.decode(rows), images)


def test_flow_decoders_learn_latents_and_render_images():
    per_row = FlowDecoder(width=5, target_width=4, hidden_width=8, tokenizer=latent_tokenizer())
    per_span = FlowTransformerDecoder(
        width=5,
        target_width=4,
        targets_per_item=4,
        rows_per_item=1,
        hidden_width=8,
        depth=1,
        heads=2,
        tokenizer=latent_tokenizer(),
    )
    for decoder, rows in ((per_row, 8), (per_span, 2)):
        media = torch.rand(2, 1, 8, 8)
        assert decoder.num_rows({"media": media}) == rows
        prepared = decoder.prepare({"media": media})
        assert torch.equal(prepared["target"], decoder.tokenizer.encode(media))
        assert prepared["noise"].shape == (8, 4)
        decoder.loss(torch.randn(rows, 5), prepared).mean().backward()
        assert decoder.tokenizer.module.gain.grad is None
        drawn = decoder.sample(torch.randn(rows, 5), steps=1)
        assert decoder.render(drawn).shape == media.shape
    plain = FlowDecoder(width=5, target_width=4, hidden_width=8)
    assert plain.render(drawn) is drawn


def test_a_medium_takes_as_many_rows_as_it_has_tokens():
    rows = FlowDecoder(width=5, target_width=4, hidden_width=8, tokenizer=latent_tokenizer())
    spans = FlowTransformerDecoder(
        width=5, target_width=4, targets_per_item=4, rows_per_item=3, hidden_width=8, depth=1, heads=2,
        tokenizer=latent_tokenizer(),
    )  # fmt: skip
    assert (rows.rows_per_medium, spans.rows_per_medium, codes_decoder().rows_per_medium) == (4, 3, 6)
    assert FlowDecoder(width=5, target_width=4, hidden_width=8, rows_per_item=2).rows_per_medium == 2


def test_several_codebooks_stay_apart():
    class Digits(nn.Module):
        def encode(self, media):
            return torch.stack([media // 10, media % 10], dim=-1).long()

        def decode(self, codes):
            return 10 * codes[..., 0] + codes[..., 1]

    tokenizer = CodeTokenizer(Digits(), grid=(3,), codebooks=2)
    media = torch.tensor([[12, 34, 56], [7, 80, 99]])
    codes = tokenizer.encode(media)
    assert codes.shape == (6, 2)
    assert torch.equal(tokenizer.decode(codes), media)


def test_a_codec_without_both_directions_is_refused():
    with pytest.raises(TypeError, match="Identity lacks one or both"):
        CodeTokenizer(nn.Identity(), grid=(2,))


def test_codes_that_do_not_fit_the_grid_are_refused():
    tokenizer = CodeTokenizer(TinyVQ(), grid=(3, 3))
    with pytest.raises(ValueError, match=r"a grid \[3, 3\] with 1 codebooks needs 9"):
        tokenizer.encode(torch.zeros(1, 1, 6, 4))


def test_a_span_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ValueError, match="7 rows do not fill items of 6 tokens"):
        codes_decoder().render(torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="3 rows do not fill items of 4 tokens"):
        latent_tokenizer().decode(torch.zeros(3, 4))


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"latents \[1, 1, 3, 3\], expected \[n, \*\[1, 4, 4\]\]"):
        latent_tokenizer().encode(torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match="patch 3 does not divide latents of 4 x 4"):
        latent_tokenizer(patch=3)


class Nearest(nn.Module):
    """A codec that casts nothing itself, with entries that bfloat16 cannot tell apart."""

    def __init__(self):
        super().__init__()
        self.register_buffer("entries", 1 + torch.arange(8) / 1024)

    def encode(self, media):
        return (media.flatten()[:, None] @ torch.ones(1, 8) - self.entries).abs().argmin(-1)

    def decode(self, codes):
        return self.entries[codes]


def test_a_tokenizer_keeps_its_precision_in_a_model_that_is_cast():
    tokenizer = CodeTokenizer(Nearest(), grid=(8,))
    decoder = DiscreteDecoder(width=5, codebook_sizes=8, tokenizer=tokenizer).bfloat16()
    assert decoder.heads[0].weight.dtype == torch.bfloat16
    assert tokenizer.module.entries.dtype == torch.float32
    media = (1 + torch.arange(8) / 1024)[None]
    prepared = decoder.prepare({"media": media})
    assert prepared["codes"].tolist() == list(range(8))
    assert torch.equal(decoder.render(prepared["codes"]).flatten(), media.flatten())
    decoder.loss(torch.randn(8, 5, dtype=torch.bfloat16), prepared).mean().backward()


def test_a_cast_flow_learns_latents_in_float32_of_media_in_any_dtype():
    decoder = FlowDecoder(width=5, target_width=4, hidden_width=8, tokenizer=latent_tokenizer())
    decoder.bfloat16()
    assert decoder.tokenizer.module.gain.dtype == torch.float32
    media = torch.rand(2, 1, 8, 8)
    target = decoder.prepare({"media": media})["target"]
    assert torch.equal(target, latent_tokenizer().encode(media)) and target.dtype == torch.float32
    half = decoder.prepare({"media": media.bfloat16()})
    assert half["target"].dtype == torch.float32
    decoder.loss(torch.randn(8, 5), half).mean().backward()
    assert decoder.render(target.bfloat16()).dtype == torch.float32


def test_a_codec_built_in_half_precision_stays_so_and_gives_float32():
    tokenizer = LatentTokenizer(Halved().bfloat16(), latent_shape=(1, 4, 4)).float()
    assert tokenizer.module.gain.dtype == torch.bfloat16
    latents = tokenizer.encode(torch.rand(2, 1, 8, 8))
    assert latents.dtype == tokenizer.decode(latents).dtype == torch.float32


def test_a_tokenizer_moves_with_its_model():
    tokenizer = latent_tokenizer()
    assert tokenizer.to("meta", torch.bfloat16).module.gain.device.type == "meta"
    assert tokenizer.module.gain.dtype == torch.float32
