"""Decoders: rows of the language model -> loss (training) or modality (inference), one a file."""

from megatron_mimo.decoders.base import Decoder
from megatron_mimo.decoders.diffusers import AutoencoderCodec, DiffusersDecoder, VQCodec
from megatron_mimo.decoders.discrete import DiscreteDecoder
from megatron_mimo.decoders.flow import FlowDecoder
from megatron_mimo.decoders.flow_transformer import FlowTransformerDecoder
from megatron_mimo.decoders.generation_input import GenerationInput
from megatron_mimo.decoders.inputs import (
    CodeInput,
    NoisedTargetInput,
    QueryInput,
    TargetInput,
)
from megatron_mimo.decoders.path import RectifiedFlow
from megatron_mimo.decoders.rectified_flow import RectifiedFlowDecoder
from megatron_mimo.decoders.regression import RegressionDecoder
from megatron_mimo.decoders.targets import (
    CodeTargets,
    FlowTargets,
    Prepared,
    TargetDescription,
    VectorTargets,
)
from megatron_mimo.decoders.tokenizers import CodeTokenizer, LatentTokenizer, Tokenizer

__all__ = [
    "AutoencoderCodec",
    "CodeInput",
    "CodeTargets",
    "CodeTokenizer",
    "Decoder",
    "DiffusersDecoder",
    "DiscreteDecoder",
    "FlowDecoder",
    "FlowTargets",
    "FlowTransformerDecoder",
    "GenerationInput",
    "LatentTokenizer",
    "NoisedTargetInput",
    "Prepared",
    "QueryInput",
    "RectifiedFlow",
    "RectifiedFlowDecoder",
    "RegressionDecoder",
    "TargetDescription",
    "TargetInput",
    "Tokenizer",
    "VQCodec",
    "VectorTargets",
]
