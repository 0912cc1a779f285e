"""A language model whose linear layers multiply in fp8 (Megatron's `fp8`, `fp8_recipe`): what it asks of its inputs.

TransformerEngine's layers do so; encoders, projections, decoders and the output layer stay in the run's precision,
because each has a configuration of its own, or none. What fp8 cannot multiply is refused here, on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

#: Rows and columns of a matrix that is multiplied in fp8 are multiples of this.
MULTIPLE = 16
#: Rows a rank, where quantised blocks are gathered over tensor-parallel ranks.
BLOCK = 128


def check_fp8_widths(config: TransformerConfig) -> None:
    """Refuses a language model whose weights fp8 cannot multiply; needs no rank.

    Args:
        config: of the language model.

    Raises:
        ValueError: naming each width, which is a rank's where layers are cut.
    """
    if config.fp8 is None:
        return
    ranks, channels = config.tensor_model_parallel_size, config.kv_channels or 0
    widths = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size / tensor_model_parallel_size": (config.ffn_hidden_size or 0) // ranks,
        "num_attention_heads * kv_channels / tensor_model_parallel_size": config.num_attention_heads
        * channels
        // ranks,
        "num_query_groups * kv_channels / tensor_model_parallel_size": (
            max((config.num_query_groups or config.num_attention_heads) // ranks, 1) * channels
        ),
    }
    wrong = [f"{name} = {width}" for name, width in widths.items() if width % MULTIPLE]
    if wrong:
        raise ValueError(
            f"fp8={config.fp8!r}: expected widths that are multiples of {MULTIPLE}, found {', '.join(wrong)}. Change "
            "the sizes, or set TransformerConfig.fp8=None."
        )


def check_fp8_layers(language_model: nn.Module) -> None:
    """Refuses fp8 with layers that know nothing of it, which would train in the run's precision without a word.

    Args:
        language_model: this pipeline stage's part.

    Raises:
        ValueError: layers in plain torch.
    """
    config, decoder = cast("TransformerConfig", language_model.config), getattr(language_model, "decoder", None)
    if config.fp8 is None or decoder is None or not list(decoder.parameters()):
        return
    # The flag by which Megatron has TransformerEngine's layers make their fp8 weights anew.
    if not any(hasattr(module, "is_first_microbatch") for module in decoder.modules()):
        raise ValueError(
            f"fp8={config.fp8!r} needs layers of TransformerEngine, found a language model in plain torch, which would "
            "not multiply in fp8. Install TransformerEngine and build the layers with "
            "specs.language_layer_spec(config, 'transformer_engine'), or set TransformerConfig.fp8=None."
        )


def row_multiple(config: TransformerConfig, context_ranks: int) -> int:
    """What `B * S` of a microbatch is a multiple of for fp8; 1 without it.

    Args:
        config: of the language model.
        context_ranks: context-parallel ranks, which share the sequence.
    """
    if config.fp8 is None:
        return 1
    gathered = config.sequence_parallel and config.tensor_model_parallel_size > 1 and config.fp8_recipe == "blockwise"
    return context_ranks * (BLOCK * config.tensor_model_parallel_size if gathered else MULTIPLE)


def check_fp8_rows(rows: int, config: TransformerConfig, context_ranks: int) -> None:
    """Refuses a batch whose rows fp8 cannot multiply, before any work.

    Args:
        rows: `B * S` of a microbatch, the whole sequence.
        config: of the language model.
        context_ranks: context-parallel ranks, which share the sequence.

    Raises:
        ValueError: naming the number of rows and the multiple that it has to be.
    """
    multiple = row_multiple(config, context_ranks)
    if rows % multiple:
        raise ValueError(
            f"fp8={config.fp8!r}: expected B * S that is a multiple of {multiple} (fp8_recipe "
            f"{str(config.fp8_recipe)!r}, context_parallel_size {context_ranks}, tensor_model_parallel_size "
            f"{config.tensor_model_parallel_size}, sequence_parallel={config.sequence_parallel}), found {rows}. Pad "
            "the sequences, or set TransformerConfig.fp8=None."
        )
