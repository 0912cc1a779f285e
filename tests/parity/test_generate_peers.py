"""Generation against `transformers`: the text of LLaVA, and the codes of Janus with guidance, of the same weights."""

import pytest
import torch
from transformers import GenerationConfig

import megatron_mimo
from megatron_mimo.generation import Writing
from tests import checkpoints
from tests.parity import test_janus
from tests.parity.test_janus import CODES, GENERATION

NEW = 12


@pytest.mark.parametrize(("tower", "language"), [("clip", "llama"), ("siglip", "qwen3")])
def test_text_about_images_is_token_for_token_llava_s(single_process, tmp_path, tower, language) -> None:
    theirs = checkpoints.llava(tower, language)
    model = megatron_mimo.from_pretrained(checkpoints.written(theirs, tmp_path / "model"))
    pixels, ids = checkpoints.images_and_ids()
    prompts, expected = [], []
    for row, length in enumerate((ids.shape[1], ids.shape[1] - 11)):  # unequal, each alone in theirs
        own, picture = ids[row : row + 1, :length], pixels[row : row + 1]
        found = theirs.generate(
            input_ids=own, attention_mask=torch.ones_like(own), pixel_values=picture, max_new_tokens=NEW,
            do_sample=False, suppress_tokens=[checkpoints.IMAGE], eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        expected.append(found[0, length:].tolist())
        prompts.append({"input_ids": own[0], "modality_inputs": {"images": {"tower": {"pixel_values": picture}}}})
    outputs = model.generate(prompts, NEW)
    assert [output.ids for output in outputs] == expected
    assert len({token for said in expected for token in said}) > 1


def test_sliding_windows_are_mistral_s(single_process, tmp_path) -> None:
    theirs = checkpoints.language_model("mistral")
    model = megatron_mimo.from_pretrained(checkpoints.written(theirs, tmp_path / "model"))
    ids = checkpoints.ids(checkpoints.WINDOW + 20)
    found = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1,
        pad_token_id=0,
    )  # fmt: skip
    outputs = model.generate([{"input_ids": row} for row in ids], NEW)
    assert [output.ids for output in outputs] == found[:, ids.shape[1] :].tolist()


PAD, BOS, BEGIN = 0, 1, 60


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_codes_with_guidance_are_janus_s(single_process, guidance) -> None:
    theirs = test_janus.janus()
    model = test_janus.mimo(theirs).eval()
    test_janus.copy_weights(theirs, model)
    text = torch.randint(2, 59, (2, 9), generator=torch.Generator().manual_seed(4))
    text[:, 0], text[:, -1] = BOS, BEGIN
    theirs.model.vision_model.config.num_image_tokens = 16
    settings = GenerationConfig(
        guidance_scale=guidance, do_sample=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=-1, max_length=64,
        generation_kwargs={"boi_token_id": BEGIN},
    )  # fmt: skip
    expected = theirs.generate(
        text, attention_mask=torch.ones_like(text), generation_mode="image", generation_config=settings
    )
    # Theirs masks everything but the first token and the one that begins the image.
    without = torch.where((text == BOS) | (text == BEGIN), text, PAD)
    prompts = [
        {
            "input_ids": [*own.tolist(), GENERATION],
            "unconditional": {"input_ids": [*null.tolist(), GENERATION]},
        }
        for own, null in zip(text, without)
    ]
    wanted = {"images": Writing(options={"temperature": 0, "guidance": guidance})}
    outputs = model.generate(prompts, 16, modalities=wanted)
    codes = torch.stack([output.parts[0].samples for output in outputs])
    assert torch.equal(codes, expected) and len(codes.unique()) > 3 and int(codes.max()) < CODES
    assert outputs[0].parts[0].value.shape == (3, 8, 8)
