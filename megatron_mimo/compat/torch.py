"""Private names of torch, one function each: version, reason, and what to do when the name goes.

Checked by `tests/unit/test_compat.py` on the installed version; last read in torch 2.11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


def forward_pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """What runs before a module's forward pass, by the key of its handle; the dict itself, to be changed in place.

    Private: `torch.nn.Module._forward_pre_hooks`, there since torch 0.2.
    Reason: Megatron's DDP hangs the gathering of parameters on it. Where a module does not run, or runs in compiled
    code, we call those hooks ourselves, and torch offers no list of hooks.
    When it goes: wrap `register_forward_pre_hook` before DDP is built, and keep the list there.

    Example:
        >>> forward_pre_hooks(nn.Linear(1, 1))
        OrderedDict()
    """
    return module._forward_pre_hooks


def run_forward_pre_hooks(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Runs what would run before a module's forward pass on `inputs`; what the hooks return is left aside.

    Private, reason, when it goes: see `forward_pre_hooks`.
    """
    for hook in forward_pre_hooks(module).values():
        hook(module, inputs)


def has_output_hooks(module: nn.Module) -> bool:
    """Whether something hangs on a module that may change its output or gradient, or wants its keyword arguments.

    Private: `torch.nn.Module._forward_hooks`, `_backward_hooks` (since torch 0.1), `_backward_pre_hooks`,
    `_forward_pre_hooks_with_kwargs` (since torch 2.0).
    Reason: a module whose work we do in its place has to be run as it is where somebody listens.
    When it goes: run the module as it is in any case; alignment then makes one more pass over the text rows.

    Example:
        >>> has_output_hooks(nn.Linear(1, 1))
        False
    """
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_pre_hooks_with_kwargs
    )


def own_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and persistent buffers by name, without its children's; not detached.

    Private: `torch.nn.Module._save_to_state_dict(destination, prefix, keep_vars)`, since torch 0.4, which subclasses
    override; Megatron calls it likewise.
    Reason: `state_dict` has the children's too, and detaches.
    When it goes: `named_parameters(recurse=False)` and the buffers that `state_dict()` has.

    Example:
        >>> list(own_state(nn.Linear(1, 1)))
        ['weight', 'bias']
    """
    own: dict[str, torch.Tensor] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    return own


class KeepsDtype(nn.Module):
    """A module that moves between devices as any, whose parameters and buffers no cast to another dtype reaches.

    Private: `torch.nn.Module._apply(fn, recurse)`, through which `to`, `half`, `bfloat16` and `cuda` go, since torch
    0.1 (`recurse` since 2.1).
    Reason: `Float16Module` casts the whole model; a codec computes in the dtype that it was trained in.
    When it goes: cast what lies around the codec in place of the whole model.

    Attributes:
        casts_parameters: whether all but the buffers that no checkpoint has are cast as any module's. Those are tables
            such as rotary frequencies, which transformers keeps in float32 beside weights of half precision.
    """

    casts_parameters = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        cast: set[int] = set()
        if self.casts_parameters:
            names = self.state_dict(keep_vars=True).keys()
            tables = {id(one) for name, one in self.named_buffers() if name not in names}
            cast = {id(one) for one in (*self.parameters(), *self.buffers()) if id(one) not in tables}
            cast |= {id(one.grad) for one in self.parameters() if one.grad is not None}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            there = fn(tensor)
            return there if there.dtype == tensor.dtype or id(tensor) in cast else tensor.to(there.device)

        return super()._apply(moved, recurse)


def clear_cublas_workspaces() -> None:
    """Frees what cuBLAS keeps to work with on each stream that it ran on.

    Private: `torch._C._cuda_clearCublasWorkspaces`, of builds with CUDA, since torch 1.11.
    Reason: the stream of a capture's warm-up runs nothing afterwards, and its workspace would stay for good.
    When it goes: leave the call out; a graphed encoder then keeps some megabytes more a capture.
    """
    torch._C._cuda_clearCublasWorkspaces()


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested lists, tuples, dicts and registered types, and the form to put them together again.

    Private: `torch.utils._pytree.tree_flatten`, since torch 1.8; the form can be compared and hashed.
    Reason: an encoder's inputs are nested as its author likes (Hugging Face's outputs are registered there).
    When it goes: `torch.utils.pytree`, which later versions publish, has the same two functions.

    Example:
        >>> leaves, form = flatten({"x": [1, 2]})
        >>> leaves, unflatten([3, 4], form)
        ([1, 2], {'x': [3, 4]})
    """
    from torch.utils import _pytree

    return _pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], form: Any) -> Any:
    """Nested again; see `flatten`.

    Private: `torch.utils._pytree.tree_unflatten`; version, reason and successor are those of `flatten`.
    """
    from torch.utils import _pytree

    return _pytree.tree_unflatten(leaves, form)


def run_watched(call: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
    """What a call gives, and the first operation in it for which host and `device` wait for each other, or None.

    Those are reads of a tensor's values, outputs whose size depends on values, and moves from device to device: what a
    CUDA graph cannot record. Work that goes past torch's operations is not seen.

    Private: `torch.utils._python_dispatch.TorchDispatchMode`, since torch 1.13, of this thread alone.
    Reason: a capture that fails may leave its stream and memory pool behind; `torch.cuda.set_sync_debug_mode` tells
    too, but all threads of the process at once.
    When it goes: record only encoders that the user names.

    Example:
        >>> cpu = torch.device("cpu")
        >>> run_watched(lambda: torch.ones(2).sum().item(), cpu)
        (2.0, 'aten._local_scalar_dense.default')
        >>> run_watched(lambda: torch.ones(2).sum(), cpu)
        (tensor(2.), None)
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watcher(TorchDispatchMode):
        found: str | None = None

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if self.found is None and _waits(func, [*flatten((args, kwargs))[0], *flatten(output)[0]], device.type):
                self.found = str(func)
            return output

    with Watcher() as watcher:
        output = call()
    return output, watcher.found


def _waits(function: Any, values: Sequence[Any], kind: str) -> bool:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    kinds, aten = {tensor.device.type for tensor in tensors}, torch.ops.aten
    if kind not in kinds:
        return False
    if len(kinds) > 1:
        # A single number of the host goes along with the launch, unless it is what is moved.
        moves = function in (aten._to_copy.default, aten.copy_.default)
        return moves or any(tensor.device.type != kind and tensor.dim() for tensor in tensors)
    if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def forget_compiled_names() -> None:
    """Has `torch.compile` look up torch's functions anew.

    Private: `torch._dynamo.trace_rules.clear_lru_cache`, since torch 2.2.
    Reason: its table of torch's functions goes by identity, and may have been built while the CPU backend's
    replacements stood in their places.
    When it goes: call `torch.compiler.reset()`, which also throws away what was compiled.
    """
    from torch._dynamo.trace_rules import clear_lru_cache

    clear_lru_cache()


def build_table_of_factories() -> None:
    """Has torch take note of its factories as they are now, for ``with torch.device(...)``.

    Private: that the table (`torch.utils._device._device_constructors`) is built once, on first use, since torch 2.0.
    Reason: built after the CPU backend's replacements it would hold our functions and miss those that they call.
    When it goes: nothing to do if the table goes by name; otherwise call what builds it.
    """
    with torch.device("meta"):
        torch.empty(0)


def script_as(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[[], None]:
    """Has TorchScript take `function` for the operator that it takes `original` for; gives what undoes that.

    Private: `torch.jit._builtins._get_builtin_table`, a dict from a function's id to an operator's name, since
    torch 1.2.
    Reason: `torch.jit.script` would try to compile the CPU backend's replacement of a factory, and refuse it.
    When it goes: TorchScript, which torch has deprecated, has gone too; remove the calls.
    """
    from torch.jit import _builtins

    table = _builtins._get_builtin_table()
    operator = table.get(id(original))
    if operator is None:
        return lambda: None
    table[id(function)] = operator
    return lambda: table.pop(id(function), None)


def leaves_of(x: torch.Tensor, given: torch.Tensor | None = None) -> set[int] | None:
    """The `id` of every leaf tensor that the autograd graph of `x` ends in; None where a node hides its own graph.

    Undocumented: the attribute `variable` of a graph's `AccumulateGrad` nodes (torch 2.11), and that nodes of
    recomputation (torch's, Megatron's, TransformerEngine's) have "Checkpoint" in their name.
    Reason: nothing else says which parameters a tensor depends on.
    When it goes: `torch.autograd.graph.get_gradient_edge` of each parameter gives the node to look for.

    Args:
        x: any tensor.
        given: a tensor beyond whose node the search does not go.
    """
    found: set[int] = set()
    seen = {None, None if given is None else given.grad_fn}
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if following:
            waiting += [previous for previous, _ in following]
        elif node.name() == "torch::autograd::AccumulateGrad":
            # torch's stubs do not know the class, which only its engine makes.
            found.add(id(node.variable))  # type: ignore[attr-defined]
        if "Checkpoint" in node.name():
            return None
    return found


def own_store() -> dist.Store:
    """The store of the default process group, which knows every rank of the run, through a connection of its own.

    Private: `torch.distributed.distributed_c10d._get_default_store`, there since torch 1.10. Undocumented:
    `Store.clone`, which the types of torch 2.11 lack.
    Reason: a thread tells other ranks what this one does while its main thread waits in a collective, or for the store.
    When it goes: keep the store that `init_process_group` is given; torchrun's is `rendezvous("env://")`'s.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().clone()  # type: ignore[attr-defined]


def watched(operation: Callable[[Callable, tuple, dict], Any]) -> AbstractContextManager:
    """Within it `operation(function, arguments, named)` runs in the place of every operation, backward's too.

    Private: `torch.utils._python_dispatch.TorchDispatchMode`, since torch 1.13, of this thread alone.
    Reason: what tensors are made is seen nowhere else, and `saved_tensors_hooks` sees what is kept alone.
    When it goes: `torch.autograd.graph.saved_tensors_hooks`, and what lives between operations stays uncounted.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return operation(function, args, kwargs or {})

    return Watched()


@contextmanager
def functions_of(**ours: Callable[..., Any]) -> Iterator[None]:
    """Within it `torch.nn.functional` has these functions by their names, for the whole process.

    Undocumented: torch and Megatron look `rms_norm` and `scaled_dot_product_attention` up in the module at each call.
    Reason: a count takes both for one kernel, as they are on a GPU; a `TorchFunctionMode` would be off in backward.
    When it goes: the count is of the operations that the CPU takes in their place.
    """
    before = {name: getattr(F, name) for name in ours}
    for name, function in ours.items():
        setattr(F, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def pretend_world(rank: int, size: int) -> None:
    """Initialises torch.distributed as one rank of many, without the others: collectives move nothing.

    Private: `torch.testing._internal.distributed.fake_pg`, whose import registers the backend "fake", since torch 2.1.
    Reason: a rank's part of a model is built, and what it takes counted, on a machine without the others.
    When it goes: count layouts on as many processes of gloo.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
