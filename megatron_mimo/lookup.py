"""What the language model's word embedding is: a lookup and nothing else, or more."""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import nn

from megatron_mimo.compat.torch import has_output_hooks


def plain_lookup(language_embedding: nn.Module) -> VocabParallelEmbedding | None:
    """The embedding's vocabulary-parallel table if its forward is a lookup there and nothing else, otherwise None.

    Only Megatron's own forward is known to be one; a subclass that overrides it, a hook on the output, or an active
    option (learned positions, token types, scaling, dropout, float32 residuals, sharded weights) may add to it.
    """
    if type(language_embedding).forward is not LanguageModelEmbedding.forward:
        return None
    words: Any = language_embedding.word_embeddings
    config = language_embedding.config
    plain = (
        type(words).forward is VocabParallelEmbedding.forward
        and not language_embedding.add_position_embedding
        and language_embedding.tokentype_embeddings is None
        and not (config.use_mup and config.mup_embedding_mult != 1.0)
        and not config.fp32_residual_connection
        and not (language_embedding.training and language_embedding.embedding_dropout.p > 0)
        and words.gtp_remat_size == 1
        and not has_output_hooks(language_embedding)
        and not has_output_hooks(words)
    )
    return words if plain else None


def known_vocabulary(language_embedding: nn.Module, declared: int | None) -> int | None:
    """How many tokens an embedding that is no plain lookup knows: its own number, else the declared one."""
    if isinstance(language_embedding, LanguageModelEmbedding):
        return language_embedding.word_embeddings.num_embeddings
    return declared


def check_token_types(language_embedding: nn.Module) -> None:
    """Raises `ValueError` where Megatron's embedding adds token types, which nothing here gives."""
    if isinstance(language_embedding, LanguageModelEmbedding) and language_embedding.tokentype_embeddings is not None:
        raise ValueError(
            "the language model's embedding adds token types (num_tokentypes > 0), which MimoModel does not give. "
            "Build it without."
        )
