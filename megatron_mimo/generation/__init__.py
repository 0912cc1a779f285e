"""Text, pictures and sound from one call: `MimoModel.generate`, what it takes and what it gives."""

from megatron_mimo.generation.events import Finished, Medium, Token
from megatron_mimo.generation.results import GenerationOutput, MediaPart, TextPart, save
from megatron_mimo.generation.rollout import Gap, Rollout, gap_of, rollout
from megatron_mimo.generation.sampling import Sampling
from megatron_mimo.generation.session import Session
from megatron_mimo.generation.spans import Reread, Writing

__all__ = [
    "Finished",
    "Gap",
    "GenerationOutput",
    "MediaPart",
    "Medium",
    "Reread",
    "Rollout",
    "Sampling",
    "Session",
    "TextPart",
    "Token",
    "Writing",
    "gap_of",
    "rollout",
    "save",
]
