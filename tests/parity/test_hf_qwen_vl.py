"""Qwen2-VL and Qwen2.5-VL against `transformers`, from files to logits: one sample, packed, exported, one step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import megatron_mimo
from megatron_mimo.data.media import open_video
from megatron_mimo.data.messages import Medium, conversation_of
from megatron_mimo.data.packing import PackShape
from megatron_mimo.data.packs import packed, padded
from megatron_mimo.data.samples import Sample
from megatron_mimo.training.pretraining.packs import sample_processor
from megatron_mimo.training.sources import batch_of
from tests import checkpoints, tiny
from tests import data_samples as made
from tests.checkpoints import TOLERANCE, difference
from tests.parity.test_hf_language import same_bytes, stored
from tests.unit.test_data_sources import video

HIDDEN, VOCABULARY = 32, 512
SIZES = [(40, 24), (16, 16), (20, 60)]
KINDS = ["qwen2_vl", "qwen2_5_vl"]
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": dict(depth=2, num_heads=4, embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2),
    "qwen2_5_vl": dict(
        depth=2, num_heads=4, hidden_size=32, intermediate_size=40, out_hidden_size=HIDDEN, fullatt_block_indexes=[1],
        window_size=16,
    ),
}  # fmt: skip


def model_of(kind: str, tied: bool = False) -> Any:
    known = made.ids(made.tokenizer())
    text = dict(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
    )  # fmt: skip
    config, model = {
        "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    }[kind]
    tower = TOWERS[kind] | dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    return checkpoints.randomized(
        model(
            config(
                text_config=text, vision_config=tower, image_token_id=known["<|image_pad|>"],
                video_token_id=known["<|video_pad|>"], vision_start_token_id=known["<|vision_start|>"],
                vision_end_token_id=known["<|vision_end|>"], tie_word_embeddings=tied,
            )
        )
    )  # fmt: skip


def processor_of(kind: str) -> Any:
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 40)
    whole = transformers.Qwen2VLProcessor if kind == "qwen2_vl" else transformers.Qwen2_5_VLProcessor
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 20)
    return whole(images, made.tokenizer(), videos, chat_template=made.CHATML)


def files(directory: Path, kind: str, tied: bool = False) -> tuple[Any, Path]:
    """A model of transformers, and the directory with its weights and its processor."""
    theirs = model_of(kind, tied)
    checkpoints.written(theirs, directory)
    processor_of(kind).save_pretrained(directory)
    return theirs, directory


def records(root: Path) -> list[dict]:
    """Conversations with no image, one, and two of other sizes, whose files are in `root`."""
    for number, size in enumerate(SIZES):
        (root / f"{number}.png").write_bytes(made.png(*size, seed=number))
    asked = [[made.image("0.png")], [], [made.image("1.png"), made.text("and"), made.image("2.png")]]
    said = made.assistant(made.text("a cat"))
    return [{"messages": [made.user(*parts, made.text("What is it")), said]} for parts in asked]


def their_logits(theirs: Any, processor: Any, record: dict, root: Path) -> Tensor:
    """Of the conversation as transformers' own processor reads it, `[1, S, V]`."""

    def found(part: dict) -> dict:
        return part | {"image": str(root / part["image"])} if "image" in part else part

    messages = [{**turn, "content": [found(part) for part in turn["content"]]} for turn in record["messages"]]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        return theirs(**inputs).logits


def samples_of(model: Any, root: Path) -> list[Sample]:
    process = sample_processor(megatron_mimo.load_processor(model), model.mimo_config)
    return [process(conversation_of(record), root) for record in records(root)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_from_files_are_transformers_alone_and_packed(single_process, tmp_path, kind) -> None:
    theirs, directory = files(tmp_path / "model", kind)
    model = megatron_mimo.from_pretrained(directory)
    samples = samples_of(model, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    expected = [their_logits(theirs, processor, record, tmp_path) for record in records(tmp_path)]

    def ours(pack: Any) -> Tensor:
        given: Any = {name: value for name, value in batch_of(pack).items() if name not in ("labels", "loss_mask")}
        with torch.no_grad():
            return model(**given)[0]

    for sample, logits in zip(samples, expected, strict=True):
        found = ours(padded([sample], len(sample)))
        assert difference(found, logits) < TOLERANCE
    together = packed(samples, PackShape(length=128, multiple=4))
    found = ours(together)
    for start, sample, logits in zip(together.cu_seqlens_padded.tolist(), samples, expected):
        assert difference(found[:, start : start + len(sample)], logits) < TOLERANCE


RATE = 2.0  # frames a second


def with_videos(root: Path) -> list[dict]:
    """A video of five frames at that rate, and one of four behind an image."""
    for name, seconds in (("a.mp4", 2.4), ("b.mp4", 2.0)):
        (root / name).write_bytes(video(seconds, rate=10, size=(24, 16)))
    shown = [{"type": "video", "video": name} for name in ("a.mp4", "b.mp4")]
    asked = [[shown[0]], [made.image("0.png"), made.text("and"), shown[1], made.text("then"), shown[0]]]
    said = made.assistant(made.text("a cat"))
    return [{"messages": [made.user(*parts, made.text("What is it")), said]} for parts in asked]


def their_inputs(processor: Any, record: dict, root: Path) -> dict[str, Tensor]:
    """As transformers' own processor makes them of the same frames."""
    media = [part for turn in record["messages"] for part in turn["content"] if part["type"] != "text"]
    films = [open_video(Medium(path=part["video"]), RATE, root) for part in media if "video" in part]
    frames = [torch.from_numpy(film.frames).permute(0, 3, 1, 2) for film in films]
    images = [Image.open(root / part["image"]) for part in media if "image" in part] or None
    told = [
        dict(total_num_frames=len(each), fps=RATE, duration=len(each) / RATE, frames_indices=list(range(len(each))))
        for each in frames
    ]
    text = processor.apply_chat_template(record["messages"], tokenize=False)
    return dict(
        processor(
            text=[text], images=images, videos=frames, video_metadata=told, do_sample_frames=False, fps=RATE,
            return_tensors="pt",
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_videos_from_files_to_logits_are_transformers_alone_and_packed(single_process, tmp_path, kind) -> None:
    theirs, directory = files(tmp_path / "model", kind)
    model = megatron_mimo.from_pretrained(directory)
    processor = transformers.AutoProcessor.from_pretrained(directory)
    records(tmp_path)
    process = sample_processor(megatron_mimo.load_processor(model), model.mimo_config)
    samples = [process(conversation_of(record), tmp_path) for record in with_videos(tmp_path)]
    inputs = [their_inputs(processor, record, tmp_path) for record in with_videos(tmp_path)]
    expected = []
    for sample, given in zip(samples, inputs, strict=True):
        steps = given.get("second_per_grid_ts")
        assert (steps is not None) == (kind == "qwen2_5_vl")
        timed = {} if steps is None else {"second_per_grid_ts": torch.as_tensor(steps)}
        positions, delta = theirs.model.get_rope_index(
            given["input_ids"], mm_token_type_ids=given["mm_token_type_ids"], video_grid_thw=given["video_grid_thw"],
            image_grid_thw=given.get("image_grid_thw"), **timed,
        )  # fmt: skip
        assert torch.equal(sample.position_ids, positions[:, 0]) and sample.delta == int(delta)
        assert int(given["video_grid_thw"][0, 0]) == 3 - (len(given["video_grid_thw"]) == 2)
        with torch.no_grad():
            expected.append(theirs(**given).logits)

    def ours(pack: Any) -> Tensor:
        given: Any = {name: value for name, value in batch_of(pack).items() if name not in ("labels", "loss_mask")}
        with torch.no_grad():
            return model(**given)[0]

    for sample, logits in zip(samples, expected, strict=True):
        assert difference(ours(padded([sample], len(sample))), logits) < TOLERANCE
    together = packed([*samples, samples_of(model, tmp_path)[0]], PackShape(length=256, multiple=4))
    found = ours(together)
    for start, sample, logits in zip(together.cu_seqlens_padded.tolist(), samples, expected):
        assert difference(found[:, start : start + len(sample)], logits) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_out_as_it_came(single_process, tmp_path, kind, tied) -> None:
    theirs, source = files(tmp_path / "model", kind, tied)
    megatron_mimo.save_pretrained(megatron_mimo.from_pretrained(source), tmp_path / "exported")
    expected, found = stored(source), stored(tmp_path / "exported")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same_bytes(expected[name], found[name])] == []
    again, report = type(theirs).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "exported")
    record = records(tmp_path)[0]
    assert torch.equal(
        their_logits(again.eval(), processor, record, tmp_path), their_logits(theirs, processor, record, tmp_path)
    )


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_config", {"rms_norm_eps": 1e-1}),
        ("text_config", {"rope_parameters": dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])}),
        ("text_config", {"rope_parameters": dict(rope_type="default", rope_theta=1e2, mrope_section=[1, 1, 2])}),
        ("vision_config", {"num_heads": 2}),
        ("vision_config", {"fullatt_block_indexes": []}),
    ],
)
def test_a_field_that_is_read_wrongly_would_be_seen(single_process, tmp_path, part, change) -> None:
    theirs, directory = files(tmp_path / "model", "qwen2_5_vl")
    processor, record = transformers.AutoProcessor.from_pretrained(directory), records(tmp_path)[2]
    config = json.loads((directory / "config.json").read_text())
    config[part].update(change)
    (directory / "config.json").write_text(json.dumps(config))
    model = megatron_mimo.from_pretrained(directory)
    sample = samples_of(model, tmp_path)[2]
    given: Any = batch_of(padded([sample], len(sample)))
    with torch.no_grad():
        found = model(**{name: given[name] for name in ("input_ids", "position_ids", "modality_inputs")})[0]
    assert difference(found, their_logits(theirs, processor, record, tmp_path)) > 10 * TOLERANCE


def test_the_spelling_of_memory_is_the_same_model_and_what_is_not_covered_is_told(single_process, tmp_path) -> None:
    _, source = files(tmp_path / "model", "qwen2_vl")
    expected = megatron_mimo.from_pretrained(source).state_dict()
    file = source / "model.safetensors"
    named = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(named, file, {"format": "pt"})
    found = megatron_mimo.from_pretrained(source).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if isinstance(tensor, Tensor))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0}
    (source / "config.json").write_text(json.dumps(config))
    named["model.visual.merger.extra"] = torch.zeros(3)
    del named["model.visual.merger.ln_q.bias"]
    save_file(named, file, {"format": "pt"})
    with pytest.raises(ValueError, match="found 3 differences") as told:
        megatron_mimo.from_pretrained(source)
    for line in ("rope_type 'default'", "visual. surplus: merger.extra", "visual. missing: merger.ln_q.bias"):
        assert line in str(told.value)


def test_one_gradient_step_of_every_part_is_transformers_step(single_process, tmp_path) -> None:
    theirs, directory = files(tmp_path / "model", "qwen2_5_vl")
    model = megatron_mimo.from_pretrained(directory).train()
    sample = samples_of(model, tmp_path)[2]
    pack = padded([sample], len(sample))
    pixels = pack.modality_inputs["images"]["tower"]
    kinds = (pack.input_ids == model.mimo_config.special_token_ids["images"]).int()
    labels = torch.where(sample.learn, sample.input_ids, -100)[None]
    theirs.train()(input_ids=pack.input_ids, labels=labels, mm_token_type_ids=kinds, **pixels).loss.backward()
    given: Any = batch_of(pack)
    losses, mask = model(**given)
    ((losses * mask).sum() / mask.sum()).backward()
    for stepped in (theirs, model):
        torch.optim.SGD(stepped.parameters(), lr=0.1).step()
    megatron_mimo.save_pretrained(model, tmp_path / "stepped")
    again = type(theirs).from_pretrained(tmp_path / "stepped").state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-5, msg=name)  # sums in another order


def test_a_model_with_added_parts_has_no_class_of_transformers(single_process, tmp_path) -> None:
    _, directory = files(tmp_path / "model", "qwen2_vl")
    config = megatron_mimo.pretrained_config(directory)
    more = replace(config, modality_submodules={**config.modality_submodules, "audio": tiny.audio_spec()},
                   special_token_ids={**config.special_token_ids, "audio": tiny.HEAR})  # fmt: skip
    model = megatron_mimo.from_pretrained(directory, config=more)
    with pytest.raises(ValueError, match="with its own parts alone, found \\['audio/input_projections', 'audio'\\]"):
        megatron_mimo.save_pretrained(model, tmp_path / "exported")


def test_a_model_of_ones_own_with_other_sections_is_told(single_process, tmp_path) -> None:
    _, directory = files(tmp_path / "model", "qwen2_vl")
    config = megatron_mimo.pretrained_config(directory)
    config.language_config.mrope_section = [2, 1, 1]
    with pytest.raises(ValueError, match=r"mrope_section is \[2, 1, 1\] in the model, expected \[1, 1, 2\]"):
        megatron_mimo.from_pretrained(directory, config=config)
