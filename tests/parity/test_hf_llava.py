"""LLaVA against `transformers`, from pixels to logits: with either tower, in its three spellings, and put together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import megatron_mimo
from tests import checkpoints
from tests.checkpoints import TOLERANCE, difference
from tests.parity.test_hf_language import same_bytes, stored

KINDS = [("clip", "llama"), ("siglip", "qwen2"), ("clip", "mistral"), ("siglip", "qwen3")]


def logits(theirs) -> Tensor:
    pixels, ids = checkpoints.images_and_ids()
    with torch.no_grad():
        return theirs(input_ids=ids, pixel_values=pixels).logits


def our_logits(model) -> Tensor:
    pixels, ids = checkpoints.images_and_ids()
    with torch.no_grad():
        return model(ids, modality_inputs={"images": {"tower": {"pixel_values": pixels}}})[0]


@pytest.mark.parametrize(("tower", "language"), KINDS)
def test_from_pixels_to_logits_it_is_transformers_model_and_goes_out_as_it_came(
    single_process, tmp_path, tower, language
) -> None:
    theirs = checkpoints.llava(tower, language)
    source = checkpoints.written(theirs, tmp_path / "model")
    model = megatron_mimo.from_pretrained(source)
    assert difference(our_logits(model), logits(theirs)) < TOLERANCE
    megatron_mimo.save_pretrained(model, tmp_path / "exported")
    expected, found = stored(source), stored(tmp_path / "exported")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same_bytes(expected[name], found[name])] == []
    again, report = type(theirs).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again.eval()), logits(theirs))


def changed(directory: Path, part: str | None, change: dict) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(change)
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("tower", "part", "change"),
    [
        ("clip", "vision_config", {"hidden_act": "gelu"}),
        ("clip", "vision_config", {"layer_norm_eps": 1e-1}),
        ("clip", "vision_config", {"num_attention_heads": 2}),
        ("clip", None, {"vision_feature_layer": -3}),
        ("clip", None, {"projector_hidden_act": "relu"}),
        ("siglip", "vision_config", {"hidden_act": "relu"}),
        ("siglip", "vision_config", {"layer_norm_eps": 1e-1}),
        ("siglip", None, {"vision_feature_layer": -2}),
        ("siglip", "text_config", {"rms_norm_eps": 1e-1}),
    ],
)
def test_a_field_that_is_read_wrongly_would_be_seen(single_process, tmp_path, tower, part, change) -> None:
    theirs = checkpoints.llava(tower)
    directory = changed(checkpoints.written(theirs, tmp_path / "model"), part, change)
    assert difference(our_logits(megatron_mimo.from_pretrained(directory)), logits(theirs)) > 10 * TOLERANCE


def in_memory(name: str) -> str:
    """As transformers 5 has it in memory."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}"


def of_2024(name: str) -> str:
    """As hub files of 2024 have it."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


@pytest.mark.parametrize("spelling", [in_memory, of_2024])
def test_each_spelling_of_its_names_that_transformers_loads_is_the_same_model(
    single_process, tmp_path, spelling
) -> None:
    theirs = checkpoints.llava()
    source = checkpoints.written(theirs, tmp_path / "model")
    file = source / "model.safetensors"
    save_file({spelling(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    again, report = type(theirs).from_pretrained(source, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again.eval()), logits(theirs))
    assert difference(our_logits(megatron_mimo.from_pretrained(source)), logits(theirs)) < TOLERANCE


def test_one_gradient_step_of_every_part_is_transformers_step(single_process, tmp_path) -> None:
    theirs = checkpoints.llava("clip", "qwen2")
    model = megatron_mimo.from_pretrained(checkpoints.written(theirs, tmp_path / "model")).train()
    pixels, ids = checkpoints.images_and_ids()
    labels = ids.masked_fill(ids == checkpoints.IMAGE, -100)
    theirs.train()(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
    following = labels.roll(-1, 1)
    following[:, -1] = -100
    losses, mask = model(ids, labels=following, modality_inputs={"images": {"tower": {"pixel_values": pixels}}})
    ((losses * mask).sum() / mask.sum()).backward()
    for stepped in (theirs, model):
        torch.optim.SGD(stepped.parameters(), lr=0.1).step()
    megatron_mimo.save_pretrained(model, tmp_path / "stepped")
    again = type(theirs).from_pretrained(tmp_path / "stepped").state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-5, msg=name)  # sums in another order


# Put together of parts ----------------------------------------------------------------------------------------------


def text_directory(directory: Path, name: str = "qwen2-tied", **changes) -> Path:
    """A language model with a tokenizer of words; `changes` to its configuration."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    checkpoints.written(checkpoints.language_model(name, **changes), directory)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(90)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(directory)
    return directory


def tower_directory(directory: Path, kind: str, whole: bool) -> Path:
    """A vision tower alone, or beside its text tower."""
    config = checkpoints.tower_config(kind)
    if not whole:
        alone = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}[kind]
        return checkpoints.written(checkpoints.randomized(alone(config)), directory)
    both = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
    settings, model = both[kind]
    small |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = settings(vision_config=config.to_dict(), text_config=small)
    return checkpoints.written(checkpoints.randomized(model(config)), directory)


@pytest.mark.parametrize(
    ("tower", "whole", "name"),
    [("clip", False, "llama-2"), ("siglip", True, "qwen2-tied"), ("clip", True, "qwen3")],
)
def test_a_language_model_and_a_tower_export_as_llava_with_our_logits(
    single_process, tmp_path, tower, whole, name
) -> None:
    model = megatron_mimo.from_pretrained(
        language_model=text_directory(tmp_path / "text", name),
        encoders={"images": {"tower": tower_directory(tmp_path / "tower", tower, whole)}},
        special_tokens={"images": "<image>"},
    )
    image = model.mimo_config.special_token_ids["images"]
    assert 90 <= image < checkpoints.VOCABULARY  # a row that the tokenizer did not use
    megatron_mimo.save_pretrained(model, tmp_path / "exported")
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not any(report.values())
    pixels, ids = checkpoints.images_and_ids()
    ids = ids.clamp(max=89).masked_fill(ids == checkpoints.IMAGE, image)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, pixel_values=pixels).logits
        found = model(ids, modality_inputs={"images": {"tower": {"pixel_values": pixels}}})[0]
    assert difference(found, expected) < TOLERANCE
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for one in (tokenizer, megatron_mimo.load_processor(model)):
        assert one.convert_tokens_to_ids("<image>") == image


def test_a_full_table_grows_and_its_new_rows_are_the_mean_of_the_old(single_process, tmp_path, caplog) -> None:
    source = text_directory(tmp_path / "text", "llama-2", vocab_size=90)
    with caplog.at_level("INFO", logger="megatron_mimo.hf.assembly"):
        model = megatron_mimo.from_pretrained(
            language_model=source,
            encoders={"images": {"tower": tower_directory(tmp_path / "tower", "clip", False)}},
            special_tokens={"images": "<image>"},
        )
    assert "lacked the tokens ['<image>']; rows [90] of the embedding" in caplog.text
    table = model.language_model.embedding.word_embeddings.weight
    assert table.shape[0] == 91
    torch.testing.assert_close(table[90], table[:90].mean(0))
    megatron_mimo.save_pretrained(model, tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 91
    shutil.rmtree(source)  # what was exported stands by itself
    again = megatron_mimo.from_pretrained(tmp_path / "exported")
    assert torch.equal(again.language_model.embedding.word_embeddings.weight, table)


@pytest.mark.parametrize(
    "others", [[], ["[PAD]", "[X]"]], ids=["the token is the tokenizer's", "and more than the table"]
)
def test_rows_that_the_table_lacks_are_the_mean_of_the_old_whoever_gave_the_tokens(
    single_process, tmp_path, caplog, others
) -> None:
    source = text_directory(tmp_path / "text", "llama-2", vocab_size=90)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(others or ["<image>"])
    tokenizer.save_pretrained(source)
    with caplog.at_level("INFO", logger="megatron_mimo.hf.assembly"):
        model = megatron_mimo.from_pretrained(
            language_model=source,
            encoders={"images": {"tower": tower_directory(tmp_path / "tower", "clip", False)}},
            special_tokens={"images": "<image>"},
        )
    count = 90 + len(others) + 1
    assert f"rows {list(range(90, count))} of the embedding begin as the mean" in caplog.text
    for table in (model.language_model.embedding.word_embeddings.weight, model.language_model.output_layer.weight):
        assert table.shape[0] == count
        torch.testing.assert_close(table[90:], table[:90].mean(0).expand(count - 90, -1))
