"""Options that shard weights or move the optimizer to the host, which neither loop follows."""

from argparse import Namespace
from dataclasses import fields

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo import MimoModel
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.memory import REFUSED
from megatron_mimo.training.pretraining.checks import check_supported
from tests import tiny

OF_CONFIGURATIONS = [
    (name, kind)
    for name in REFUSED
    for kind in (DistributedDataParallelConfig, OptimizerConfig)
    if name in {field.name for field in fields(kind)}
]


@pytest.mark.parametrize(("name", "kind"), OF_CONFIGURATIONS)
def test_a_trainer_refuses_it_by_name_before_the_model_is_built(name, kind, single_process, monkeypatch):
    monkeypatch.setattr("megatron_mimo.training.trainer.build_chunks", lambda *_: pytest.fail("built"))
    of_ddp = kind is DistributedDataParallelConfig
    given = kind(**{name: True})
    options = {"ddp" if of_ddp else "optimizer": given}
    with pytest.raises(ValueError, match=f"{name} is not supported: .*use_distributed_optimizer"):
        Trainer(tiny.mimo_config(), single_process, TrainerSettings(steps=1), **options)


def test_each_option_is_one_of_megatron_s_and_those_of_the_configurations_are_all_there():
    offered = {field.name for kind in (DistributedDataParallelConfig, OptimizerConfig) for field in fields(kind)}
    assert {name for name, _ in OF_CONFIGURATIONS} == REFUSED.keys() - {"use_torch_fsdp2"}
    moving = {name for name in offered if "offload" in name and name != "optimizer_offload_fraction"}
    assert moving - {"use_torch_optimizer_for_cpu_offload"} <= REFUSED.keys()
    assert {name for name in offered if name.endswith("fsdp")} <= REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_pretrain_refuses_it_by_its_argument(name):
    given = Namespace(mtp_num_layers=None, graph_encoders=[], encoder_recompute_granularity=None)
    check_supported(Namespace(**vars(given), **{name: False}))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is not supported: "):
        check_supported(Namespace(**vars(given), **{name: True}))


def test_activations_on_the_host_are_refused_by_name_without_transformer_engine(single_process, monkeypatch):
    language = tiny.language_config(cpu_offloading=True, cpu_offloading_num_layers=1)
    monkeypatch.setattr("megatron_mimo.language.HAVE_TE", False)
    with pytest.raises(ValueError, match="cpu_offloading is TransformerEngine's, .*recompute_granularity"):
        MimoModel(tiny.mimo_config(tiny.language_spec(language)))
