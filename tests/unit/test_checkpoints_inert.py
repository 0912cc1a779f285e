"""Loading a checkpoint runs nothing that is written in it, in both loops."""

import io
import pickle
import shutil
from argparse import Namespace
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.enums import ModelType
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_mimo.compat.megatron import writers_report_here
from megatron_mimo.training.checkpoints.inert import check_inert
from megatron_mimo.training.checkpoints.loop import adapted
from megatron_mimo.training.parts.control import TrainingControl
from megatron_mimo.training.pretraining.checks import check_resumed
from tests import evil, tiny
from tests.unit.test_training_pretraining import loading
from tests.unit.test_training_trainer import one_batch, trainer


@pytest.fixture
def checkpoint(single_process, tmp_path) -> Path:
    """Of two steps."""
    trainer(single_process, steps=2, directory=tmp_path / "run").train(one_batch)
    return tmp_path / "run" / "step_00000002"


@pytest.fixture(params=evil.KINDS)
def made_evil(request, checkpoint, tmp_path) -> Path:
    evil.KINDS[request.param](checkpoint, tmp_path / "marker")
    return checkpoint


def test_trainer_load_refuses_it_runs_nothing_and_changes_nothing(made_evil, single_process, tmp_path):
    ours = trainer(single_process)
    before = {name: p.detach().clone() for name, p in ours.models[0].named_parameters()}
    for options in (dict(), dict(weights_only=True)):
        with pytest.raises(ValueError):
            ours.load(made_evil, **options)
    assert not (tmp_path / "marker").exists() and StorageMeta.__dict__.get("modules") is None
    assert all(p.equal(before[name]) for name, p in ours.models[0].named_parameters())
    assert ours.steps_done == ours.schedule.num_steps == 0


def test_megatrons_loader_refuses_it_and_runs_nothing(made_evil, request, single_process, tmp_path):
    load = tmp_path / "megatron"
    shutil.move(made_evil, load / "iter_0000002")
    if (tmp_path / "run" / "other").exists():
        shutil.move(tmp_path / "run" / "other", load / "other")
    (load / "latest_checkpointed_iteration.txt").write_text("2")
    path = str(load / "iter_0000002")
    wanted = trainer(single_process).models[0].sharded_state_dict()
    of_a_tensor = request.node.callspec.params["made_evil"] == "in_a_tensor"  # torch itself runs nothing of those
    with adapted(tiny.mimo_config):
        if not of_a_tensor:
            for arguments in (loading(load), loading(tmp_path / "new", pretrained_checkpoint=str(load))):
                with pytest.raises(ValueError):
                    check_resumed(arguments, TrainingControl(), tiny.mimo_config())
            with pytest.raises(ValueError):
                dist_checkpointing.load_common_state_dict(path)
        with pytest.raises(ValueError):
            dist_checkpointing.load(wanted, path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", evil.RUN_BY_MEGATRON)
def test_unlooked_at_it_would_have_run(kind, checkpoint, single_process, tmp_path):
    evil.KINDS[kind](checkpoint, tmp_path / "marker")
    with suppress(BaseException):  # what it reads is no checkpoint any more
        dist_checkpointing.load({"random": ShardedObject("random", {}, (1,), (0,))}, str(checkpoint))
    assert (tmp_path / "marker").exists()


def test_the_error_names_the_file_the_object_and_what_would_have_run(checkpoint, single_process, tmp_path):
    evil.KINDS["in_an_object"](checkpoint, tmp_path / "marker")
    with pytest.raises(ValueError, match=r"__9_0.distcp, object 'random/shard_0_1' is not data alone: .*posix.mkdir"):
        trainer(single_process).load(checkpoint)


def test_a_description_of_something_else_is_refused(tmp_path):
    evil.describe(tmp_path, {"state_dict_metadata": {}})
    with pytest.raises(ValueError, match="holds a dict, expected torch's Metadata"):
        check_inert(tmp_path)


def test_an_extra_state_that_is_kept_as_a_tensor_is_refused(checkpoint):
    description = evil.described(checkpoint)
    weight = description.state_dict_metadata[evil.name_of(checkpoint, "output_layer", evil.TensorStorageMetadata)]
    description.state_dict_metadata[evil.name_of(checkpoint, "_extra_state")] = weight
    evil.describe(checkpoint, description)
    with pytest.raises(ValueError, match="as a tensor, expected an object"):
        check_inert(checkpoint)


def test_what_megatrons_loop_and_transformer_engine_keep_is_accepted(single_process, tmp_path):
    extra = {"scale_fwd": torch.ones(3), "recipe": OrderedDict(), "extra_fp8_variables": {"num_gemms": 1}}
    kept = {
        "args": Namespace(num_layers=2, kind=ModelType.encoder_or_decoder, path=Path("x"), stream=io.BytesIO()),
        "of_bytes": ShardedObject(
            "layer._extra_state", torch.frombuffer(bytearray(pickle.dumps(extra)), dtype=torch.uint8), (1,), (0,)
        ),
        "of_nothing": ShardedObject("other._extra_state", torch.empty(0, dtype=torch.uint8), (1,), (0,)),
        "stream": ShardedObject("old._extra_state", io.BytesIO(evil.saved(extra)), (1,), (0,)),
    }
    with writers_report_here():  # Megatron's process for reports may be gone by now
        dist_checkpointing.save(kept, str(tmp_path))
    check_inert(tmp_path)


def test_what_is_no_checkpoint_is_left_to_whoever_loads_it(tmp_path):
    check_inert(tmp_path)
    check_inert(tmp_path / "nowhere")
