"""Generation between training steps changes nothing of the training, and shows and measures what it should."""

import pytest
import torch

from megatron_mimo.generation import Writing, gap_of, rollout
from megatron_mimo.training import Samples
from tests import writing
from tests.generating import model_of, prompts
from tests.unit.test_training_trainer import one_batch, trainer


class Board:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def add_text(self, tag, text, step):
        self.calls.append((tag, text, step))

    def add_image(self, tag, image, step):
        self.calls.append((tag, tuple(image.shape), step))

    def add_audio(self, tag, sound, step, rate):
        self.calls.append((tag, tuple(sound.shape), step, rate))


def test_samples_are_shown_at_every_evaluation_and_training_goes_on_as_without_them(single_process, tmp_path):
    board = Board()
    shown = Samples(prompts(), 4, {"modalities": ()}, directory=tmp_path / "samples", board=board)
    histories, weights = [], None
    for samples in (None, shown):
        ours = trainer(single_process, steps=4, evaluate_every=2)
        weights = weights or {name: one.clone() for name, one in ours.models[0].state_dict().items() if one is not None}
        ours.models[0].load_state_dict(weights, strict=False)
        ours.samples = samples
        histories.append(ours.train(one_batch, evaluation=one_batch))
    assert [r.losses for r in histories[0].steps] == [r.losses for r in histories[1].steps]
    assert histories[0].evaluations == histories[1].evaluations
    folders = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert folders == ["step_00000002", "step_00000004"]
    texts = sorted(path.name for path in (tmp_path / "samples/step_00000004").iterdir())
    assert texts == ["0-0.txt", "1-0.txt", "2-0.txt", "3-0.txt"]
    assert [call[2] for call in board.calls] == [2] * 4 + [4] * 4
    last = ours.generate(prompts(), 4, modalities=())
    assert [call[1] for call in board.calls[4:]] == [" ".join(map(str, output.ids)) for output in last]
    assert all(chunk.training for chunk in ours.chunks)
    assert ours.generate([], 4) == []
    with pytest.raises(ValueError, match="expected stream=False"):
        ours.generate(prompts(), 4, stream=True)


def test_pictures_and_sounds_go_to_the_board():
    from megatron_mimo.generation import GenerationOutput, MediaPart

    board, none = Board(), torch.zeros(0)
    parts = [
        MediaPart("image", "images", "out", [1], torch.zeros(3, 4, 5), none),
        MediaPart("audio", "audio", "out", [1], torch.zeros(7), none),
    ]
    run = type("FirstRank", (), {"rank": 0})
    Samples([], board=board, sampling_rate=8000).take(lambda *a, **k: [GenerationOutput(parts=parts)], 3, run)
    assert board.calls == [("samples/0/0-image", (3, 4, 5), 3), ("samples/0/1-audio", (1, 7), 3, 8000)]
    other = type("OtherRank", (), {"rank": 1})
    Samples([], board=board).take(lambda *a, **k: [GenerationOutput(parts=parts)], 3, other)
    assert len(board.calls) == 2


def test_samples_that_nobody_would_see_are_refused():
    with pytest.raises(ValueError, match="expected a directory or a board, found neither"):
        Samples(prompts())
    with pytest.raises(ValueError, match="expected no option 'stream'"):
        Samples(prompts(), options={"stream": True}, directory="out")


def test_a_model_answers_from_a_checkpoint_as_it_did_when_it_was_saved(single_process, tmp_path):
    ours = trainer(single_process, steps=2, directory=tmp_path)
    ours.train(one_batch)
    other = trainer(single_process, steps=3, directory=tmp_path)
    answers = [output.ids for output in ours.generate(prompts(), 6, modalities=())]
    other.load()
    assert [output.ids for output in other.generate(prompts(), 6, modalities=())] == answers


def test_a_rollout_gives_ids_log_probabilities_and_the_gap_to_training(single_process):
    model = model_of("groups").train()
    taken = rollout(model, prompts()[:3], answers=2, max_new_tokens=[3, 6, 5], temperature=0.7, seed=4, modalities=())
    assert taken.prompts.tolist() == [0, 0, 1, 1, 2, 2] and taken.mask.sum(1).tolist() == [3, 3, 6, 6, 5, 5]
    assert taken.ids.shape == taken.logprobs.shape == (6, 6) and model.training
    assert not torch.equal(taken.ids[2], taken.ids[3])  # another seed
    single = model.generate([prompts()[1]], 6, temperature=0.7, seed=[4 + 1 * 2 + 1], modalities=())[0]
    assert taken.ids[3].tolist() == single.ids
    torch.testing.assert_close(taken.sampling_logprobs[3], single.sampling_logprobs, atol=1e-5, rtol=0)
    # Temperature alone tells the two apart, where nothing narrows the choice.
    assert (taken.logprobs - taken.sampling_logprobs)[taken.mask].abs().max() > 0.01
    assert 0 < taken.gap.largest < 1e-4 and taken.gap.mean <= taken.gap.largest and taken.gap.tokens == 28
    torch.testing.assert_close(taken.logprobs, taken.training_logprobs, atol=1e-4, rtol=0)
    assert (taken.logprobs[~taken.mask] == 0).all()


def test_the_gap_is_that_of_the_two_log_probabilities():
    gap = gap_of(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]))
    assert (gap.mean, gap.largest, gap.tokens) == (0.5, 1.0, 2)
    assert gap.kl == pytest.approx((2.718281828 - 2) / 2)
    assert gap_of(torch.zeros(0), torch.zeros(0)).tokens == 0


def test_rollouts_write_modalities_too_and_count_their_text_alone(single_process):
    model = writing.model_of("codes", end=None)
    asked = [{"input_ids": [*prompt["input_ids"], writing.BEGIN]} for prompt in writing.prompts()]
    taken = rollout(model, asked, max_new_tokens=7, modalities={"images": Writing(rows=writing.ROWS)})
    assert taken.mask.sum(1).max() <= 7 - writing.ROWS
    assert all(output.parts[0].kind == "image" for output in taken.outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(answers=0), "answers: expected an integer of at least 1, found 0"),
        (dict(rescore=False), r"rollout: expected no \['rescore'\]"),
        (dict(temperature=-1.0), "sample 0: temperature"),
    ],
)
def test_a_rollout_that_means_nothing_is_refused(single_process, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(model_of("rope"), prompts(), **options)
