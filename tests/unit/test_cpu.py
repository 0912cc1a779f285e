"""The CPU backend answers Megatron's CUDA calls, and takes every answer back."""

import copy
import functools
import importlib
import inspect
import io
import logging
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from megatron_mimo import specs
from megatron_mimo.compat import cuda_streams
from megatron_mimo.compat.cuda_on_cpu import cpu_backend_enabled, disable_cpu_backend, enable_cpu_backend


@pytest.fixture
def backend(no_run):
    """The CPU backend, enabled for one test."""
    enable_cpu_backend(force=True)
    yield
    disable_cpu_backend()


def _owners() -> list[object]:
    """Everything whose attributes the backend may replace."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] in ("torch", "megatron")]
    return [*modules, torch.Tensor, megatron_random.CheckpointWithoutOutput, DistributedOptimizer]


def test_every_attribute_is_restored_exactly(no_run) -> None:
    enable_cpu_backend(force=True)
    disable_cpu_backend()
    before = [(owner, dict(vars(owner))) for owner in _owners()]
    stance = torch._dynamo.eval_frame._stance
    enable_cpu_backend(force=True)
    changed = sum(vars(owner).get(name) is not value for owner, was in before for name, value in was.items())
    assert changed > 40
    disable_cpu_backend()
    for owner, was in before:
        now = vars(owner)
        assert now.keys() == was.keys(), owner
        assert not [name for name, value in was.items() if now[name] is not value], owner
    assert torch._dynamo.eval_frame._stance == stance
    assert not logging.getLogger(megatron_random.__name__).filters


def test_enabling_and_disabling_twice_is_enabling_and_disabling_once(no_run) -> None:
    zeros = torch.zeros
    assert not cpu_backend_enabled()
    enable_cpu_backend(force=True)
    wrapped = torch.zeros
    enable_cpu_backend(force=True)
    assert cpu_backend_enabled()
    assert torch.zeros is wrapped
    disable_cpu_backend()
    disable_cpu_backend()
    assert not cpu_backend_enabled()
    assert torch.zeros is zeros


def test_a_gpu_is_not_ignored_unless_forced(no_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(RuntimeError, match=r"found 8 CUDA device\(s\).*force=True"):
        enable_cpu_backend()
    assert not cpu_backend_enabled()
    enable_cpu_backend(force=True)
    assert not torch.cuda.is_available()
    disable_cpu_backend()
    assert torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), 0])
def test_cuda_devices_are_read_as_the_cpu(backend, device) -> None:
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1], device=device),
        torch.empty_like(torch.ones(2), device=device),
        torch.ones(2).new_zeros(2, device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.float64),
        torch.ones(2).cuda(),
        *torch.nn.Linear(2, 2).cuda().parameters(),
        *torch.nn.Linear(2, 2).to(torch.device("cuda")).parameters(),
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_other_devices_and_plain_calls_are_left_alone(backend) -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.ones(2).to("meta").device.type == "meta"
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


def test_pinned_memory_is_ordinary_memory(backend) -> None:
    assert torch.ones(2).pin_memory().tolist() == [1, 1]
    assert torch.zeros(2, pin_memory=True).tolist() == [0, 0]


def test_streams_and_events_are_already_done(backend) -> None:
    stream, start, end = torch.cuda.Stream(device="cuda", priority=-1), *[torch.cuda.Event() for _ in range(2)]
    with torch.cuda.stream(stream), stream:
        start.record()
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(stream.record_event())
        torch.ones(2).record_stream(stream)
        stream.record_event(end)
    for waiting in (stream, end):
        waiting.synchronize()
        assert waiting.query()
    end.wait()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) >= 0
    assert torch.cuda.Stream.priority_range() == (0, 0)


def test_questions_about_device_and_memory_have_harmless_answers(backend) -> None:
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == (False, 0)
    assert (torch.cuda.get_device_name(), torch.cuda.get_device_capability()) == ("cpu", (0, 0))
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.set_device(0)
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_reserved() == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    torch.cuda.nvtx.range_push("layer")
    torch.cuda.nvtx.range_pop()


def test_tensor_type_has_its_cuda_name_in_megatron_s_optimizers_only(backend) -> None:
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    there = eval("lambda tensor: tensor.type()", vars(optimizer))
    for dtype, name in ((torch.float32, "FloatTensor"), (torch.bfloat16, "BFloat16Tensor")):
        tensor = torch.ones(1, dtype=dtype)
        assert there(tensor) == f"torch.cuda.{name}"
        assert tensor.type() == f"torch.{name}"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_cuda_random_states_are_those_of_the_cpu_generator(backend) -> None:
    torch.cuda.manual_seed(11)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.manual_seed_all(11)
    assert torch.equal(torch.rand(3), first)


def test_the_tracker_forks_and_restores_without_a_remark(single_process, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    tracker = megatron_random.get_cuda_rng_tracker()
    with caplog.at_level(logging.WARNING):
        with tracker.fork():
            first = torch.rand(2)
        with tracker.fork():
            second = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.equal(first, second)
    assert not caplog.records


def _step(**changes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of a model with dropout."""
    megatron_random.model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, hidden_dropout=0.2, attention_dropout=0.2, **changes
    )
    spec = specs.language_layer_spec(config, "torch")
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=8).cuda()
    ids = torch.arange(16, device="cuda").view(2, 8)
    loss = model(ids, ids % 8, None, labels=ids)
    loss.sum().backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    ],
    ids=["full", "core_attn", "layernorm"],
)
def test_recomputed_activations_repeat_their_dropout_exactly(single_process, recompute) -> None:
    loss, gradients = _step()
    again, recomputed = _step(**recompute)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_functions_that_megatron_compiles_run_without_a_compiler(single_process, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    loss, _ = _step(bias_activation_fusion=True, bias_dropout_fusion=True)
    assert loss.isfinite().all()


def test_torch_compile_works_again_after_the_backend(no_run) -> None:
    enable_cpu_backend(force=True)
    disable_cpu_backend()
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph

    assert torch.compile(lambda x: x + torch.ones(2), backend=count)(torch.ones(2)).tolist() == [2, 2]
    assert len(traced) == 1


def test_single_stream_stands_for_every_stream(backend) -> None:
    assert torch.cuda.current_stream() is torch.cuda.default_stream() is cuda_streams.STREAM
    torch.cuda.set_stream(torch.cuda.Stream())


# Code that has nothing to do with Megatron, while the backend is on --------------------------------------------------


def made_of_factories(x: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(2) + torch.ones_like(x) + torch.full((2,), 1.0) + torch.tensor([1.0, 2.0])
    return x + made + torch.arange(2) + torch.empty(2).fill_(0.0) + torch.randn(2) * 0 + x.new_zeros(2)


MADE = [4.0, 6.0]  # of ones


class MadeOfFactories(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.float64) + torch.linspace(0, 1, 2) + torch.zeros_like(x)).to(x.dtype)


def test_torchscript_takes_functions_and_modules_that_call_factories(backend) -> None:
    x = torch.ones(2)
    assert torch.jit.script(made_of_factories)(x).tolist() == made_of_factories(x).tolist()
    assert torch.jit.script(MadeOfFactories())(x).tolist() == [1.0, 2.0]
    assert torch.jit.trace(MadeOfFactories(), x)(x).tolist() == [1.0, 2.0]


def test_torchscript_s_table_is_as_before_once_the_backend_is_off(no_run) -> None:
    table = torch.jit._builtins._get_builtin_table()
    before = dict(table)
    enable_cpu_backend(force=True)
    disable_cpu_backend()
    assert table == before


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3)[:, 1:],
        torch.ones(2, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["view", "bfloat16", "parameter", "conjugate", "sparse", "meta"],
)
def test_tensors_are_pickled_and_copied(backend, tensor: torch.Tensor, protocol: int) -> None:
    for again in (pickle.loads(pickle.dumps(tensor, protocol)), copy.deepcopy(tensor), copy.copy(tensor)):
        assert (type(again), again.dtype, again.shape, again.device) == (
            type(tensor), tensor.dtype, tensor.shape, tensor.device,
        )  # fmt: skip
        if not tensor.is_meta:
            assert torch.equal(again.to_dense(), tensor.to_dense())


@pytest.mark.process
def test_functions_that_are_replaced_are_pickled_by_the_names_that_they_stand_for(backend) -> None:
    functions = [
        torch.zeros, torch.as_tensor, torch.randn_like, torch.fft.fftfreq, torch.load, torch.cuda.current_device,
        torch.cuda.synchronize, torch.cuda.manual_seed, torch.Tensor.to, torch.Tensor.new_zeros, torch.Tensor.cuda,
        functools.partial(torch.full, (2,)),
    ]  # fmt: skip
    sent = pickle.dumps(functions)
    assert b"megatron_mimo" not in sent
    received = pickle.loads(sent)
    assert received[:-1] == functions[:-1]
    assert received[-1](3.0).tolist() == [3.0, 3.0]
    done = subprocess.run(  # in a process without the backend they are torch's own
        [sys.executable, "-c", "import pickle, sys; print(pickle.load(sys.stdin.buffer)[0](2).tolist())"],
        input=sent, capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode().strip() == "[0.0, 0.0]"


def test_modules_and_functions_reach_a_process_and_tensors_come_back(backend) -> None:
    sent = ForkingPickler.dumps((torch.nn.Linear(2, 2), torch.ones(2), torch.zeros))
    layer, ones, zeros = pickle.loads(sent)
    assert layer(ones).shape == zeros(2).shape


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", [None, "cpu", "cuda", "cuda:1", torch.device("cuda"), 0, {"cpu": "cpu"}])
def test_files_are_saved_and_loaded_wherever_their_tensors_shall_go(backend, zipped: bool, place) -> None:
    file = io.BytesIO()
    torch.save({"w": torch.arange(3.0)}, file, _use_new_zipfile_serialization=zipped)
    for load in (lambda: torch.load(file, place), lambda: torch.load(file, map_location=place, weights_only=True)):
        file.seek(0)
        assert load()["w"].tolist() == [0, 1, 2]


def test_the_current_device_is_a_number_wherever_one_is_expected(backend) -> None:
    current = torch.cuda.current_device()
    assert type(current) is int
    assert (["first"][current], f"cuda:{current}", {0: 1}[current]) == ("first", "cuda:0", 1)
    devices = [current, torch.device(current), torch.device("cuda", current), torch.device(f"cuda:{current}")]
    for device in devices:
        made = [
            torch.zeros(2, device=device), torch.ones(2).to(device), torch.ones(2).to(device=device),
            torch.ones(2).cuda(device), torch.hann_window(3, device=device), torch.fft.fftfreq(3, device=device),
            torch.normal(0.0, 1.0, (2,), device=device), torch.nn.Linear(2, 2, device=device).weight,
            torch.nn.Linear(2, 2).to(device).weight, torch.nn.Linear(2, 2).cuda(current).weight,
            torch.nn.Linear(2, 2, device="meta").to_empty(device=device).weight,
            torch.nn.utils.rnn.pack_sequence([torch.ones(2)]).to(device).data,
        ]  # fmt: skip
        assert {tensor.device.type for tensor in made} == {"cpu"}
        with torch.cuda.device(device), torch.device(device):
            assert torch.zeros(2).device.type == torch.tensor([1]).device.type == "cpu"
    torch.set_default_device("cuda")
    try:
        assert torch.zeros(2).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_devices_and_functions_are_what_type_checks_take_them_for(backend) -> None:
    assert isinstance(torch.device("cuda"), torch.device)
    assert torch.device("cuda").type == "cuda"
    assert isinstance(torch.zeros(1), torch.Tensor) and type(torch.zeros(1, device="cuda")) is torch.Tensor
    assert isinstance(torch.cuda.Stream(), torch.cuda.Stream) and isinstance(torch.cuda.Event(), torch.cuda.Event)
    for function in (torch.zeros, torch.Tensor.to, torch.Tensor.cuda, torch.cuda.current_device):
        assert callable(function)
        assert function.__name__ == function.__qualname__.rpartition(".")[2]
    assert torch.zeros.__doc__.strip().startswith("zeros(")


@pytest.mark.parametrize(
    "function", [torch.load, torch.distributed.all_to_all_single, torch.Tensor.storage_offset], ids=lambda f: f.__name__
)
def test_signatures_are_those_of_the_functions_that_are_replaced(no_run, function) -> None:
    owner = {"load": torch, "all_to_all_single": torch.distributed}.get(function.__name__, torch.Tensor)

    def signature() -> inspect.Signature | None:
        try:
            return inspect.signature(getattr(owner, function.__name__))
        except ValueError:
            return None  # a builtin has none

    before = signature()
    enable_cpu_backend(force=True)
    during = signature()
    disable_cpu_backend()
    assert during == before


def test_subclasses_of_tensors_see_the_functions_of_torch(backend) -> None:
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    watched = torch.ones(2).as_subclass(Watched)
    torch.zeros_like(watched)
    watched.to(torch.float64)
    assert [func.__name__ for func in seen] == ["zeros_like", "to"]


def test_fx_export_and_vmap_go_through_factories(backend) -> None:
    x = torch.ones(2)
    traced = torch.fx.symbolic_trace(made_of_factories)
    assert traced(x).tolist() == MADE
    assert pickle.loads(pickle.dumps(traced))(x).tolist() == MADE
    exported = torch.export.export(MadeOfFactories(), (x,))
    assert exported.module()(x).tolist() == [1.0, 2.0]
    assert torch.vmap(lambda row: torch.zeros_like(row) + row)(torch.ones(3, 2)).shape == (3, 2)
    with FakeTensorMode():
        assert torch.zeros(2, device="cuda").shape == (2,)


def test_code_that_is_compiled_runs_as_it_is(backend) -> None:
    assert torch.compile(made_of_factories, backend="eager")(torch.ones(2)).tolist() == MADE


def test_loaders_pin_nothing_and_their_workers_have_tensors(backend) -> None:
    loader = DataLoader(torch.arange(4.0), batch_size=2, pin_memory=True)
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]


def test_seeds_and_states_of_every_kind_are_the_cpu_generator_s(backend) -> None:
    torch.cuda.manual_seed(7)
    assert torch.cuda.initial_seed() == torch.initial_seed() == 7
    with torch.random.fork_rng():
        torch.rand(1)
    assert torch.cuda.get_rng_state_all() == []
    first = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), first)
