"""Samples equal what transformers' processors make, and written media lie where the configuration says."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from megatron_mimo.assemble import patches_to_images
from megatron_mimo.data.chat import PLAIN_TEMPLATE, ChatText
from megatron_mimo.data.media import Sound, Video
from megatron_mimo.data.messages import SampleError, conversation_of
from megatron_mimo.data.positions import Constant, GridPositions
from megatron_mimo.data.readers import ImageReader, ProcessorReader, SoundReader, placeholder_of, shrunk
from megatron_mimo.data.samples import Handling, SampleProcessor
from megatron_mimo.data.writers import ImageWriter, SoundWriter
from tests import data_samples as made
from tests import tiny
from tests.unit.test_data_sources import video

SIZES = [(64, 64), (90, 40), (30, 120)]


def processor_of(family: str):
    tokenizer = made.tokenizer()
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    if family == "LLaVA":
        clip = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
        return LlavaProcessor(
            clip, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<|image_pad|>",
            num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "LLaVA-NeXT":
        tiles = LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=28, image_grid_pinpoints=[[56, 28], [28, 56]]
        )
        return LlavaNextProcessor(
            tiles, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<|image_pad|>",
            num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "Qwen3-VL":
        return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=made.CHATML)
    kind = Qwen2VLProcessor if family == "Qwen2-VL" else Qwen2_5_VLProcessor
    return kind(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=made.CHATML)


def handling_of(processor, kind: str = "image", **more) -> Handling:
    reader = ProcessorReader(processor, kind)
    return Handling(f"{kind}s", special=reader.token_id, reader=reader, **more)


def saved(tmp_path) -> list[Image.Image]:
    images = [Image.effect_noise(size, 50).convert("RGB") for size in SIZES]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    return images


@pytest.mark.parametrize("family", ["LLaVA", "LLaVA-NeXT", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_tokens_and_tensors_of_images_equal_the_whole_processors(tmp_path, family):
    images, processor = saved(tmp_path), processor_of(family)
    turns = [
        made.user(made.image("0.png"), made.text("What is it?"), made.image("1.png")),
        made.assistant(made.text("A cat")),
        made.user(made.image("2.png")),
        made.assistant(made.text("Here")),
    ]
    chat = ChatText(processor.tokenizer, placeholders={"image": placeholder_of(processor, "image")})
    sample = SampleProcessor(chat, {"image": handling_of(processor)})(conversation_of({"messages": turns}), tmp_path)
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    expected = processor(text=[text], images=images, return_tensors="pt")
    assert torch.equal(sample.input_ids, expected["input_ids"][0])
    for name, value in expected.items():
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids"):
            from megatron_mimo.data.packs import joined

            assert torch.equal(joined(sample.items)["images"]["tower"][name], value), name
    special = sample.input_ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert sum(item.rows for item in sample.items) == int(special.sum())
    assert sample.cost > 0


@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_videos_are_laid_out_as_the_processor_does_each_frame_of_qwen3_a_run(tmp_path, family):
    (tmp_path / "a.mp4").write_bytes(video(seconds=2, rate=8, size=(64, 64)))
    processor = processor_of(family)
    record = {"messages": [made.user({"type": "video", "video": "a.mp4"}), made.assistant("A cat")]}
    chat = ChatText(processor.tokenizer, placeholders={"image": "<|image_pad|>", "video": "<|video_pad|>"})
    rule = GridPositions(per_second=2.0 if family == "Qwen2.5-VL" else 0)
    process = SampleProcessor(chat, {"video": handling_of(processor, "video", rule=rule)}, sections=3)
    sample = process(conversation_of(record), tmp_path)
    (item,) = sample.items
    grid = item.tensors["tower"]["video_grid_thw"][0].tolist()
    assert grid[0] == 2  # four frames, two at a time
    assert item.rows == grid[0] * grid[1] * grid[2] // 4
    pad = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert int((sample.input_ids == pad).sum()) == item.rows
    runs = (sample.input_ids == pad).int().diff().clamp(min=0).sum()
    assert int(runs) == (grid[0] if family == "Qwen3-VL" else 1)
    times = sample.position_ids[0, sample.input_ids == pad]
    if family == "Qwen2.5-VL":  # two frames a patch at two a second: one second a patch, two positions a second
        assert times.unique().diff().tolist() == [2]


def test_sounds_of_unequal_length_have_rows_by_their_length():
    extractor = WhisperFeatureExtractor(feature_size=8)
    reader = SoundReader(
        extractor,
        rows=lambda frames: frames // 2,
        keywords={"input_features": "features"},
        options={"padding": "longest"},
    )
    assert reader.rate == 16000
    short, long = (reader(Sound(torch.ones(count).numpy(), 16000)) for count in (1600, 4800))
    assert (short.rows, long.rows) == (5, 15)
    assert list(short.inputs["tower"]) == ["features"]
    masked = SoundReader(extractor, rows=lambda frames: frames // 2, options={"return_attention_mask": True})
    assert masked(Sound(torch.ones(4800).numpy(), 16000)).rows == 15  # of what is no padding up to 30 s
    with pytest.raises(SampleError, match="too short"):
        SoundReader(rate=16000, rows=lambda samples: 0)(Sound(torch.ones(3).numpy(), 16000))
    with pytest.raises(ValueError, match="needs a rate"):
        SoundReader(rows=len)


def test_images_are_written_as_the_patches_that_make_them_up():
    pixels = torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8)
    writing = ImageWriter("pixels", size=(4, 6), rows=6, span=(0.0, 1.0), patch=2)(Image.fromarray(pixels.numpy()))
    made = patches_to_images(writing.targets["pixels"]["target"], (3, 4, 6))
    torch.testing.assert_close(made[0], pixels.permute(2, 0, 1) / 255)
    with pytest.raises(ValueError, match="do not cut 4 x 6 into 5 rows"):
        ImageWriter("pixels", size=(4, 6), rows=5, patch=2)


def test_images_are_shrunk_to_the_pixels_that_a_reader_takes():
    image = Image.new("RGB", (200, 50))
    assert shrunk(image, None) is image and shrunk(image, 10_000) is image
    assert shrunk(image, 2500).size == (100, 25)
    reader = ImageReader(Qwen2VLImageProcessor(min_pixels=56 * 56), merge=2, max_pixels=2500)
    assert reader(image).grids == ((1, 1, 4),)


def test_pixels_come_in_the_dtype_that_is_asked_for():
    image = Image.effect_noise((40, 40), 50).convert("RGB")
    plain, half = (
        ImageReader(Qwen2VLImageProcessor(), merge=2, dtype=dtype)(image).inputs["tower"]
        for dtype in (None, torch.bfloat16)
    )
    assert half["pixel_values"].dtype == torch.bfloat16 and half["image_grid_thw"].dtype == torch.long
    assert torch.equal(half["pixel_values"], plain["pixel_values"].bfloat16())


def test_an_image_reader_needs_to_know_its_rows():
    clip = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    with pytest.raises(ValueError, match="say how many rows"):
        ImageReader(clip)(Image.new("RGB", (28, 28)))
    reading = ImageReader(clip, rows=4, encoder="clip", keywords={"pixel_values": "images"})(Image.new("RGB", (28, 28)))
    assert reading.rows == 4 and reading.inputs["clip"]["images"].shape == (1, 3, 28, 28)


def test_a_processor_without_a_placeholder_of_the_kind_is_refused():
    with pytest.raises(ValueError, match="reads no audio"):
        ProcessorReader(processor_of("LLaVA"), "audio")


# Written media ----------------------------------------------------------------------------------


def drawn(tmp_path, parts: list, template: str = PLAIN_TEMPLATE, sections: int = 1, **changes):
    saved(tmp_path)
    process = made.processor(template, sections=sections, **changes)
    return process(conversation_of({"messages": [made.user(made.text("Draw")), made.assistant(*parts)]}), tmp_path)


def around(sample, id: int) -> list[int]:
    """What stands before and behind each run of an id."""
    ids = sample.input_ids.tolist()
    edges = [at for at in range(1, len(ids)) if (ids[at] == id) != (ids[at - 1] == id)]
    return [(ids[start - 1], ids[stop]) for start, stop in zip(edges[::2], edges[1::2])]


def test_a_written_medium_has_its_begin_token_its_span_and_its_end_token(tmp_path):
    known = made.ids(made.tokenizer())
    begin, end, draw = known["<boi>"], known["<eoi>"], known["<draw>"]
    sample = drawn(tmp_path, [made.text("Here"), made.image("0.png")], begin=(begin,), end=(end,))
    assert around(sample, draw) == [(begin, end)]
    (item,) = sample.items
    assert (item.written, item.rows, item.learn) == (True, 4, True)
    assert sample.input_ids[item.start : item.start + 4].tolist() == [draw] * 4
    # Begin and end are text that the language model learns; the span is the decoder's.
    assert sample.learn[item.start - 1] and sample.learn[item.start + 4]
    assert not sample.learn[item.start : item.start + 4].any()


def test_begin_and_end_tokens_are_those_of_the_model(tmp_path):
    tokenizer = made.tokenizer()
    known = made.ids(tokenizer)
    config = tiny.mimo_config(
        tiny.language_spec(vocab_size=512),
        special_token_ids={"images": known["<|image_pad|>"], "audio": tiny.HEAR},
        generation_token_ids={"images": known["<draw>"]},
        begin_token_ids={"images": known["<boi>"]},
        end_token_ids={"images": known["<eoi>"]},
    )
    writer = ImageWriter("pixels", size=(4, 4), rows=4)
    handling = Handling.of(config, "images", reader=made.Patches(), writer=writer, whole=True)
    process = SampleProcessor(ChatText(tokenizer, template=PLAIN_TEMPLATE), {"image": handling})
    (tmp_path / "0.png").write_bytes(made.png())
    record = {"messages": [made.user(made.image("0.png")), made.assistant(made.text("Here"), made.image("0.png"))]}
    sample = process(conversation_of(record), tmp_path)
    assert around(sample, known["<draw>"]) == [(known["<boi>"], known["<eoi>"])]
    assert (sample.input_ids == known["<|image_pad|>"]).sum() == 4 and all(item.whole for item in sample.items)
    # What sees the whole of itself is the model's to say too.
    whole = replace(config, whole_spans=["images"])
    assert Handling.of(whole, "images", reader=made.Patches()).whole
    assert not Handling.of(config, "images", reader=made.Patches()).whole
    # A modality that is read alone begins and ends nothing.
    assert Handling.of(config, "images", reader=made.Patches()).begin == ()
    with pytest.raises(ValueError, match="a writer needs the model's generation_token_ids\\['audio'\\]"):
        Handling.of(config, "audio", writer=writer)
    with pytest.raises(ValueError, match="expected a modality of .*'audio', 'images'.*, found 'video'"):
        Handling.of(config, "video", reader=made.Patches())


def test_without_a_begin_token_the_first_generation_token_is_learned(tmp_path):
    sample = drawn(tmp_path, [made.image("0.png")])
    assert sample.learn[sample.items[0].start : sample.items[0].start + 4].tolist() == [True, False, False, False]


def test_a_written_medium_that_is_not_learned_opens_nothing_and_weighs_nothing(tmp_path):
    known = made.ids(made.tokenizer())
    for changes in ({}, {"begin": (known["<boi>"],), "end": (known["<eoi>"],)}):
        sample = drawn(tmp_path, [made.text("Here"), made.image("0.png", learn=False)], **changes)
        (item,) = sample.items
        assert not item.learn
        assert not sample.learn[item.start - len(changes) // 2 : item.start + 4 + len(changes) // 2].any()


def test_a_reread_medium_is_read_behind_its_written_span(tmp_path):
    known = made.ids(made.tokenizer())
    around_reading = {"read_begin": (known["<|vision_start|>"],), "read_end": (known["<|vision_end|>"],)}
    sample = drawn(tmp_path, [made.image("0.png"), made.text("Here")], reread=True, **around_reading)
    assert [item.written for item in sample.items] == [True, False]
    assert sample.items[1].start == sample.items[0].start + 4 + 1
    assert around(sample, known["<|image_pad|>"]) == [(known["<|vision_start|>"], known["<|vision_end|>"])]
    assert not sample.learn[sample.items[1].start : sample.items[1].start + sample.items[1].length].any()


def test_written_grids_have_positions_of_their_own(tmp_path):
    writer = ImageWriter("pixels", size=(4, 4), rows=4, grid=(2, 2))
    sample = drawn(tmp_path, [made.image("0.png")], sections=3, writer=writer, rule=GridPositions())
    start = sample.items[0].start
    assert (sample.position_ids[:, start : start + 4] - start).tolist() == [[0] * 4, [0, 0, 1, 1], [0, 1, 0, 1]]
    sample = drawn(tmp_path, [made.image("0.png")], rule=Constant())
    assert sample.delta == -3


def test_written_targets_are_scaled_and_padded():
    target = ImageWriter("pixels", size=(2, 4), rows=1, span=(0.0, 1.0), channels=1)(Image.new("RGB", (8, 8), "white"))
    assert target.targets["pixels"]["media"].shape == (1, 1, 2, 4) and (target.targets["pixels"]["media"] == 1).all()
    clip = SoundWriter("bands", samples=8, rate=100, rows=2)
    media = clip(Sound(torch.ones(5).numpy(), 100)).targets["bands"]["media"]
    assert media.tolist() == [[1] * 5 + [0] * 3]
    with pytest.raises(SampleError, match="at most 8 samples to write"):
        clip(Sound(torch.ones(9).numpy(), 100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageWriter("x", size=(2, 2), rows=4, channels=2), "1 or 3"),
        (lambda: ImageWriter("x", size=(2, 2), rows=4, grid=(2, 3)), "has not 4 rows"),
        (lambda: Handling("images", special=1), "reader and a special token"),
        (lambda: Handling("images", generation=1), "writer and a generation token"),
        (lambda: Handling("images", reread=True), "reread needs"),
        (lambda: SampleProcessor(ChatText(made.tokenizer()), {"smell": Handling("x")}), "expected some of"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("turns", "changes", "kind"),
    [
        ([made.user({"type": "audio", "audio": "x.wav"})], {}, "media"),
        ([made.user(made.image("0.png"))], {"reader": None, "special": None}, "media"),
        ([made.user("a"), made.assistant(made.image("0.png"))], {"writer": None, "generation": None}, "media"),
        ([made.user(made.image("0.png"), made.image("1.png"))], {"max_items": 1}, "too_many"),
    ],
)
def test_media_that_the_model_has_no_use_for_are_refused_unopened(turns, changes, kind):
    with pytest.raises(SampleError) as caught:
        made.processor(**changes)(conversation_of({"messages": turns}))
    assert caught.value.kind == kind


def test_videos_and_frames_are_what_they_say():
    frames = Video(torch.zeros(4, 8, 8, 3, dtype=torch.uint8).numpy(), 2.0)
    assert ProcessorReader(processor_of("Qwen2-VL"), "video")(frames).rows > 0
