"""What every generation input does: it reads the targets of a decoder, and gives rows at the generation tokens.

Shapes: `N` rows of the modality in the microbatch, `H` hidden width of the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from megatron_mimo.decoders.arguments import at_least_one
from megatron_mimo.decoders.base import phase
from megatron_mimo.decoders.targets import Prepared, TargetDescription, Targets


class GenerationInput(nn.Module, ABC):
    """Rows `[N, H]` for the generation tokens, from the targets of one of the modality's decoders.

    Args:
        hidden_size: `H`.
        decoder: whose targets to read; None where the modality has one decoder.
        targets: describes them, as it does for the decoder; None for an input that reads none, or that defines
            `num_rows` itself.

    Attributes:
        shows_target: whether a position's row tells its own target. A decoder that reads its own
            position would then copy its answer, so it must read the predecessor.
        reads_any: whether it reads targets at all.
        rows_per_item: positions that are filled together, all of one sample.
    """

    shows_target: ClassVar[bool] = False
    reads_any: ClassVar[bool] = True
    rows_per_item: int = 1

    def __init__(
        self, *, hidden_size: int, decoder: str | None = None, targets: TargetDescription | None = None
    ) -> None:
        super().__init__()
        at_least_one(type(self).__name__, hidden_size=hidden_size)
        self.hidden_size = hidden_size
        self.decoder = decoder
        self.targets = None if targets is None else targets.built()
        self.tokenizer = None if self.targets is None else self.targets.tokenizer

    def pick(self, targets: Mapping[str, Targets]) -> Targets | None:
        """The targets to read, of a modality's targets by decoder; None where this input reads none.

        Raises:
            ValueError: the decoder's targets are missing, or there are several decoders and none
                was named.
        """
        if not self.reads_any:
            return None
        name = self.decoder
        if name is None and len(targets) == 1:
            name = next(iter(targets))
        if name is None or name not in targets:
            wanted = "the only decoder" if name is None else f"decoder {name!r}"
            raise ValueError(
                f"{type(self).__name__} reads the targets of {wanted}, found targets of "
                f"{sorted(targets)}. Name one of them as its `decoder`."
            )
        return targets[name]

    def reads(self, decoder: str) -> bool:
        """Whether this input reads the targets of that decoder of its modality."""
        return self.reads_any and self.decoder in (None, decoder)

    def num_rows(self, targets: Targets) -> int:
        """Generation tokens that targets stand for, read from shapes.

        Raises:
            TypeError, ValueError: targets that are none of the decoder's.
        """
        if self.targets is None:
            raise ValueError(f"{type(self).__name__} must define num_rows or be given a description of targets")
        return self.targets.num_rows(targets)

    def blank(self, num_rows: int) -> dict[str, Tensor]:
        """Inputs for `num_rows` generation tokens of which nothing is sampled yet, under the one keyword
        where samples of the decoder are fed back.

        Raises:
            ValueError: this input shows no samples.
        """
        if self.targets is None or not self.shows_target:
            raise ValueError(
                f"{type(self).__name__} does not show the language model what was sampled, of {num_rows} "
                "positions; CodeInput and TargetInput do."
            )
        return self.targets.blank(num_rows, next(self.parameters()).device)

    def prepare(self, targets: Targets, stream: str = "") -> Prepared:
        """What the decoder's `prepare` gives of what this input reads, made here without the decoder.

        Pipeline stages then agree: both draw from the same stream. What is there already stays.
        """
        if not self.reads_any:
            raise ValueError(
                f"{stream}: {type(self).__name__} reads no targets, found {sorted(targets)}. Leave them out."
            )
        if self.targets is None:
            return Prepared(dict(targets), self.num_rows(targets), self.rows_per_item)
        return self.targets.prepare(targets, phase(self, stream))

    def prepared(self, targets: Targets, stream: str = "") -> Prepared:
        """Prepared targets as they are, others prepared."""
        if isinstance(targets, Prepared):
            return targets
        made = self.prepare(targets, stream)
        # A `prepare` of one's own may give a plain mapping.
        return made if isinstance(made, Prepared) else Prepared(made, self.num_rows(made), self.rows_per_item)

    def read(self, targets: Targets | None, keyword: str, num_rows: int) -> Prepared:
        """Prepared targets for `num_rows` generation tokens; plain ones are prepared here.

        Raises:
            ValueError: there are none, or as many as other tokens have.
        """
        if targets is None:
            raise ValueError(
                f"{type(self).__name__} feeds {num_rows} generation tokens from the target {keyword!r}, found none. "
                "Give it in modality_targets; in generation, give what was sampled so far."
            )
        prepared = self.prepared(targets)
        if prepared.num_rows != num_rows:
            raise ValueError(
                f"{type(self).__name__} has {prepared.num_rows} {keyword} for {num_rows} generation tokens"
            )
        return prepared

    @abstractmethod
    def forward(self, targets: Targets | None, num_rows: int) -> Tensor:
        """Rows `[num_rows, H]`.

        Args:
            targets: of the decoder, for all rows of the microbatch; prepared ones, or a plain mapping, which is
                prepared here; None where there are none, as in inference.
            num_rows: `N`, at least 1.
        """

    @classmethod
    def check_rule(cls, position_rule: str) -> None:
        """Refuses a decoder that would read its answer off its own position.

        Raises:
            ValueError: naming input and rule.
        """
        if cls.shows_target and position_rule == "own":
            raise ValueError(
                f"{cls.__name__} shows each position its own target, and the decoder reads the "
                "hidden state at that position: it would learn to copy. Set the decoder's "
                "position_rule to 'predecessor', or feed the positions with QueryInput or "
                "NoisedTargetInput."
            )
