"""A checkpoint loads whole or not at all; one that cannot be written leaves those before it."""

import json
import logging
import os
import random
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from torch.distributed.checkpoint import CheckpointException

from megatron_mimo.training import Trainer
from megatron_mimo.training.checkpoints import directories, inert, manifest, reading
from megatron_mimo.training.checkpoints.directories import CheckpointSettings
from megatron_mimo.training.checkpoints.manifest import Damaged
from tests import evil, tiny
from tests.unit.test_checkpoints_identity import as_release_0_1
from tests.unit.test_training_trainer import one_batch, trainer

ADAM = OptimizerConfig(lr=1e-2)


@pytest.fixture
def checkpoint(single_process, tmp_path) -> Path:
    """The second of two."""
    trainer(single_process, steps=2, save_every=1, directory=tmp_path, optimizer=ADAM).train(one_batch)
    return tmp_path / "step_00000002"


class Unchanged:
    """Within it, nothing of a trainer changes."""

    def __init__(self, ours: Trainer) -> None:
        self.ours = ours

    def state(self) -> list:
        weights = [p.detach().clone() for p in self.ours.models[0].parameters()]
        return [*weights, torch.tensor([self.ours.steps_done, self.ours.schedule.num_steps]), torch.get_rng_state()]

    def __enter__(self) -> None:
        self.before = self.state()

    def __exit__(self, *_: object) -> None:
        assert all(mine.equal(before) for mine, before in zip(self.state(), self.before))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << (place % 8)
    file.write_bytes(bytes(content))


def test_a_flipped_bit_anywhere_is_refused_and_nothing_changes(checkpoint, single_process):
    draw = random.Random(18)
    files = sorted(path for path in checkpoint.iterdir())
    assert {path.name for path in files} == {".metadata", "metadata.json", "mimo.json", "complete", "__0_0.distcp"}
    ours = trainer(single_process, optimizer=ADAM)
    kept = {path: path.read_bytes() for path in files}
    with Unchanged(ours):
        for turn in range(200):
            file = files[turn % len(files)]
            flip(file, draw.randrange(8 * len(kept[file])))
            with pytest.raises(Damaged, match="is not whole, and nothing was loaded"):
                ours.load(checkpoint, weights_only=turn % 2 == 0)
            file.write_bytes(kept[file])
    assert ours.load(checkpoint) == 2


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
        (lambda path: os.truncate(path / "__0_0.distcp", 1000), "__0_0.distcp: 1000 bytes, expected "),
        (lambda path: (path / "__7_0.distcp").write_text(""), "__7_0.distcp: was not written with this checkpoint"),
        (lambda path: (path / "mimo.json").unlink(), "has no mimo.json, which was written with it"),
        (lambda path: (path / ".metadata").unlink(), ".metadata: missing"),
    ],
)
def test_a_file_that_is_missing_cut_or_not_listed_is_refused(harm, told, checkpoint, single_process):
    harm(checkpoint)
    ours = trainer(single_process, optimizer=ADAM)
    with Unchanged(ours), pytest.raises(Damaged, match=told):
        ours.load(checkpoint)


@pytest.mark.parametrize("harm", ["cut", "missing"])
def test_without_hashes_a_cut_or_missing_file_is_refused_too(harm, checkpoint, single_process):
    as_release_0_1(checkpoint)
    file = checkpoint / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 5000) if harm == "cut" else file.unlink()
    ours = trainer(single_process, optimizer=ADAM)
    with Unchanged(ours), pytest.raises(Damaged, match=r"__0_0.distcp: \d+ bytes, expected at least"):
        ours.load(checkpoint)


def test_without_hashes_it_is_loaded_with_a_warning(checkpoint, single_process, caplog):
    as_release_0_1(checkpoint)
    with caplog.at_level(logging.WARNING, "megatron_mimo"):
        assert trainer(single_process, optimizer=ADAM).load(checkpoint) == 2
    assert "has no hashes of its files (release 0.1" in caplog.text


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_newest_whole_checkpoint_is_loaded_and_what_is_wrong_with_newer_ones_is_told(
    weights_only, checkpoint, single_process, tmp_path, caplog
):
    flip(checkpoint / "__0_0.distcp", 5000)
    (tmp_path / "step_00000003").mkdir()
    ours = trainer(single_process, directory=tmp_path, optimizer=ADAM)
    with caplog.at_level(logging.WARNING, "megatron_mimo"):
        assert ours.load(weights_only=weights_only) == (0 if weights_only else 1)
    first = trainer(single_process, optimizer=ADAM)
    first.load(tmp_path / "step_00000001", weights_only=True)
    for name, weight in first.models[0].named_parameters():
        assert torch.equal(ours.models[0].get_parameter(name), weight), name
    assert "step_00000003 was cut short while it was written" in caplog.text
    assert "step_00000002 is not whole" in caplog.text and "__0_0.distcp: changed since it was written" in caplog.text
    flip(tmp_path / "step_00000001" / "__0_0.distcp", 5000)
    with pytest.raises(Damaged, match="step_00000001 is not whole"):
        ours.load(weights_only=weights_only)


def test_all_differences_of_names_and_sizes_are_told_at_once(checkpoint, single_process):
    wide = tiny.language_spec(tiny.language_config(ffn_hidden_size=96, num_layers=4, add_bias_linear=False))
    ours = trainer(single_process, tiny.mimo_config(wide), optimizer=ADAM)
    with Unchanged(ours), pytest.raises(ValueError, match="is of another model") as refused:
        ours.load(checkpoint, weights_only=True)
    told = str(refused.value)
    layers = "language_model.decoder.layers"
    assert f"{layers}.mlp.linear_fc1.weight: [2, 64, 32] there, [4, 96, 32] here" in told
    assert f"{layers}.mlp.linear_fc2.weight: [2, 32, 64] there, [4, 32, 96] here" in told
    assert f"{layers}.mlp.linear_fc1.bias: there, not here" in told
    assert "optimizer" not in told


def test_a_name_that_the_checkpoint_lacks_is_told(checkpoint, single_process):
    description = evil.described(checkpoint)
    for name in ("language_model.decoder.final_layernorm.weight", "language_model.output_layer.weight"):
        del description.state_dict_metadata[name]
    evil.describe(checkpoint, description)
    evil.seal(checkpoint)
    ours = trainer(single_process, optimizer=ADAM)
    with Unchanged(ours), pytest.raises(ValueError) as refused:
        ours.load(checkpoint)
    assert "final_layernorm.weight: not there" in str(refused.value)
    assert "output_layer.weight: not there" in str(refused.value)


def test_options_of_the_optimizer_that_are_others_are_told_before_a_weight_has_changed(checkpoint, single_process):
    ours = trainer(single_process, optimizer=OptimizerConfig(lr=0.5))
    with Unchanged(ours), pytest.raises(ValueError, match="optimizer: Could not find parameter group.*weights_only"):
        ours.load(checkpoint)


@pytest.mark.parametrize("error", [OSError("gone"), CheckpointException("read", {}), KeyError("name")])
def test_a_read_that_fails_after_all_changes_nothing_and_raises_a_value_error(
    error, checkpoint, single_process, monkeypatch
):
    from megatron.core import dist_checkpointing

    begin = dist_checkpointing.load

    def half(wanted, *given, **options):
        begin(wanted, *given, **options)
        raise error

    monkeypatch.setattr("megatron_mimo.training.checkpoints.saving.read", lambda *a: reading.read(*a, half))
    ours = trainer(single_process, optimizer=ADAM)
    with Unchanged(ours), pytest.raises(Damaged, match=f"cannot be read: {type(error).__name__}"):
        ours.load(checkpoint)


def test_layers_that_keep_something_besides_weights_load_from_a_checkpoint_without_it(checkpoint, single_process):
    description = evil.described(checkpoint)
    for kept in (description.state_dict_metadata, description.storage_data):
        for index in [each for each in kept if "_extra_state" in getattr(each, "fqn", each)]:
            del kept[index]
    evil.describe(checkpoint, description)
    evil.seal(checkpoint)
    assert trainer(single_process, optimizer=ADAM).load(checkpoint) == 2


# Writing ---------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_holds_is_read_as_often_whatever_it_holds(single_process, tmp_path, monkeypatch):
    """With a description of 10,000 names, to read it once a parameter takes hours."""
    read, real = [], inert.description_of
    for module in (inert, reading):
        monkeypatch.setattr(module, "description_of", lambda file: read.append(file) or real(file))
    counts = []
    for layers in (1, 4):
        config = tiny.mimo_config(tiny.language_spec(tiny.language_config(num_layers=layers)))
        ours = trainer(single_process, config, steps=1, directory=tmp_path / str(layers), optimizer=ADAM)
        ours.train(one_batch)
        read.clear()
        ours.load(tmp_path / str(layers) / "step_00000001")
        counts.append(len(read))
    assert counts[0] == counts[1] <= 6


def test_while_a_checkpoint_takes_the_place_of_one_of_its_step_the_old_one_is_found(
    checkpoint, single_process, tmp_path, monkeypatch
):
    ours = trainer(single_process, directory=tmp_path, optimizer=ADAM)
    shutil.rmtree(tmp_path / "step_00000001")
    assert ours.load() == 2
    found, rename = [], Path.rename

    def watched(self, target):
        other = trainer(single_process, directory=tmp_path, optimizer=ADAM)
        found.append((other.load(), other.load(checkpoint)))
        rename(self, target)
        found.append((other.load(), other.load(checkpoint)))
        return target

    with monkeypatch.context() as watching:
        watching.setattr(Path, "rename", watched)
        ours.save()
    assert found and set(found) == {(2, 2)}
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_full_disk_is_named_on_the_rank_it_befell_and_the_last_checkpoint_is_kept(
    checkpoint, single_process, tmp_path
):
    ours = trainer(single_process, directory=tmp_path, steps=4, optimizer=ADAM)
    ours.load()
    ours.train_step(one_batch)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        for background in (False, True):
            with pytest.raises(OSError, match=r"was not saved, and those that were are kept: rank 0: __0_0.distcp"):
                ours.save(background=background)
                ours._saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer(single_process, directory=tmp_path, optimizer=ADAM).load() == 2
    assert ours.save() == tmp_path / "step_00000003"


def test_too_little_room_is_told_before_anything_is_written(checkpoint, single_process, tmp_path, monkeypatch):
    ours = trainer(single_process, directory=tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("megatron_mimo.training.checkpoints.writing.write", lambda plan: pytest.fail("written"))
    with pytest.raises(OSError, match=r"a checkpoint needs [\d,]+ bytes, and 1,000 are free"):
        ours.save()


def test_a_directory_that_cannot_be_written_is_named(single_process):
    where = Path(tempfile.mkdtemp(dir="/tmp"))
    where.chmod(0o555)
    user = os.geteuid()
    try:
        ours = trainer(single_process, directory=where / "run")
        if user == 0:
            os.seteuid(65534)  # nobody: root may write everywhere
        with pytest.raises(OSError, match=f"was not saved.*Permission denied: '{where}/run'"):
            ours.save()
    finally:
        os.seteuid(user)
        shutil.rmtree(where)


def test_two_jobs_do_not_write_to_one_directory_at_a_time(checkpoint, single_process, tmp_path):
    ours = trainer(single_process, directory=tmp_path, optimizer=ADAM)
    with directories.writing_alone(tmp_path), pytest.raises(OSError, match="another job is saving to this directory"):
        ours.save()
    assert ours.load() == 2
    assert ours.save() == checkpoint


def test_what_is_kept_are_the_newest_every_so_many_and_the_best(single_process, tmp_path):
    settings = CheckpointSettings(keep_last=1, keep_every=4, keep_best="loss")
    ours = Trainer(
        tiny.mimo_config(),
        single_process,
        trainer(single_process, steps=6, save_every=1, evaluate_every=1, directory=tmp_path).settings,
        optimizer=ADAM,
        checkpoints=settings,
    )
    history = ours.train(one_batch, evaluation=lambda step, rank, size: [tiny.batch(step + 7)])
    best = min(history.evaluations, key=lambda step: history.evaluations[step]["loss"])
    kept = sorted(int(path.name[-8:]) for path in tmp_path.iterdir())
    assert kept == sorted({best, 4, 6})
    losses = json.loads((tmp_path / f"step_{best:08d}" / "mimo.json").read_text())["losses"]
    assert losses["loss"] == history.evaluations[best]["loss"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(keep_last=0), "keep_last must be at least 1, got 0"),
        (dict(keep_last=1, keep_every=0), "keep_every must be at least 1"),
        (dict(keep_every=5), "need keep_last"),
        (dict(keep_best="loss"), "need keep_last"),
        (dict(texts={"../recipe.yaml": ""}), "expected names that end with .yaml, .txt or .md"),
        (dict(texts={"mimo.json": ""}), "found 'mimo.json'"),
    ],
)
def test_settings_that_keep_nothing_or_all_twice_or_write_over_files_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CheckpointSettings(**given)


def test_texts_lie_in_each_checkpoint_and_one_that_was_changed_is_told(single_process, tmp_path):
    kept = CheckpointSettings(texts={"recipe.yaml": "stages: []\n"})
    ours = Trainer(
        tiny.mimo_config(), single_process, trainer(single_process, steps=1, directory=tmp_path).settings,
        optimizer=ADAM, checkpoints=kept,
    )  # fmt: skip
    ours.train(one_batch)
    (path,) = tmp_path.iterdir()
    assert (path / "recipe.yaml").read_text() == "stages: []\n" and "recipe.yaml" in manifest.read(path).files
    assert ours.load(path) == 1
    (path / "recipe.yaml").write_text("stages: {}\n")
    with pytest.raises(ValueError, match="recipe.yaml: changed since it was written"):
        ours.load(path)


def test_the_hash_of_a_file_is_that_of_what_was_written(checkpoint):
    said = manifest.read(checkpoint).files
    assert set(said) == {".metadata", "metadata.json", "__0_0.distcp"}
    for name, hashed in said.items():
        assert hashed == manifest.hashed(checkpoint / name)
