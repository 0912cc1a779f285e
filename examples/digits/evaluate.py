"""What the trained models can do: asked on held-out data, judged by `judges`, which never see them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from examples.digits import judges
from examples.digits.data import (
    CODE_ROWS,
    NEXT_LENGTH,
    NEXT_PROMPT,
    TOKEN,
    Digits,
    Task,
    code_sequences,
    model_inputs,
    sequences,
)
from examples.digits.tones import CLIP, dial_tones
from examples.digits.train import Trained
from examples.digits.vq import CODES
from megatron_mimo import MimoModel, MimoOutput
from megatron_mimo.generation import GenerationOutput, TextPart, Writing

NOTHING: Tensor = torch.empty(0)
TEMPERATURE = 0.4
"""Of the codes. Higher draws more diverse digits, fewer of which the judge recognises (dev/log.md)."""


class Session:
    """A trained model to ask things; answers come on the CPU.

    Tensor-parallel ranks ask together and get the same answers.

    Args:
        seed: of the noise that images and tones start from.
    """

    def __init__(self, model: MimoModel, seed: int) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.seed, self.generator = seed, torch.Generator(self.device).manual_seed(seed)

    def read(self, images: Tensor) -> Tensor:
        """The digits `[n]` in images `[n, 8, 8]`."""
        return self._answer(Task.READ, "read", images=images)

    def hear(self, clips: Tensor) -> Tensor:
        """The digits `[n]` in clips `[n, CLIP]`."""
        return self._answer(Task.HEAR, "hear", clips=clips)

    def draw(self, digits: Tensor) -> Tensor:
        """Images `[n, 8, 8]` of digits `[n]`."""
        return self._images(self._run(sequences(Task.DRAW, digits)))

    def dial(self, digits: Tensor) -> Tensor:
        """Clips `[n, CLIP]` of digits `[n]`."""
        outputs = self._run(sequences(Task.DIAL, digits))
        options = {"audio": {"bands": {"generator": self.generator}}}
        return self.model.decode(outputs, options)["audio"]["bands"].cpu()

    def hear_then_draw(self, clips: Tensor) -> Tensor:
        """Images `[n, 8, 8]` of the digits in clips `[n, CLIP]`."""
        return self._images(self._run(_unanswered(Task.HEAR_DRAW, len(clips)), clips=clips))

    def next_of(self, images: Tensor) -> "Answers":
        """What the model says, draws and dials of its own accord when it is shown images `[n, 8, 8]`.

        It chooses by itself when to draw and when to dial.
        """
        ids = _unanswered(Task.NEXT, 1)[0, :NEXT_PROMPT]
        prompts = [{"input_ids": ids, "modality_inputs": model_inputs(image[None], NOTHING)} for image in images]
        return Answers.of(self.model.generate(prompts, NEXT_LENGTH - NEXT_PROMPT, seed=self.seed))

    @torch.no_grad()
    def _run(self, ids: Tensor, images: Tensor = NOTHING, clips: Tensor = NOTHING) -> MimoOutput:
        inputs = model_inputs(images.to(self.device), clips.to(self.device))
        outputs, _ = self.model(ids.to(self.device), modality_inputs=inputs)
        return outputs

    def _answer(self, task: Task, word: str, **given: Tensor) -> Tensor:
        (count,) = {len(inputs) for inputs in given.values()}
        ids = _unanswered(task, count)
        logits = self._run(ids, **given).language
        logits = gather_from_tensor_model_parallel_region(logits, self.model.pg_collection.tp)
        return logits.cpu()[ids == TOKEN[word]].argmax(-1)

    def _images(self, outputs: MimoOutput) -> Tensor:
        options = {"images": {"pixels": {"generator": self.generator}}}
        return self.model.decode(outputs, options)["images"]["pixels"].squeeze(1).clamp(-1, 1).cpu()


def _unanswered(task: Task, count: int) -> Tensor:
    """Sequences of `task` with a blank in the place of the digit."""
    return sequences(task, torch.full((count,), TOKEN["<pad>"]))


@dataclass(frozen=True)
class Answers:
    """Answers in words, pictures and sound.

    Args:
        whole: bool `[n]`, which of them say something, then draw and then dial, and no more.
        words: of each answer, the ids that it says.
        drawn: `[n, 8, 8]` in [-1, 1], blank where none was drawn.
        dialled: `[n, CLIP]`, silent where nothing was dialled.
    """

    whole: Tensor
    words: list[list[int]]
    drawn: Tensor
    dialled: Tensor

    @classmethod
    def of(cls, outputs: Sequence[GenerationOutput]) -> "Answers":
        """Of what `generate` gave."""
        drawn, dialled = torch.full((len(outputs), 8, 8), -1.0), torch.zeros(len(outputs), CLIP)
        words: list[list[int]] = [[] for _ in outputs]
        for index, part in ((index, part) for index, output in enumerate(outputs) for part in output.parts):
            if isinstance(part, TextPart):
                words[index] += part.ids
            elif part.kind == "image":
                drawn[index] = part.value.view(8, 8).clamp(-1, 1)
            else:
                dialled[index] = part.value.view(CLIP)
        whole = [[part.kind for part in output.parts] == ["text", "image", "audio"] for output in outputs]
        return cls(torch.tensor(whole), words, drawn, dialled)

    def accuracy(self, found: Sequence, expected: Sequence) -> float:
        """The share of whole answers of which `found` is what was expected; others are wrong whatever they hold."""
        return judges.accuracy([one if whole else None for one, whole in zip(found, self.whole.tolist())], expected)


# Figures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowResults:
    """Figures of the model that reads, hears, draws and dials, and what they were taken from.

    Args:
        figures: name -> value.
        asked: `[n]`, the digits asked for.
        drawn, heard_drawn: `[n, 8, 8]` in [-1, 1], asked for by word and by tone.
        dialled: `[n, CLIP]`.
        shown: digits that were read, the next after which was to be drawn and dialled.
        answers: to them.
    """

    figures: dict[str, float]
    asked: Tensor
    drawn: Tensor
    heard_drawn: Tensor
    dialled: Tensor
    shown: Digits
    answers: Answers


@dataclass(frozen=True)
class CodeResults:
    """Figures of the model that draws with codes, and what they were taken from.

    Args:
        figures: name -> value.
        asked: `[n]`, the digits asked for.
        drawn: `[n, 8, 8]` in [-1, 1].
        given_back: `[m, 8, 8]`, what the tokenizer makes of held-out digits.
    """

    figures: dict[str, float]
    asked: Tensor
    drawn: Tensor
    given_back: Tensor


def evaluate_flow(trained: Trained, train: Digits, held_out: Digits, *, seed: int, per_digit: int = 50) -> FlowResults:
    """Asks `per_digit` times for every digit, and lets the judges look and listen."""
    session = Session(trained.model, seed)
    asked = torch.arange(10).repeat(per_digit)
    # Training seeds its tones with numbers that are not negative: these are none of them.
    clips = dial_tones(asked, torch.Generator().manual_seed(-1 - seed))
    drawn, heard_drawn = session.draw(asked), session.hear_then_draw(clips)
    dialled = session.dial(asked)
    answers = session.next_of(held_out.images)
    after = (held_out.labels + 1) % 10

    svm = judges.train_svm(train)
    figures = {
        "read_accuracy": judges.accuracy(session.read(held_out.images), held_out.labels),
        "hear_accuracy": judges.accuracy(session.hear(clips), asked),
        "draw_accuracy": judges.accuracy(judges.recognise(svm, drawn), asked),
        "draw_diversity": judges.diversity(Digits(drawn, asked), held_out),
        "draw_novelty": judges.novelty(drawn, train, held_out),
        "dial_accuracy": judges.accuracy(keys_of(dialled), [str(digit) for digit in asked.tolist()]),
        "hear_then_draw_accuracy": judges.accuracy(judges.recognise(svm, heard_drawn), asked),
        "next_read_accuracy": answers.accuracy(answers.words, [[digit] for digit in held_out.labels.tolist()]),
        "next_draw_accuracy": answers.accuracy(judges.recognise(svm, answers.drawn), after.tolist()),
        "next_dial_accuracy": answers.accuracy(keys_of(answers.dialled), [str(digit) for digit in after.tolist()]),
        "train_seconds": round(trained.seconds, 1),
    }
    return FlowResults(figures, asked, drawn, heard_drawn, dialled, held_out, answers)


def keys_of(clips: Tensor) -> list[str | None]:
    """The keys `[n]` that the detector hears in clips `[n, CLIP]`."""
    return [judges.detect_key(clip) for clip in clips.double().numpy()]


def evaluate_codes(trained: Trained, train: Digits, held_out: Digits, *, seed: int, per_digit: int = 50) -> CodeResults:
    """Asks `per_digit` times for every digit; the same judge looks at the drawings, and at the tokenizer alone."""
    asked = torch.arange(10).repeat(per_digit)
    drawn = draw_with_codes(trained.model, asked, seed)
    codec = trained.model.modality_submodules["images"].decoders["codes"].tokenizer
    device = next(trained.model.parameters()).device
    codes = codec.encode(held_out.images[:, None].to(device))
    given_back = codec.decode(codes).squeeze(1).cpu()

    svm = judges.train_svm(train)
    figures = {
        "draw_codes_accuracy": judges.accuracy(judges.recognise(svm, drawn), asked),
        "draw_codes_diversity": judges.diversity(Digits(drawn, asked), held_out),
        "draw_codes_novelty": judges.novelty(drawn, train, held_out),
        "vq_reconstruction_error": float((given_back - held_out.images).square().mean().sqrt()),
        "vq_recognised": judges.accuracy(judges.recognise(svm, given_back), held_out.labels),
        "vq_codes_used": len(codes.unique()) / CODES,
        "train_codes_seconds": round(trained.seconds, 1),
    }
    return CodeResults(figures, asked, drawn, given_back)


def draw_with_codes(model: MimoModel, digits: Tensor, seed: int) -> Tensor:
    """Images `[n, 8, 8]` of digits `[n]`, each code drawn by a model that sees those before it."""
    prompts = [{"input_ids": ids} for ids in code_sequences(digits)[:, : -CODE_ROWS + 1]]
    how = {"images": Writing(options={"temperature": TEMPERATURE})}
    outputs = model.generate(prompts, CODE_ROWS, modalities=how, seed=seed)
    return torch.stack([output.parts[0].value.view(8, 8) for output in outputs])
