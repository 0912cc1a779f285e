"""Decoders in a whole MimoModel: microbatches, position rules, teacher forcing, images from codes."""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from megatron_mimo import MimoModel, MimoModelConfig, VisionModalitySubmodules, build_placement
from megatron_mimo.decoders import CodeInput, CodeTokenizer, DiscreteDecoder
from tests import tiny
from tests.distributed.cases import decoders as cases

SAMPLES = ("two", "edge", "none", "last")


def gradients_of(model: MimoModel, parts: list[tuple[dict, dict | None]], counts: dict) -> tuple:
    """Loss and gradients of microbatches that one step adds up."""
    model.zero_grad()
    loss = sum(cases.step(model, tokens, targets, counts) for tokens, targets in parts)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", cases.kinds())
def test_four_microbatches_of_one_give_the_gradient_of_one_of_four(kind, single_process):
    torch.manual_seed(0)
    kind = cases.kinds()[kind]
    model = cases.build(kind, tiny.language_spec())
    decoder = model.modality_submodules["images"].decoders["out"]
    cases.spread(model)
    tokens, targets = cases.batch(SAMPLES), kind.targets(4)
    counts = {
        "text": tokens["loss_mask"].sum(),
        "images/out": torch.tensor(decoder.count(targets)),
    }
    microbatches, item = [], 0
    for index, sample in enumerate(SAMPLES):
        mine = {name: value[index : index + 1] for name, value in tokens.items()}
        spans = len(cases.SPANS[sample])
        rows = cases.SPAN // decoder.rows_per_item
        part = decoder.share(targets, item * rows, (item + spans) * rows) if spans else None
        microbatches.append((mine, part))
        item += spans
    loss, whole = gradients_of(model, [(tokens, targets)], counts)
    parts_loss, parts = gradients_of(model, microbatches, counts)
    torch.testing.assert_close(parts_loss, loss)
    for name, gradient in whole.items():
        # Float32 sums in another order: 1e-5 of the largest element.
        allowed = 1e-5 * gradient.abs().max().item() + 1e-8
        torch.testing.assert_close(parts[name], gradient, atol=allowed, rtol=0)


class TwoByTwo(nn.Module):
    """A codec of 2 x 2 images of 10 grey levels."""

    def __init__(self):
        super().__init__()
        self.brightest = nn.Parameter(torch.tensor(9.0))

    def encode(self, images):
        return (images.flatten(1) * self.brightest).round().long()

    def decode(self, codes):
        return codes[:, None] / self.brightest


def code_model(**decoder) -> MimoModel:
    return MimoModel(code_config(decoder))


def code_stage() -> MimoModel:
    """The first of several pipeline stages, which has the generation input and no decoder."""
    return MimoModel(code_config({}), post_process=False)


def code_config(decoder: dict) -> MimoModelConfig:
    tokenizer = ModuleSpec(module=CodeTokenizer, params=dict(module=TwoByTwo(), grid=(2, 2)))
    params = dict(width=16, codebook_sizes=10, tokenizer=tokenizer, **decoder)
    parts = dict(
        decoders={"codes": ModuleSpec(module=DiscreteDecoder, params=params)},
        output_projections=[tiny.linear(tiny.HIDDEN, 16)],
        generation_input=cases.feed(CodeInput),
    )
    images = ModuleSpec(module=VisionModalitySubmodules, submodules=parts)
    torch.manual_seed(0)
    return tiny.mimo_config(modality_submodules={"images": images}, special_token_ids={})


def code_ids() -> torch.Tensor:
    ids = torch.arange(1, 11).repeat(2, 1)
    ids[0, 3:7] = tiny.WRITE
    ids[1, 5:9] = tiny.WRITE
    return ids


def hidden_of(model: MimoModel, codes: torch.Tensor) -> torch.Tensor:
    targets = {"images": {"codes": {"codes": codes}}}
    return model(code_ids(), modality_targets=targets)[0].modalities["images"].hidden


def test_a_code_is_predicted_from_those_before_it_alone(single_process):
    model = code_model()
    codes = torch.arange(8)
    changed = codes.clone()
    changed[1] = 9  # the second code of the first image
    moved = (hidden_of(model, codes) != hidden_of(model, changed)).any(dim=1)
    assert moved.tolist() == [False, False, True, True, False, False, False, False]


def test_the_gradient_reaches_language_model_projection_decoder_and_input(single_process):
    model = code_model()
    targets = {"images": {"codes": {"media": torch.rand(2, 1, 2, 2)}}}
    outputs, _ = model(code_ids(), modality_targets=targets)
    outputs.modalities["images"].losses["codes"].mean().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("layers.0", "output_projections", "decoders.codes.heads", "generation_input"):
        assert any(part in name for name in reached), part
    codec = [name for name, _ in model.named_parameters() if "brightest" in name]
    assert codec and not reached & set(codec)
    assert all(p.requires_grad is not (n in codec) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", cases.kinds())
def test_every_decoders_gradient_reaches_language_model_and_projection(kind, single_process):
    model = cases.build(cases.kinds()[kind], tiny.language_spec())
    cases.spread(model)
    targets = {"images": {"out": cases.kinds()[kind].targets(3)}}
    outputs, _ = model(cases.batch(("two", "edge"))["input_ids"], modality_targets=targets)
    outputs.modalities["images"].losses["out"].mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    feed = ("generation_input",) if cases.kinds()[kind].feed is not None else ()
    for part in ("layers.0.self_attention", "output_projections.0.weight", "decoders.out", *feed):
        assert any(part in name for name in reached), part


def test_media_whose_codes_do_not_match_the_tokens_are_refused(single_process):
    targets = {"images": {"codes": {"media": torch.rand(3, 1, 2, 2)}}}
    with pytest.raises(ValueError, match="images.*12"):
        code_model()(code_ids(), modality_targets=targets)


def test_images_that_would_go_on_in_the_next_sample_are_refused(single_process):
    """Two images of four codes, six tokens in one sample and two in the other."""
    ids = code_ids()
    ids[0, 2:8], ids[1] = tiny.WRITE, 1
    ids[1, 3:5] = tiny.WRITE
    targets = {"images": {"codes": {"media": torch.rand(2, 1, 2, 2)}}}
    with pytest.raises(ValueError, match="sample 0 has 6 generation tokens, but one image or clip takes 4"):
        code_model()(ids, modality_targets=targets)


def test_a_generation_token_at_a_samples_start_has_no_predecessor(single_process):
    ids = code_ids()
    ids[1] = torch.tensor([tiny.WRITE] * 4 + [1] * 6)
    with pytest.raises(ValueError, match="position 0 of sample 1 opens its sequence"):
        code_model()(ids, modality_targets={"images": {"codes": {"codes": torch.arange(8)}}})


def test_a_predecessor_never_crosses_a_packed_boundary():
    ids = torch.tensor([[1, 2, 3, 4, 9, 9, 5, 6, 9, 7]])
    starts_packed = torch.tensor([0, 4, 10], dtype=torch.int32)
    placement = build_placement(ids, {}, {"images": 9}, cu_seqlens=starts_packed)
    with pytest.raises(ValueError, match="position 4 of sample 0 opens its sequence"):
        placement.generation_positions("images", rule="predecessor")
    inside = build_placement(ids, {}, {"images": 9}, cu_seqlens=torch.tensor([0, 3, 10]).int())
    assert inside.generation_positions("images", rule="predecessor").tolist() == [3, 4, 7]


def test_an_input_that_shows_the_answer_is_refused_at_construction(single_process):
    with pytest.raises(ValueError, match="would learn to copy"):
        code_model(position_rule="own")


def test_decoding_gives_images_of_the_sampled_codes(single_process):
    model = code_model().eval()
    submodule = model.modality_submodules["images"]
    images = submodule.decode(torch.randn(8, tiny.HIDDEN), options=dict(temperature=0))
    assert images.shape == (2, 1, 2, 2)


def test_a_span_that_does_not_fill_the_image_grid_is_refused(single_process):
    decoder = code_model().modality_submodules["images"].decoders["codes"]
    with pytest.raises(ValueError, match="7 rows do not fill items of 4 tokens"):
        decoder.render(torch.zeros(7, dtype=torch.long))


def test_a_first_stage_without_the_decoder_encodes_media_itself(single_process):
    media = {"images": {"codes": {"media": torch.rand(2, 1, 2, 2)}}}
    whole = code_model().prepare(media)
    stage = code_stage()
    assert not stage.modality_submodules["images"].decoders
    first = stage.prepare(media)
    assert first["images"]["codes"].num_rows == whole["images"]["codes"].num_rows == 8
    assert torch.equal(first["images"]["codes"]["codes"], whole["images"]["codes"]["codes"])


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        ({"codes": [1] * 8}, TypeError, "codes must be a tensor, got list"),
        ({"codes": torch.zeros(8).long(), "weight": torch.ones(7)}, ValueError, "weight must have"),
    ],
)
def test_bad_targets_are_refused_before_the_language_model_runs(single_process, target, error, match):
    model = code_model()
    model.language_model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(error, match=match):
        model(code_ids(), modality_targets={"images": {"codes": target}})
