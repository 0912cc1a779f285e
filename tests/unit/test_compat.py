"""The private and undocumented names in `compat/` are, in the installed versions, what `compat/` takes them for.

After an upgrade of Megatron, torch or Triton run this file first: each failure names one function of `compat/`, whose
docstring says what to do.
"""

import argparse
import importlib
import inspect
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from megatron_mimo.compat import (
    checkpoints,
    datasets,
    hybrid,
    megatron,
    megatron_optimizers,
    megatron_training,
    notices,
)
from megatron_mimo.compat import torch as torch_names
from tests import tiny

ROOT = Path(__file__).parents[2]


def named(path: str) -> object:
    """What a dotted path names."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(named(module), name)


def parameters(path: str) -> list[str]:
    return list(inspect.signature(named(path)).parameters)


# Names and signatures --------------------------------------------------------------------------------------------

# Function of ours -> what it takes for granted: a path, and the first parameters where it calls it.
NAMES = {
    "torch.forward_pre_hooks": ("torch.nn.Module.register_forward_pre_hook", ["self", "hook"]),
    "torch.own_state": ("torch.nn.Module._save_to_state_dict", ["self", "destination", "prefix", "keep_vars"]),
    "torch.KeepsDtype": ("torch.nn.Module._apply", ["self", "fn", "recurse"]),
    "torch.flatten": ("torch.utils._pytree.tree_flatten", ["tree"]),
    "torch.unflatten": ("torch.utils._pytree.tree_unflatten", ["leaves", "treespec"]),
    "torch.forget_compiled_names": ("torch._dynamo.trace_rules.clear_lru_cache", []),
    "torch.build_table_of_factories": ("torch.utils._device._device_constructors", []),
    "torch.pretend_world": ("torch.testing._internal.distributed.fake_pg._create_fake_pg", ["common_opts"]),
    "torch.watched": ("torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__", ["self", "func", "types"]),
    "torch.script_as": ("torch.jit._builtins._get_builtin_table", []),
    "megatron.gathers_parameters": (
        "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel._make_forward_pre_hook", ["self"]
    ),
    "megatron.gradient_buffers": (
        "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer", ["ddp_config", "param_dtype"]
    ),
    "megatron.is_tied_copy": (
        "megatron.core.models.common.language_module.language_module.LanguageModule"
        ".setup_embeddings_and_output_layer", ["self"]
    ),
    "megatron.trace_through_linear_layers": (
        "megatron.core.utils.get_tensor_model_parallel_group_if_none", ["tp_group", "is_expert", "check_initialized"]
    ),
    "megatron.summed_by_name": ("megatron.core.distributed.finalize_model_grads", ["model"]),
    "megatron.scaled_logits": (
        "megatron.core.models.common.language_module.language_module.LanguageModule._scale_logits", ["self", "logits"]
    ),
    "megatron.single_optimizers": ("megatron.core.optimizer.ChainedOptimizer", ["chained_optimizers"]),
    "megatron.describe_momentum": (
        "megatron.core.optimizer.optimizer.MegatronOptimizer", ["optimizer", "config", "init_state_fn"]
    ),
    "megatron_optimizers.masters_of": (
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._get_model_param_range_map", ["self", "param"]
    ),
    "megatron.writers_report_here": (
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue", ["mp_mode"]
    ),
    "datasets.shuffles": ("datasets.IterableDataset", ["ex_iterable"]),
    "hybrid.StackWithNorm": (
        "megatron.core.models.hybrid.hybrid_block.HybridStack", ["config", "submodules", "pre_process"]
    ),
    "hybrid.stack_layers": (
        "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_local_submodules",
        ["num_experts", "moe_grouped_gemm", "qk_layernorm"],
    ),
    "megatron_training.optimizer_config_by": ("megatron.training.training.get_megatron_optimizer_config", ["args"]),
    "megatron_training.train_step_by": (
        "megatron.training.training.train_step", ["forward_step_func", "data_iterator", "model", "optimizer"]
    ),
    "megatron_training.full_iterations_by": (
        "megatron.training.training.FullCudaGraphWrapper", ["forward_backward_func", "cuda_graph_warmup_steps"]
    ),
    "megatron_training.full_iteration_wrapper": ("megatron.training.training.FullCudaGraphWrapper", []),
    "megatron_training.full_iteration_stream": ("megatron.core.full_cuda_graph.get_shared_capture_stream", []),
    "megatron_training.evaluations_told": (
        "megatron.training.training.evaluate_and_print_results",
        ["prefix", "forward_step_func", "data_iterator", "model", "iteration"],
    ),
    "megatron_training.saves_decided_by": (
        "megatron.training.training.checkpoint_and_decide_exit",
        ["model", "optimizer", "opt_param_scheduler", "iteration"],
    ),
    "megatron_training.save_now": (
        "megatron.training.training.save_checkpoint_and_time",
        ["iteration", "model", "optimizer", "opt_param_scheduler", "num_floating_point_operations_so_far",
         "checkpointing_context"],
    ),
    "megatron_training.compiled_dataset_helpers": ("megatron.core.datasets.utils.compile_helpers", []),
    "megatron_training.initialized_on_the_cpu": ("megatron.training.training.initialize_megatron", []),
    "megatron_training.arguments_of_checkpoint": (
        "megatron.training.checkpointing._load_base_checkpoint", ["load_dir", "args", "rank0"]
    ),
    "checkpoints.megatron_globals": ("megatron.core.safe_globals.register_safe_globals", []),
    "checkpoints.checkpoints_by": (
        "megatron.core.dist_checkpointing.load", ["sharded_state_dict", "checkpoint_dir", "sharded_strategy"]
    ),
    "checkpoints.planned": (
        "megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy"
        "._get_save_and_finalize_callbacks", ["self", "writer", "save_state_dict_ret", "async_strategy"]
    ),
    "checkpoints.write_item": (
        "torch.distributed.checkpoint.filesystem._write_item",
        ["transforms", "stream", "data", "write_item", "storage_key", "serialization_format"],
    ),
    "checkpoints.describe": ("megatron.core.dist_checkpointing.core.save_config", ["config", "checkpoint_dir"]),
    "checkpoints.other_groups": (
        "megatron.core.optimizer.optimizer.MegatronOptimizer._filter_and_reorder_param_groups",
        ["current_groups", "state_dict_groups"],
    ),
    "checkpoints.parallel_load": (
        "megatron.core.dist_checkpointing.strategies.fully_parallel.FullyParallelLoadStrategyWrapper", ["strategy"]
    ),
    "checkpoints.background_saves_by": ("megatron.training.async_utils.schedule_async_save", ["async_request"]),
    "checkpoints.deleting_by_threads": ("megatron.training.checkpointing._async_delete_checkpoint_impl", []),
    "checkpoints.registered": ("torch.cuda.cudart", []),
    "checkpoints.directory_to_load": (
        "megatron.training.checkpointing.get_checkpoint_name", ["checkpoints_path", "iteration", "release"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("ours", NAMES)
def test_the_name_is_there_with_its_parameters(ours: str) -> None:
    path, first = NAMES[ours]
    assert named(f"megatron_mimo.compat.{ours}").__doc__
    assert callable(named(path))
    assert parameters(path)[: len(first)] == first


MODULES = {
    "torch": torch_names,
    "megatron": megatron,
    "megatron_optimizers": megatron_optimizers,
    "megatron_training": megatron_training,
    "checkpoints": checkpoints,
    "hybrid": hybrid,
    "datasets": datasets,
}
FUNCTIONS = [
    (module, name)
    for module, content in MODULES.items()
    for name, function in vars(content).items()
    if inspect.isroutine(function) and function.__module__ == content.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=lambda part: str(part))
def test_each_function_says_version_reason_and_what_to_do_when_the_name_goes(module: str, name: str) -> None:
    text = getattr(MODULES[module], name).__doc__
    assert re.search(r"Private|Undocumented|see `", text)
    assert "When it goes" in text or "when it goes" in text or "see `" in text
    assert re.search(r"since|0\.19\.2|2\.11", text + MODULES[module].__doc__)


# torch -----------------------------------------------------------------------------------------------------------


def test_functions_of_torch_are_ours_meanwhile_also_for_those_who_look_them_up() -> None:
    before = torch.nn.functional.rms_norm
    with pytest.raises(ValueError), torch_names.functions_of(rms_norm=lambda *given: "ours"):
        assert nn.RMSNorm(2)(torch.ones(2)) == "ours"
        raise ValueError
    assert torch.nn.functional.rms_norm is before


def test_forward_pre_hooks_are_those_that_were_registered() -> None:
    layer, calls = nn.Linear(1, 1), []
    handle = layer.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    assert list(torch_names.forward_pre_hooks(layer)) == [handle.id]
    torch_names.run_forward_pre_hooks(layer, (1, 2))
    assert calls == [(1, 2)]


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *given: None),
        lambda layer: layer.register_full_backward_hook(lambda *given: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *given: None),
        lambda layer: layer.register_forward_pre_hook(lambda *given: None, with_kwargs=True),
    ],
)
def test_hooks_on_the_output_are_found(register) -> None:
    layer = nn.Linear(1, 1)
    assert not torch_names.has_output_hooks(layer)
    handle = register(layer)
    assert torch_names.has_output_hooks(layer)
    handle.remove()
    assert not torch_names.has_output_hooks(layer)


HOST = {
    "reads a number": lambda x: x.sum().item(),
    "reads whether": lambda x: bool(x.any()),
    "leaves": lambda x: x.to("meta"),
    "counts": lambda x: x.nonzero(),
    "picks by a mask": lambda x: x[x > 0],
    "puts by a mask": lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
    "repeats": lambda x: x.repeat_interleave(torch.tensor([1, 2])),
    "moves": lambda x: torch.empty(2, device="meta").copy_(x),
}
DEVICE = {
    "computes": lambda x: (x @ x).softmax(0),
    "picks by numbers": lambda x: x[torch.tensor([1, 0])],
    "puts": lambda x: x.index_copy_(0, torch.tensor([0]), torch.ones(1)),
    "chooses": lambda x: torch.where(x > 0, x, 0.0),
    "casts": lambda x: x.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", [*HOST, *DEVICE])
def test_what_the_host_waits_for_is_seen(name: str) -> None:
    output, found = torch_names.run_watched(lambda: (HOST | DEVICE)[name](torch.ones(2)), torch.device("cpu"))
    assert output is not None
    assert (found is not None) == (name in HOST)
    # What the host does with tensors of its own meanwhile is its own affair.
    alone = torch_names.run_watched(lambda: (HOST | DEVICE)[name](torch.ones(2)), torch.device("cuda"))[1]
    assert alone is None


def test_own_state_has_parameters_and_persistent_buffers_and_no_child_s() -> None:
    norm = nn.BatchNorm1d(2)
    norm.register_buffer("passing", torch.ones(1), persistent=False)
    norm.child = nn.Linear(1, 1)
    own = torch_names.own_state(norm)
    assert list(own) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert own["weight"] is norm.weight


def test_a_module_that_keeps_its_dtype_moves_and_is_not_cast() -> None:
    class Keeps(torch_names.KeepsDtype):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

    keeps = Keeps()
    assert keeps.bfloat16().layer.weight.dtype == keeps.to(torch.float64).layer.weight.dtype == torch.float32
    assert keeps.to("meta").layer.weight.device.type == "meta"
    # The outermost module is enough: Float16Module casts what holds a codec.
    assert nn.ModuleList([Keeps()]).half()[0].layer.weight.dtype == torch.float32


def test_forms_of_nested_inputs_are_equal_and_hash_alike() -> None:
    (leaves, form), (others, other) = (torch_names.flatten(({"x": [x, (x,)]}, None)) for x in (1, 2))
    assert (leaves, others) == ([1, 1, None], [2, 2, None])
    assert (form, hash(form)) == (other, hash(other))
    assert torch_names.unflatten([3, 4, 5], form) == ({"x": [3, (4,)]}, 5)


def test_cublas_workspaces_can_be_cleared_in_builds_with_cuda() -> None:
    assert hasattr(torch._C, "_cuda_clearCublasWorkspaces") is (torch.version.cuda is not None)


# The CPU backend -------------------------------------------------------------------------------------------------


def test_everything_that_the_cpu_backend_replaces_is_there() -> None:
    from megatron_mimo.compat.cuda_answers import answers
    from megatron_mimo.compat.megatron_on_cpu import mends

    replaced = [*answers(), *mends()]
    assert len(replaced) > 90
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name, _ in replaced if not hasattr(owner, name)]
    assert not missing


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("megatron.core.tensor_parallel.random._set_cuda_rng_state", ["new_state", "device", "graph_safe"]),
        ("megatron.core.tensor_parallel.random._get_share_storage", []),
        ("megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__", ["self", "fp8"]),
        ("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict", ["self"]),
        ("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict", ["self", "state_dict"]),
        (
            "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
            ["self", "model_param", "tensors"],
        ),
        ("torch.utils._device.DeviceContext.__init__", ["self", "device"]),
        ("torch.load", ["f", "map_location"]),
    ],
)
def test_what_is_mended_takes_what_the_mend_takes(path: str, expected: list[str]) -> None:
    assert parameters(path)[: len(expected)] == expected


def test_the_tracker_s_remark_that_is_dropped_is_still_made() -> None:
    from megatron_mimo.compat.megatron_on_cpu import OneGenerator

    assert OneGenerator.TEXT in inspect.getsource(importlib.import_module(OneGenerator.LOGGER))


# Triton ----------------------------------------------------------------------------------------------------------


def test_compiled_triton_kernels_take_what_a_direct_launch_hands_them() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch's CUDA builds")
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
    from triton.compiler import CompiledKernel

    from megatron_mimo.compat import triton as direct

    assert direct.DIRECT, "a version of Triton that is not tested: kernels launch by Triton; see compat/triton.py"
    assert "run" in vars(CompiledKernel) and "packed_metadata" in inspect.getsource(CompiledKernel)
    # run(grid_0, grid_1, grid_2, stream, function, metadata, launch metadata, two hooks, arguments)
    assert list(inspect.signature(CudaLauncher.__call__).parameters)[:5] == [
        "self", "gridX", "gridY", "gridZ", "stream",
    ]  # fmt: skip
    assert "get_current_stream" in inspect.getsource(CudaDriver.__init__) + inspect.getsource(CudaDriver.__mro__[1])


# Megatron --------------------------------------------------------------------------------------------------------


def test_ddp_s_hook_is_known_by_its_module() -> None:
    ddp = named("megatron.core.distributed.distributed_data_parallel.DistributedDataParallel")
    layer = nn.Linear(1, 1)
    ours = layer.register_forward_pre_hook(lambda module, inputs: None)
    layer.register_forward_pre_hook(hook := ddp._make_forward_pre_hook(object()))
    assert megatron.gather_hooks(layer) == [hook]
    with megatron.without_gather_hooks([layer]):
        assert megatron.gather_hooks(layer) == []
        assert list(torch_names.forward_pre_hooks(layer)) == [ours.id]
    assert megatron.gather_hooks(layer) == [hook]


@pytest.mark.parametrize("apply_wd_to_qk_layernorm", [False, True])
def test_the_first_standard_override_is_that_of_biases_and_norms(apply_wd_to_qk_layernorm: bool) -> None:
    from megatron.core.optimizer import OptimizerConfig, get_standard_config_overrides

    config = OptimizerConfig(lr=1.0, decoupled_lr=2.0, apply_wd_to_qk_layernorm=apply_wd_to_qk_layernorm)
    overrides = get_standard_config_overrides(config)
    (key,) = megatron.key_without_decay(overrides)
    assert overrides[key] == {"wd_mult": 0.0}
    assert [value for value in overrides.values() if "wd_mult" in value] == [{"wd_mult": 0.0}]
    assert key.matches(nn.Parameter(torch.ones(2)), "norm.weight")
    assert not key.matches(nn.Parameter(torch.ones(2, 2)), "linear.weight")
    assert megatron.key_without_decay({}) == ()


def test_optimizers_have_what_describes_their_state() -> None:
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.optimizer import FP32Optimizer

    optimizer = FP32Optimizer.__new__(FP32Optimizer)
    optimizer.init_state_fn = None
    chained = ChainedOptimizer.__new__(ChainedOptimizer)
    chained.chained_optimizers = [optimizer]
    assert "self.chained_optimizers = chained_optimizers" in inspect.getsource(ChainedOptimizer.__init__)
    assert megatron.single_optimizers(optimizer) == megatron.single_optimizers(chained) == [optimizer]
    megatron.describe_momentum(chained)
    weight = nn.Parameter(torch.ones(2))
    for momentum, described in ((0.9, ["momentum_buffer"]), (0.0, [])):
        sgd = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
        optimizer.init_state_fn(sgd, None)
        assert list(sgd.state[weight]) == described
    kept = optimizer.init_state_fn
    megatron.describe_momentum(optimizer)
    assert optimizer.init_state_fn is kept


def test_the_queue_of_writers_is_the_module_s_own_where_it_has_one() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    with megatron.writers_report_here():
        assert filesystem_async.get_write_results_queue() is filesystem_async._results_queue is not before
    assert filesystem_async._results_queue is before


def test_megatrons_loop_looks_up_what_it_loads_and_saves_by(monkeypatch) -> None:
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    before = dist_checkpointing.load
    with checkpoints.checkpoints_by(load=print):
        assert checkpointing.dist_checkpointing.load is print
    assert dist_checkpointing.load is before
    source = inspect.getsource(checkpointing)
    assert all(f"dist_checkpointing.{name}(" in source for name in ("load", "load_common_state_dict", "save"))


@pytest.mark.parametrize(
    ("tracked", "step", "found"),
    [("3", None, "iter_0000003"), ("3", 2, "iter_0000002"), ("release", None, "release"), (None, 2, "iter_0000002")],
)
def test_the_directory_that_megatron_loads_is_that_of_its_tracker_or_of_ckpt_step(tracked, step, found, tmp_path):
    for name in ("iter_0000002", "iter_0000003", "release"):
        (tmp_path / name).mkdir()
    if tracked is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracked)
    assert checkpoints.directory_to_load(argparse.Namespace(ckpt_step=step), str(tmp_path)) == tmp_path / found
    assert checkpoints.directory_to_load(argparse.Namespace(ckpt_step=None), str(tmp_path / "new")) is None


def test_the_names_of_a_description_and_of_a_tensor_are_there() -> None:
    for table in (checkpoints.DESCRIPTION_NAMES, checkpoints.TENSOR_NAMES):
        for module, names in table.items():
            assert all(named(f"{module}.{name}") for name in names)


def test_layers_ask_the_tracker_for_forks(single_process) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel import random as megatron_random

    tracker = get_cuda_rng_tracker()
    assert tracker is megatron_random.get_cuda_rng_tracker()
    before, kept = torch.get_rng_state(), tracker.fork
    # TransformerEngine's attention keeps the method from when it was built.
    for fork in (lambda: tracker.fork(), kept):
        states = dict(tracker.states_)
        with megatron.tracker_without_forks(), fork():
            assert torch.equal(torch.get_rng_state(), before)
        assert tracker.states_.keys() == states.keys()
        assert all(tracker.states_[name] is state for name, state in states.items())
        with fork():
            assert not torch.equal(torch.get_rng_state(), before)
        assert torch.equal(torch.get_rng_state(), before)


def test_norms_chosen_at_import_are_those_of_megatron_s_own_specs(single_process) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    for spec in (get_gpt_layer_local_spec(), get_vit_layer_with_local_spec()):
        assert spec.submodules.input_layernorm in megatron.norms_chosen_at_import()


def test_a_hybrid_stack_reads_its_final_norm_where_ours_puts_it(single_process) -> None:
    from megatron.core.models.hybrid.hybrid_block import HybridStack

    source = inspect.getsource(HybridStack)
    assert "self.final_norm = TENorm(" in source
    assert source.count("if self.post_process and self.post_layer_norm:") == 2


def test_the_halves_of_a_gpt_layer_are_all_of_it(single_process) -> None:
    """A field that a new version adds belongs to one of `stack_layers`' halves, or this fails."""
    from dataclasses import fields

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    layer, nothing = get_gpt_layer_local_submodules(), TransformerLayerSubmodules()
    stack = hybrid.stack_layers(tiny.language_config(), transformer_engine=False)
    for field in fields(layer):
        if field.name == "sharded_state_dict_keys_map":
            continue
        halves = (getattr(half.submodules, field.name) for half in (stack.attention_layer, stack.mlp_layer))
        default = getattr(nothing, field.name)
        given = [half for half in halves if half is not default]
        assert len(given) == (getattr(layer, field.name) is not default), field.name


def test_buffers_hold_the_gradients_of_every_parameter_that_trains(single_process) -> None:
    model = tiny.megatron_mimo.MimoModel(tiny.mimo_config())
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    buffers = megatron.gradient_buffers(wrapped)
    held = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert held == {parameter.main_grad.untyped_storage().data_ptr() for parameter in model.parameters()}


def test_a_tied_copy_is_marked_where_megatron_marks_it() -> None:
    language_module = named("megatron.core.models.common.language_module.language_module")
    assert ".shared_embedding = True" in inspect.getsource(language_module)
    weight = nn.Parameter(torch.ones(1))
    assert not megatron.is_tied_copy(weight)
    weight.shared_embedding = True
    assert megatron.is_tied_copy(weight)


def test_gradients_are_summed_by_the_names_that_are_looked_for() -> None:
    finalize = inspect.getsource(sys.modules["megatron.core.distributed.finalize_model_grads"])
    assert re.findall(r'"(\w+)" in name', finalize) == ["q_layernorm", "k_layernorm"]
    assert "average_gradients_across_tp_domain" in finalize
    for normed in (False, True):
        config = tiny.language_config(qk_layernorm=normed)
        assert megatron.summed_by_name("encoder.k_layernorm.weight", config) == normed
        assert not megatron.summed_by_name("encoder.layernorm.weight", config)


def test_embeddings_have_the_options_that_alignment_asks_about(single_process) -> None:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    from megatron_mimo.lookup import plain_lookup

    config = tiny.language_config()
    embedding = LanguageModelEmbedding(config, 16, 8, position_embedding_type="rope")
    assert plain_lookup(embedding) is embedding.word_embeddings
    assert embedding.word_embeddings.gtp_remat_size == 1
    assert (config.use_mup, config.fp32_residual_connection, config.mup_embedding_mult) == (False, False, 1.0)
    learned = LanguageModelEmbedding(config, 16, 8, position_embedding_type="learned_absolute")
    assert plain_lookup(learned) is None


# megatron.training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("enter", "module", "name"),
    [
        (megatron_training.optimizer_config_by, "megatron.training.training", "get_megatron_optimizer_config"),
        (megatron_training.train_step_by, "megatron.training.training", "train_step"),
        (megatron_training.full_iterations_by, "megatron.training.training", "FullCudaGraphWrapper"),
    ],
)
def test_a_function_of_the_loop_is_ours_meanwhile_and_looked_up_in_its_module(enter, module: str, name: str) -> None:
    module = importlib.import_module(module)
    before = getattr(module, name)
    with pytest.raises(ZeroDivisionError), enter(lambda theirs: [theirs]):
        assert getattr(module, name) == [before]
        raise ZeroDivisionError
    assert getattr(module, name) is before
    callers = [
        function for other, function in vars(module).items()
        if inspect.isfunction(function) and other != name and name in function.__code__.co_names
    ]  # fmt: skip
    assert callers


def test_megatron_starts_on_the_cpu_by_the_names_that_are_replaced() -> None:
    from megatron.training import arguments, training

    assert "allow_no_cuda" in parameters("megatron.training.training.initialize_megatron")
    assert "get_device_arch_version" in vars(arguments)
    begin, asked = training.initialize_megatron, arguments.get_device_arch_version
    with megatron_training.initialized_on_the_cpu(lambda args: None):
        assert training.initialize_megatron is not begin
        assert arguments.get_device_arch_version() == 10
    assert (training.initialize_megatron, arguments.get_device_arch_version) == (begin, asked)


def test_the_wheel_has_its_dataset_helpers_compiled_and_no_makefile() -> None:
    from megatron.core.datasets import utils

    compile_helpers = utils.compile_helpers
    with megatron_training.compiled_dataset_helpers():
        assert utils.compile_helpers is not compile_helpers
        utils.compile_helpers()
    assert utils.compile_helpers is compile_helpers
    assert not Path(utils.__file__).with_name("Makefile").exists()
    assert "from megatron.core.datasets.utils import compile_helpers" in inspect.getsource(
        named("megatron.training.initialize._compile_dependencies")
    )


def test_help_texts_are_printed_whatever_percent_signs_they_hold() -> None:
    parser = argparse.ArgumentParser(prog="train")
    parser.add_argument("--warmup", default=3, help="%(default)s steps, or 1% of them")
    with pytest.raises((ValueError, TypeError)):
        parser.format_help()
    assert "1% of them" in megatron_training.with_printable_help(parser).format_help()


# Notices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notice", [*notices.WARNED, *notices.LOGGED], ids=lambda notice: notice.said_by)
def test_a_notice_that_is_answered_is_still_said(notice: notices.Notice) -> None:
    source = inspect.getsource(importlib.import_module(notice.said_by))
    joined = re.sub(r"""(['"])\s*f?\1""", "", source)  # literals that lie on two lines
    assert notice.text in joined, f"{notice.said_by} no longer says it: remove the line of compat/notices.py"


@pytest.mark.parametrize("notice", notices.WARNED, ids=lambda notice: notice.said_by)
def test_what_is_answered_is_that_text_from_that_module_alone(notice: notices.Notice) -> None:
    def said(text: str, module: str) -> bool:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with notices.Answered():
                warnings.warn_explicit(text, UserWarning, "file.py", 1, module=module)
        return bool(heard)

    assert not said(notice.text, notice.said_by)
    assert said(notice.text, "__main__")
    assert said(notice.text, f"{notice.said_by}.other")
    assert said(f"Beware. {notice.text}", notice.said_by)


def test_entered_twice_the_last_to_leave_takes_the_filters_away(no_run) -> None:
    before = list(warnings.filters)
    loggers = [logging.getLogger(notice.said_by) for notice in notices.LOGGED]
    with notices.Answered():
        with notices.Answered():
            pass
        assert len(warnings.filters) == len(before) + len(notices.WARNED)
        assert all(logger.filters for logger in loggers)
        warnings.filterwarnings("error", "one of the program's own")
    assert warnings.filters[0][0] == "error"
    del warnings.filters[0]
    assert warnings.filters == before
    assert not any(logger.filters for logger in loggers)


def readme_example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", ROOT.joinpath("README.md").read_text(), flags=re.DOTALL)
    return code


@pytest.mark.process
def test_the_readme_s_example_prints_nothing(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(readme_example())
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=child_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def child_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONWARNINGS")}
    return kept | {"PYTHONPATH": str(ROOT)}


@pytest.mark.process
def test_importing_the_package_answers_nothing_for_good() -> None:
    program = (
        "import logging, warnings; before = list(warnings.filters); import megatron_mimo;"
        "megatron_mimo.MimoModel, megatron_mimo.specs, megatron_mimo.training.Trainer;"
        "ours = [f for f in warnings.filters if f[1] and 'Apex' in f[1].pattern]; assert not ours, ours;"
        "assert not logging.getLogger('megatron.core.models.gpt.gpt_model').filters"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=child_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_leaves_of_a_graph_are_the_parameters_it_uses() -> None:
    used, unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    given = unused(torch.ones(1, 2))
    assert torch_names.leaves_of(used(given), given) == {id(p) for p in used.parameters()}
    assert torch_names.leaves_of(used(given)) == {id(p) for p in (*used.parameters(), *unused.parameters())}
    again = torch.utils.checkpoint.checkpoint(used, given, use_reentrant=True)
    assert torch_names.leaves_of(again) is None


def test_losses_of_experts_take_a_schedule_s_scale_after_a_backward_pass_without_one() -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    activation = MoEAuxLossAutoScaler.apply(torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True))
    activation.sum().backward()
    megatron.forget_scale_of_expert_losses()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.shape == (1,)
    megatron.forget_scale_of_expert_losses()
