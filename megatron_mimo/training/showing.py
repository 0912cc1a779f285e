"""What the model answers, at every evaluation, on the training layout: to a folder and to TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_mimo.generation.results import GenerationOutput, TextPart, save

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_mimo.launch import Run

logger = logging.getLogger(__name__)


class Board(Protocol):
    """What is asked of a `torch.utils.tensorboard.SummaryWriter`."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None: ...

    def add_audio(self, tag: str, snd_tensor: Tensor, global_step: int, sample_rate: int) -> None: ...


@dataclass
class Samples:
    """Prompts that are answered at every evaluation.

    Args:
        prompts: as `MimoModel.generate` takes them, the same on every rank.
        max_new_tokens: positions that each may add.
        options: further ones of `generate`, such as `modalities`, `processor` or `tokenizer`.
        directory: below which each step's answers are written to a folder of their own; None writes none.
        board: of TensorBoard, on the rank that writes; None for none.
        sampling_rate: of clips, in Hz.

    Raises:
        ValueError: neither a directory nor a board, or an option that a trainer sets itself.
    """

    prompts: Sequence[Any]
    max_new_tokens: int | Sequence[int] = 128
    options: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | str | None = None
    board: Board | None = None
    sampling_rate: int = 16_000

    def __post_init__(self) -> None:
        if self.directory is None and self.board is None:
            raise ValueError("Samples: expected a directory or a board, found neither; nobody would see them")
        if "stream" in self.options:
            raise ValueError("Samples: expected no option 'stream', found one; answers are shown whole")

    def take(self, generate: Callable[..., list[GenerationOutput]], step: int, run: Run) -> None:
        """Answers the prompts and shows the answers, those of the run's first rank. Collective over all ranks.

        Args:
            generate: `Trainer.generate`.
            step: how many steps the model has behind it.
            run: in progress.
        """
        outputs = generate(self.prompts, self.max_new_tokens, **self.options)
        if run.rank != 0:
            return
        if self.directory is not None:
            paths = save(outputs, Path(self.directory) / f"step_{step:08d}", sampling_rate=self.sampling_rate)
            logger.info("samples of step %d: %d files in %s", step, len(paths), self.directory)
        if self.board is not None:
            self._to_board(self.board, outputs, step)

    def _to_board(self, board: Board, outputs: Sequence[GenerationOutput], step: int) -> None:
        for index, output in enumerate(outputs):
            for number, part in enumerate(output.parts):
                tag = f"samples/{index}/{number}-{part.kind}"
                if isinstance(part, TextPart):
                    text = " ".join(map(str, part.ids)) if part.text is None else part.text
                    board.add_text(tag, text, step)
                elif part.kind == "image" and part.value.dim() == 3:
                    board.add_image(tag, part.value.float().clamp(0, 1), step)
                elif part.kind == "audio" and part.value.dim() in (1, 2):
                    clip = part.value.float().reshape(-1, part.value.shape[-1]).mean(0, keepdim=True)  # of all channels
                    board.add_audio(tag, clip.clamp(-1, 1), step, self.sampling_rate)
