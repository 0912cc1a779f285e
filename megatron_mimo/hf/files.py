"""Safetensors directories: what they hold, told from their headers, and slices of it, read one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
#: What weights can be; anything else is quantised, or no weight.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: What our own parts may hold beside weights.
CODES = {dtype: code for code, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# As safetensors itself allows.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """Where one tensor is, and what.

    Args:
        file: that holds it.
        name: in the file.
        shape: of the tensor.
        dtype: as safetensors spells it, such as `BF16`.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Rows (`dim` 0) or columns (1) `start` to `stop` of the tensor, all of it with `dim` None, in its dtype.

        The file is opened for this tensor alone: pages that were mapped for another one are given back.
        """
        from safetensors import safe_open  # of the extra `hf`

        with safe_open(self.file, framework="pt", device="cpu") as opened:
            if dim is None or (start, stop) == (0, self.shape[dim]):
                return opened.get_tensor(self.name).clone()
            part = opened.get_slice(self.name)
            return (part[start:stop] if dim == 0 else part[:, start:stop]).clone()


@dataclass(frozen=True)
class Checkpoint:
    """A directory in Hugging Face's form.

    Args:
        directory: that it is.
        config: its `config.json`, as it stands there.
        tensors: name -> where it is.
    """

    directory: Path
    config: Mapping[str, object]
    tensors: Mapping[str, Stored]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: that of most values."""
        sizes: dict[str, int] = {}
        for stored in self.tensors.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        known = {code: size for code, size in sizes.items() if code in DTYPES}
        return DTYPES[max(known, key=known.__getitem__)] if known else torch.float32


def open_checkpoint(directory: Path) -> Checkpoint:
    """What a directory holds, told from its headers; no tensor is read.

    Raises:
        FileNotFoundError: no directory, no configuration, or no safetensors files.
        ValueError: an index that its files do not fit, a cut file, or quantised tensors.
    """
    config = read_config(directory)
    if "quantization_config" in config:
        raise ValueError(
            f"{directory}: expected weights in floating point, found a quantization_config in {CONFIG}. Take the "
            "model that was quantised, or dequantise it with transformers and save it."
        )
    tensors: dict[str, Stored] = {}
    for file, names in _files(directory).items():
        held = read_header(file)
        if names is not None and names != set(held):
            raise ValueError(
                f"{file}: expected the {len(names)} tensors that {INDEX} names for it, found {len(held)}; "
                f"missing {sorted(names - set(held))[:5]}, not in the index {sorted(set(held) - names)[:5]}. Index and "
                "files are of different models: take both from one download."
            )
        tensors |= held
    odd = sorted(f"{name} ({stored.dtype})" for name, stored in tensors.items() if stored.dtype not in DTYPES)
    quantised = [name for name in odd if "position_ids" not in name]
    if quantised:
        raise ValueError(
            f"{directory}: expected weights in floating point ({', '.join(DTYPES)}), found {quantised[:5]}, "
            f"{len(quantised)} in all. Take the model that was quantised, or dequantise it with transformers."
        )
    return Checkpoint(directory, config, tensors)


def read_config(directory: Path) -> dict[str, object]:
    """`config.json` of a directory.

    Raises:
        FileNotFoundError: no directory, or none in it.
        ValueError: it is no JSON object.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a directory with {CONFIG} and safetensors files, found none.")
    return read_json(directory / CONFIG)


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: expected a file {path.name}, found {_listed(path.parent)}.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found what does not parse ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(found).__name__}.")
    return found


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """Files with weights -> the tensors that the index names for them, None without an index."""
    if not (directory / INDEX).is_file():
        if not (directory / SINGLE).is_file():
            raise FileNotFoundError(
                f"{directory}: expected {SINGLE} or {INDEX}, found {_listed(directory)}. Other formats can run code "
                "when they are loaded; convert them with transformers (save_pretrained)."
            )
        return {directory / SINGLE: None}
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{directory / INDEX}: expected a weight_map, found {type(weight_map).__name__}.")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{directory / INDEX}: expected a file of the same directory for {name}, found {file!r}.")
        path = directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: expected {file}, which {INDEX} names, found {_listed(directory)}.")
        names = files.setdefault(path, set())
        assert names is not None
        names.add(name)
    return files


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: the file is shorter or longer than its header says, or has none.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if not 8 + length <= size or length > _LONGEST_HEADER:
            raise ValueError(
                f"{file}: expected a safetensors file, found {size} bytes without a whole header. {_AGAIN}"
            )
        try:
            header = json.loads(opened.read(length))
            held = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in held.values()), default=0)
            tensors = {name: Stored(file, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in held.items()}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ValueError(f"{file}: expected a safetensors file, found a header that does not parse.") from None
    if 8 + length + end != size:
        raise ValueError(f"{file}: expected {8 + length + end} bytes, as its header says, found {size}. {_AGAIN}")
    from safetensors import SafetensorError, safe_open  # of the extra `hf`

    try:
        with safe_open(file, framework="pt"):
            return tensors
    except SafetensorError as error:  # spans that are not those of the shapes, gaps, overlaps
        raise ValueError(f"{file}: expected a safetensors file, found a header that is wrong: {error}") from None


_AGAIN = "The file was cut, or a download broke off; fetch it again."


def _listed(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return str(names[:10]) if names else "an empty directory"
