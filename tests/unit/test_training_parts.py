"""Gradient norms of parts, and the language loss of each source of a blend."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_mimo import MimoModel
from megatron_mimo.data import PackedData, PackShape, open_source
from megatron_mimo.data.loading import ReadingOptions
from megatron_mimo.data.packing import RowShape
from megatron_mimo.data.sources import names_of
from megatron_mimo.training import PackSource, TrainingControl
from megatron_mimo.training.loggers import values_of
from megatron_mimo.training.sources import batch_of
from tests import data_samples as made
from tests import tiny
from tests.unit.test_training_sources import config
from tests.unit.test_training_trainer import one_batch, sgd, trainer


def test_norms_of_parts_are_those_of_their_gradients_before_clipping_and_make_up_the_whole(single_process):
    ours, plain = trainer(single_process, optimizer=sgd(clip_grad=1e-3), part_norms=True), trainer(single_process)
    plain.models[0].load_state_dict(ours.models[0].state_dict())
    report = ours.train_step(one_batch)
    plain.train_step(one_batch)
    squares: dict[str, float] = {}
    for name, parameter in plain.models[0].named_parameters():
        part = "language_model" if name.startswith("language_model") else "/".join(name.split(".")[1:3])
        squares[part] = squares.get(part, 0.0) + parameter.main_grad.double().square().sum().item()
    assert {part: norm**2 for part, norm in report.part_norms.items()} == pytest.approx(squares, rel=1e-5)
    assert {"language_model", "images/encoders", "images/decoders", "audio/input_projections"} <= squares.keys()
    assert sum(squares.values()) == pytest.approx(report.gradient_norm**2, rel=1e-5)
    assert values_of(report)["gradient_norm/images/encoders"] == report.part_norms["images/encoders"]


def test_parts_that_are_frozen_have_no_norm_and_none_is_taken_unasked(single_process):
    control = TrainingControl(frozen=["language_model", "encoders"])
    found = trainer(single_process, control=control, part_norms=True).train_step(one_batch).part_norms
    assert "language_model" not in found and "images/encoders" not in found and found["images/decoders"] > 0
    assert trainer(single_process).train_step(one_batch).part_norms == {}


def test_norms_are_without_the_loss_scale(single_process):
    half = tiny.mimo_config(tiny.language_spec(tiny.language_config(fp16=True, params_dtype=torch.float16)))
    ours = trainer(single_process, half, optimizer=sgd(loss_scale=4.0), part_norms=True)
    report = ours.train_step(one_batch)
    whole = math.sqrt(sum(norm**2 for norm in report.part_norms.values()))
    assert not report.skipped and whole == pytest.approx(report.gradient_norm, rel=1e-3)


def blend(directory: Path, shape) -> PackedData:
    """Two sources of which the first has three times the samples."""
    paths = [made.tiny_records(directory / name) for name in ("one", "two") if not (directory / name).mkdir()]
    sources = [open_source(path, media_root=path.parent) for path in paths]
    options = ReadingOptions(seed=3)
    return PackedData(sources, made.tiny_processor(), shape, weights=[3, 1], options=options)


@pytest.mark.parametrize("shape", [PackShape(length=64, multiple=2), RowShape(length=16, rows=4)], ids=str)
def test_the_losses_of_a_blend_s_sources_are_reported_and_make_up_the_language_loss(shape, single_process, tmp_path):
    data = blend(tmp_path, shape)
    assert data.source_names == ("one-train", "two-train")
    start = data.state()
    packs = [next(data) for _ in range(4)]
    data.restore(start)
    ours = trainer(single_process, config())
    weights = {name: value.clone() for name, value in ours.models[0].state_dict().items() if value is not None}
    report = ours.train(PackSource(data, microbatches=4)).steps[0]

    reference = MimoModel(config())
    reference.load_state_dict(weights, strict=False)
    sums, counts = torch.zeros(2), torch.zeros(2)
    for pack in packs:
        outputs, mask = reference(**batch_of(pack))
        for row, (start_at, end) in where(pack):
            source = data._feed.source_of(pack.positions[row])
            at = (0 if pack.cu_seqlens is not None else row, slice(start_at, end))
            sums[source] += (outputs.language * mask)[at].sum().item()
            counts[source] += mask[at].sum().item()
    assert counts.min() > 0
    found = [report.losses["text of one-train"], report.losses["text of two-train"]]
    assert found == pytest.approx((sums / counts).tolist(), rel=1e-5)
    assert report.losses["text"] == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5)
    whole = report.losses["text"] + 0.5 * report.losses.get("images/pixels", 0.0)
    assert report.losses["loss"] == pytest.approx(whole, rel=1e-5), "trained on once"


def where(pack):
    """Each sample's number and the positions it takes."""
    if pack.cu_seqlens is None:
        return [(row, (0, pack.input_ids.shape[1])) for row in range(len(pack.positions))]
    bounds = pack.cu_seqlens_padded.tolist()
    return list(enumerate(pairwise(bounds)))


def test_one_source_is_not_told_apart(single_process, tmp_path):
    data = made.tiny_data(made.tiny_records(tmp_path))
    assert data.source_names == () and next(data).sources is None
    report = trainer(single_process, config()).train(PackSource(data)).steps[0]
    assert not [name for name in report.losses if name.startswith("text of")]


def test_names_of_sources_differ():
    assert names_of([Path("/a/x.jsonl"), Path("/b/x.jsonl")]) == ("a-x", "b-x")
    assert len(set(names_of([Path("x.jsonl"), Path("x.jsonl"), Path("x.json")]))) == 3
