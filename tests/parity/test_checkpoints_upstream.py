"""Weights that Megatron-Core's own MIMO has saved load into ours where names map."""

import warnings
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mimo import specs
from megatron_mimo.compat.megatron import writers_report_here
from tests import tiny
from tests.unit.test_checkpoints_whole import Unchanged
from tests.unit.test_training_trainer import trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models.mimo import MimoModel as Upstream
    from megatron.core.models.mimo import MimoModelConfig as UpstreamConfig
    from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules

READS = dict(
    encoders={"patches": ModuleSpec(module=tiny.PatchEncoder)}, input_projections=[tiny.linear(16, tiny.HIDDEN)]
)
HEARS = dict(
    encoders={"frames": ModuleSpec(module=tiny.PatchEncoder)}, input_projections=[tiny.linear(16, tiny.HIDDEN)]
)


def upstream() -> Upstream:
    """Its model of our tiny one's parts but for those that write, which it lacks."""
    torch.manual_seed(11)
    config = tiny.language_config()
    language = tiny.language_spec(config, transformer_layer_spec=specs.language_layer_spec(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Upstream(
            UpstreamConfig(
                language_model_spec=language,
                modality_submodules_spec={
                    "images": ModuleSpec(module=VisionModalitySubmodules, submodules=READS),
                    "audio": ModuleSpec(module=AudioModalitySubmodules, submodules=HEARS),
                },
                special_token_ids={"images": 62, "audio": 63},
            )
        )


def saved(model: Upstream, path: Path) -> Path:
    path.mkdir()
    with writers_report_here():
        dist_checkpointing.save(model.sharded_state_dict(), str(path))
    return path


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "a part in Megatron's DDP"])
def test_weights_of_megatrons_own_mimo_load_with_a_report(single_process, tmp_path, wrapped, caplog):
    theirs = upstream()
    weights = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    if wrapped:
        images = theirs.modality_submodules["images"]
        theirs.modality_submodules["images"] = DistributedDataParallel(
            tiny.language_config(), DistributedDataParallelConfig(), images, pg_collection=single_process.groups
        )
        assert any(".images.module." in name for name in theirs.sharded_state_dict())
    path = saved(theirs, tmp_path / "upstream")
    ours = trainer(single_process)
    before = {name: parameter.detach().clone() for name, parameter in ours.models[0].named_parameters()}
    report = ours.load_parts(path)
    assert len(report.loaded) > 10 and not report.left_out
    assert {".".join(name.split(".")[:3]) for name in report.initialised} == {
        "modality_submodules.images.decoders", "modality_submodules.images.output_projections"
    }  # fmt: skip
    for name, parameter in ours.models[0].named_parameters():
        assert torch.equal(parameter, weights.get(name, before[name])), name
    assert {*weights} <= {*before} and all(not torch.equal(weights[name], before[name]) for name in MOVED)
    assert "has no hashes of its files" in caplog.text


#: Weights that no model draws alike with another seed.
MOVED = (
    "language_model.embedding.word_embeddings.weight",
    "modality_submodules.images.encoders.patches.linear.weight",
    "modality_submodules.audio.input_projections.0.weight",
)


def test_parts_of_other_sizes_are_refused_with_every_difference(single_process, tmp_path):
    path = saved(upstream(), tmp_path / "upstream")
    config = tiny.language_config(ffn_hidden_size=96)
    ours = trainer(single_process, tiny.mimo_config(tiny.language_spec(config)))
    with (
        Unchanged(ours),
        pytest.raises(ValueError, match=r"linear_fc1.weight: \[2, 64, 32\] there, \[2, 96, 32\] here"),
    ):
        ours.load_parts(path)
