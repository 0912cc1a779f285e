"""Real data: from a folder to packed, positioned batches, and back after a crash.

    source -> conversation -> sample (tokens and media) -> pack -> batch

`open_source` reads files, `SampleProcessor` makes samples of their conversations, `PackedData` packs them for one
data-parallel rank and resumes exactly. Nothing here imports Megatron-Core.
"""

from megatron_mimo.data.blend import Order
from megatron_mimo.data.chat import PLAIN_TEMPLATE, ChatText
from megatron_mimo.data.energon import EnergonStream, load_energon_state
from megatron_mimo.data.lengths import Lengths, prepare
from megatron_mimo.data.loading import PackedData, ReadingOptions
from megatron_mimo.data.media import Limits, Sound, Video
from megatron_mimo.data.messages import Conversation, Medium, Part, SampleError, Turn, conversation_of
from megatron_mimo.data.packing import Packer, PackShape, RowShape, first_fit_decreasing
from megatron_mimo.data.packs import Pack, packed, padded
from megatron_mimo.data.positions import Constant, GridPositions, Sequential, Span, TimeAligned, positions
from megatron_mimo.data.progress import joined_states
from megatron_mimo.data.readers import ImageReader, ProcessorReader, Reader, Reading, SoundReader
from megatron_mimo.data.samples import Handling, Item, Sample, SampleProcessor
from megatron_mimo.data.show import show
from megatron_mimo.data.sources import Folder, JsonLines, Records, Source, Table, open_source
from megatron_mimo.data.split import split
from megatron_mimo.data.streams import DatasetsStream, Stream, Streamed
from megatron_mimo.data.writers import ImageWriter, SoundWriter, Writer, Writing

__all__ = [
    "PLAIN_TEMPLATE",
    "ChatText",
    "Constant",
    "Conversation",
    "DatasetsStream",
    "EnergonStream",
    "Folder",
    "GridPositions",
    "Handling",
    "ImageReader",
    "ImageWriter",
    "Item",
    "JsonLines",
    "Lengths",
    "Limits",
    "Medium",
    "Order",
    "Pack",
    "PackShape",
    "PackedData",
    "Packer",
    "Part",
    "ProcessorReader",
    "Reader",
    "Reading",
    "ReadingOptions",
    "Records",
    "RowShape",
    "Sample",
    "SampleError",
    "SampleProcessor",
    "Sequential",
    "Sound",
    "SoundReader",
    "SoundWriter",
    "Source",
    "Span",
    "Stream",
    "Streamed",
    "Table",
    "TimeAligned",
    "Turn",
    "Video",
    "Writer",
    "Writing",
    "conversation_of",
    "first_fit_decreasing",
    "joined_states",
    "load_energon_state",
    "open_source",
    "packed",
    "padded",
    "positions",
    "prepare",
    "show",
    "split",
]
