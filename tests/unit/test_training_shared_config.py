"""Two trainers that were given the same configuration do not meet in it."""

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_mimo.training import Trainer, TrainerSettings, TrainingControl
from tests import tiny


def test_trainers_that_share_a_configuration_train_as_each_would_alone(single_process):
    def pair(shared: bool) -> list[Trainer]:
        configs = [tiny.mimo_config()] * 2 if shared else [tiny.mimo_config(), tiny.mimo_config()]
        return [
            Trainer(
                config,
                single_process,
                TrainerSettings(steps=4, decay="constant", progress=False),
                optimizer=OptimizerConfig(lr=0.05, optimizer="sgd", sgd_momentum=0.0),
                control=control,
                ddp=DistributedDataParallelConfig(overlap_grad_reduce=overlap),
            )
            for config, control, overlap in zip(
                configs, (None, TrainingControl(embedding_rows=[3, 17, tiny.WRITE])), (True, False)
            )
        ]

    apart, together = pair(shared=False), pair(shared=True)
    for one, other in zip(apart, together):
        other.models[0].load_state_dict(one.models[0].state_dict())
    for _ in range(2):
        for one, other in zip(apart, together):
            expected = one.train_step(lambda *_: [tiny.batch(0), tiny.batch(1)])
            found = other.train_step(lambda *_: [tiny.batch(0), tiny.batch(1)])
            assert found.losses == expected.losses and found.gradient_norm == expected.gradient_norm
            assert not found.skipped
    for one, other in zip(apart, together):
        for name, weight in dict(one.models[0].named_parameters()).items():
            assert other.models[0].get_parameter(name).equal(weight), name
