"""`convert`: Hugging Face's form, a Megatron checkpoint and a file of safetensors, one from the other."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.models import RECIPE, SOURCE, Place, read_model
from megatron_mimo.cli.readers import keep_readers
from megatron_mimo.data.written import write_whole
from megatron_mimo.launch import Run
from megatron_mimo.pretrained import save_pretrained
from megatron_mimo.training.checkpoints.safetensors import export_weights
from megatron_mimo.training.checkpoints.weights import save_weights

FORMS = ("hf", "megatron", "safetensors")


def convert(place: Place, target: Path, form: str, run: Run, dtype: str | None = None) -> None:
    """Writes a model in another form. Collective over all ranks.

    Args:
        place: of the model.
        target: a directory that is not there yet, or is empty; of "safetensors" a file that is not there yet.
        form: "hf" is what transformers loads where it has a class for the model, and `from_pretrained`; "megatron" a
            checkpoint that any layout reads; "safetensors" one file with a checkpoint's names.
        run: in progress.
        dtype: of the weights; None for the model's.

    Raises:
        Refused: there is something at `target`, or the model has that form already.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise Refused(f"{target}: expected nothing there, found something; name another target, or remove it")
    of_file = place.directory.is_file()
    if form == "safetensors" and of_file and dtype is None:
        raise Refused(f"{place.directory}: is a file of safetensors already; give --to hf or --to megatron")
    if form == "megatron" and place.checkpoint and not of_file:
        raise Refused(f"{place.directory}: is a Megatron checkpoint already; give --to hf or --to safetensors")
    if run.rank == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
    _barrier(run)
    source = place.origin or str(place.directory.resolve())
    if form == "safetensors" and place.checkpoint and dtype is None:  # which no model is needed for
        if run.rank == 0:
            export_weights(place.directory, target, ema=place.ema, source=source)
        _barrier(run)
        return
    models = read_model(place, run, dtype)
    if form == "hf":
        # Tensors that are only carried along have their own dtype otherwise.
        save_pretrained(models, target, dtype=None if dtype is None else getattr(torch, dtype))
        if run.rank == 0 and place.model is not None and place.recipe is not None:
            keep_readers(place.model, target)
            write_whole(target / RECIPE, place.recipe.read_text("utf-8"))
        _barrier(run)
        return
    if form == "megatron":

        def beside(written: Path) -> None:
            (written / SOURCE).write_text(f"{source}\n", encoding="utf-8")

        save_weights(target, models, run, beside)
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="converting-") as folder:
        told = [Path(folder) / "checkpoint"]
        if run.world_size > 1:
            dist.broadcast_object_list(told, src=0)
        save_weights(told[0], models, run)
        if run.rank == 0:
            export_weights(told[0], target, source=source)
        _barrier(run)


def _barrier(run: Run) -> None:
    if run.world_size > 1:
        dist.barrier()
