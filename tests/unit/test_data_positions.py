"""Positions by modality equal those of transformers' models, row for row, on drawn mixtures of text and media."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mimo.data.positions import Constant, GridPositions, Sequential, Span, TimeAligned, positions

IMAGE, VIDEO, START, END, AUDIO, AUDIO_START, AUDIO_END = 101, 102, 103, 104, 105, 106, 107
TRIALS = 20


def number(draw: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=draw))


def drawn(draw: torch.Generator, kinds: list[str], merge: int) -> tuple[list[int], list[tuple]]:
    """Ids of a drawn sample, and its media: (kind, start, grid before merging, step)."""
    ids = [1] * number(draw, 1, 5)
    media = []
    for _ in range(number(draw, 1, 4)):
        kind = kinds[number(draw, 0, len(kinds) - 1)]
        t = 1 if kind == "image" else number(draw, 1, 12)
        grid = (t, merge * number(draw, 1, 4), merge * number(draw, 1, 4))
        step = 1.0 if kind == "image" else [0.5, 1.0, 2.0][number(draw, 0, 2)]
        ids.append(START)
        media.append((kind, len(ids), grid, step))
        ids += [IMAGE if kind == "image" else VIDEO] * (t * grid[1] * grid[2] // merge**2) + [END]
        ids += [1] * number(draw, 0, 4)
    return ids, media


def oracle(family: str, **config):
    """`get_rope_index` of a family without building its model."""
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["x"])
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "glm4v": "Glm4v"}[family]
    kind = getattr(module, f"{name}Model")
    model = object.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, temporal_patch_size=2, **config))
    return model.get_rope_index


def spans_of(media: list[tuple], rule: GridPositions, merge: int) -> list[Span]:
    return [
        Span(start, t * h * w // merge**2, rule, (t, h // merge, w // merge), step)
        for _, start, (t, h, w), step in media
    ]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_grids_equal_transformers_on_drawn_mixtures(family):
    draw = torch.Generator().manual_seed(3)
    timed = family == "qwen2_5_vl"
    index = oracle(family, **({"tokens_per_second": 4} if timed else {}))
    for _ in range(TRIALS):
        # Qwen3-VL and GLM write a timestamp before each frame, so that a video is a row of images for its positions.
        ids, media = drawn(draw, ["image"] if family in ("qwen3_vl", "glm4v") else ["image", "video"], merge=2)
        grids = {kind: [grid for one, _, grid, _ in media if one == kind] for kind in ("image", "video")}
        steps = [step for kind, _, _, step in media if kind == "video"]
        kinds = torch.tensor([{IMAGE: 1, VIDEO: 2}.get(id, 0) for id in ids])
        expected, delta = index(
            torch.tensor([ids]),
            mm_token_type_ids=kinds[None],
            image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
            video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
            **({"second_per_grid_ts": torch.tensor(steps)} if timed and steps else {}),
        )
        rule = GridPositions(per_second=4 if timed else 0)
        spans = spans_of(media, rule, merge=2)
        found, ours = positions(len(ids), spans, 3)
        assert torch.equal(found, expected[:, 0]), (family, media)
        assert ours == int(delta)


def omni():
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
        Qwen2_5OmniPreTrainedModelForConditionalGeneration,
    )

    model = object.__new__(Qwen2_5OmniPreTrainedModelForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.spatial_merge_size = 2
    model.config = SimpleNamespace(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=START,
        audio_start_token_id=AUDIO_START,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    return model.get_rope_index


def test_grids_and_sounds_equal_qwen_omnis_on_drawn_mixtures():
    draw = torch.Generator().manual_seed(4)
    rule = GridPositions(per_second=25, past_time=True)
    for _ in range(TRIALS):
        ids, media = drawn(draw, ["image", "video"], merge=2)
        rows = number(draw, 1, 30)
        ids += [1, AUDIO_START, *[AUDIO] * rows, AUDIO_END, 1]
        grids = {kind: [grid for one, _, grid, _ in media if one == kind] for kind in ("image", "video")}
        steps = [step for kind, _, _, step in media if kind == "video"]
        expected, delta = omni()(
            torch.tensor([ids]),
            image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else torch.empty(0, 3, dtype=torch.long),
            video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else torch.empty(0, 3, dtype=torch.long),
            audio_seqlens=torch.tensor([4 * rows]),  # the frames that leave so many rows
            second_per_grids=torch.tensor(steps),
        )
        found, ours = positions(len(ids), spans_of(media, rule, merge=2), 3)
        assert torch.equal(found, expected[:, 0]), media
        assert ours == int(delta)


def test_a_video_with_its_sound_equals_qwen_omnis():
    draw = torch.Generator().manual_seed(5)
    for _ in range(TRIALS):
        t, h, w = number(draw, 1, 8), number(draw, 1, 3), number(draw, 1, 3)
        rows, step = number(draw, 10, 200), 1.0
        # Chunks of two seconds: the frames of each, then the sound of each, as the model's processor writes them.
        order, shown, heard = [], 0, 0
        while shown < t or heard < rows:
            frames = [at for at in range(shown, t) if at * step * 25 < 50 * (len(order) // 2 + 1)]
            order += [[False] * (len(frames) * h * w), [True] * min(50, rows - heard)]
            shown, heard = shown + len(frames), heard + len(order[-1])
        sounds = tuple(flag for chunk in order for flag in chunk)
        ids = [1, 1, START, AUDIO_START, *[AUDIO if flag else VIDEO for flag in sounds], AUDIO_END, END, 1, 1]
        expected, delta = omni()(
            torch.tensor([ids]),
            video_grid_thw=torch.tensor([[t, 2 * h, 2 * w]]),
            audio_seqlens=torch.tensor([4 * rows]),
            second_per_grids=torch.tensor([step]),
            use_audio_in_video=True,
        )
        begin, end = Span(2, 2, Constant()), Span(4 + len(sounds), 2, Constant())
        both = Span(4, len(sounds), TimeAligned(), (t, h, w), step, sounds)
        found, ours = positions(len(ids), [begin, both, end], 3)
        assert torch.equal(found, expected[:, 0]), (t, h, w, rows)
        assert ours == int(delta)


def test_text_alone_counts_on_in_every_section():
    found, delta = positions(4, [], 3)
    assert torch.equal(found, torch.arange(4).expand(3, -1)) and delta == 0


def test_a_medium_of_one_position_takes_one_and_a_sequential_one_as_many_as_it_has():
    spans = [Span(1, 3, Constant()), Span(5, 2, Sequential())]
    assert positions(8, spans)[0].tolist() == [[0, 1, 1, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("span", "sections", "message"),
    [
        (Span(0, 4, GridPositions(), (1, 2, 2)), 1, "expected 3 sections"),
        (Span(0, 4, GridPositions(), (1, 2, 3)), 3, "does not fit the grid"),
        (Span(0, 4, GridPositions()), 3, "does not fit the grid"),
        (Span(0, 4, TimeAligned(), (1, 2, 2)), 3, "must say of each position"),
        (Span(2, 9, Sequential()), 1, "within the sample's 4 tokens"),
    ],
)
def test_spans_that_do_not_fit_are_refused(span, sections, message):
    with pytest.raises(ValueError, match=message):
        positions(4, [span], sections)
