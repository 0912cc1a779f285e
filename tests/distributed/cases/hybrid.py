"""N ranks equal one rank with Megatron's HybridModel as the language model, compared as `layouts` does."""

from tests.distributed.cases.layouts import register
from tests.distributed.setting import Setting

DENSE = "*-*-"  # attention and MLP in turn

#: name -> ranks, parallel sizes, setting.
LAYOUTS = {
    "hybrid_tp2": (2, dict(tensor_model_parallel_size=2), Setting(pattern=DENSE)),
    "hybrid_tp2_sp": (2, dict(tensor_model_parallel_size=2), Setting(pattern=DENSE, sequence_parallel=True)),
    "hybrid_pp2": (2, dict(pipeline_model_parallel_size=2), Setting(pattern=DENSE)),
    "hybrid_pp2_tied": (2, dict(pipeline_model_parallel_size=2), Setting(pattern=DENSE, tied=True)),
    "hybrid_dp2": (2, {}, Setting(pattern=DENSE, distributed_optimizer=True)),
    "hybrid_ep2": (2, dict(expert_model_parallel_size=2), Setting(pattern="*E*-", experts=4)),
}

for name, (ranks, sizes, setting) in LAYOUTS.items():
    register(name, ranks, sizes, setting)
