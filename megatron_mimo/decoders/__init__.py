"""Decoders: rows of the language model -> loss (training) or modality (inference), one a file."""

from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.diffusers import AutoencoderCodec, DiffusersDecoder, VQCodec
from megatron_mimo.decoders.discrete import DiscreteDecoder
from megatron_mimo.decoders.flow import FlowDecoder
from megatron_mimo.decoders.flow_transformer import FlowTransformerDecoder
from megatron_mimo.decoders.inputs import (
    CodeInput,
    GenerationInput,
    NoisedTargetInput,
    QueryInput,
    TargetInput,
)
from megatron_mimo.decoders.rectified_flow import RectifiedFlow, RectifiedFlowDecoder
from megatron_mimo.decoders.regression import RegressionDecoder
from megatron_mimo.decoders.tokenizers import CodeTokenizer, LatentTokenizer, Tokenizer

__all__ = [
    "AutoencoderCodec",
    "CodeInput",
    "CodeTokenizer",
    "Decoder",
    "DiffusersDecoder",
    "DiscreteDecoder",
    "FlowDecoder",
    "FlowTransformerDecoder",
    "GenerationInput",
    "LatentTokenizer",
    "NoisedTargetInput",
    "QueryInput",
    "RectifiedFlow",
    "RectifiedFlowDecoder",
    "RegressionDecoder",
    "TargetInput",
    "Tokenizer",
    "VQCodec",
]
