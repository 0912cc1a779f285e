"""An encoder's forward and backward pass as CUDA graphs, for encoders that wait for their own launches.

A vision transformer of a few hundred million parameters on a few images launches over a thousand
kernels of some ten microseconds each: the host needs longer to launch them than the device to run them. A CUDA
graph launches all of them at once.

    graphs of a shape are captured once:    inputs -> [forward graph] -> output
                                            gradient of the output -> [backward graph] -> gradients
    and then replayed on the same memory:   copy the inputs in, replay, read the output

One capture serves one forward pass until its backward pass is done. A pipeline runs several forward
passes ahead; those beyond `captures` run without a graph, as do shapes that come up after that many.

A capture keeps the activations of one forward pass for good, in a pool of its own; what the encoder needs
beyond them for its backward pass is the price in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.func import functional_call

from megatron_mimo.compat.megatron import tracker_without_forks
from megatron_mimo.compat.torch import clear_cublas_workspaces, flatten, unflatten
from megatron_mimo.cudnn import check_one_cudnn
from megatron_mimo.graphs import capture, new_graph, places_of
from megatron_mimo.idle import gather_parameters
from megatron_mimo.training.parts.compiled import CompiledForward

logger = logging.getLogger(__name__)

# As many eager passes as torch.cuda.make_graphed_callables makes before it captures: lazy
# initialisation of libraries must not end up in the graph.
WARMUP_PASSES = 3

_HERE = object()  # where a tensor was
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)


class GraphedForward:
    """Stands in for the `forward` of an encoder and replays CUDA graphs of it.

    Args:
        encoder: on a GPU, without dropout and without waiting for the device in its forward pass.
            Inputs that need a gradient, tensors on the host and objects that may hold tensors run
            without a graph. It returns a tensor, or a tuple or mapping whose
            first element is one, of which that element is kept.
        captures: at most this many graphs. Each keeps the activations of one forward pass.
        compiled: capture the encoder's kernels as `torch.compile` makes them. Passes that no graph
            serves run these too if their shape was captured, otherwise the encoder's own.

    Raises:
        ValueError: there is no GPU, the process has two cuDNN, or the encoder has dropout, running statistics,
            activation recomputation or fused gradient accumulation.
    """

    def __init__(self, encoder: nn.Module, captures: int = 2, compiled: bool = False) -> None:
        _check(encoder)
        self._encoder, self._forward = encoder, encoder.forward
        self._captured_forward = CompiledForward(encoder, dynamic=False) if compiled else self._forward
        self._parts, self._parameters = tuple(encoder.modules()), tuple(encoder.parameters())
        self._limit = captures
        self._captures: list[_Capture] = []
        self._places = places_of(encoder)

    def __call__(self, *args, **keywords):
        """The encoder's output for these inputs."""
        if (places := places_of(self._encoder)) != self._places:  # captures know those of before
            self._captures.clear()
            self._places, self._parts = places, tuple(self._encoder.modules())
            self._parameters = tuple(self._encoder.parameters())
        gather_parameters(self._parts)  # a replay runs none of its parts' hooks
        inputs = _Inputs(args, keywords)
        if torch.cuda.is_current_stream_capturing() or not inputs.fit_a_graph(self._parameters):
            return self._forward(*args, **keywords)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
        key = (trains, self._encoder.training, *inputs.key)
        free = self._free(key, inputs, trains)
        if free is None:
            if not any(made.key == key for made in self._captures):
                return self._forward(*args, **keywords)
            with tracker_without_forks():
                return self._captured_forward(*args, **keywords)
        if not trains:
            return free.replay(inputs.tensors).clone()
        return _Replay.apply(free, len(inputs.tensors), *inputs.tensors, *self._parameters)

    def _free(self, key: tuple, inputs: _Inputs, trains: bool) -> _Capture | None:
        """A capture of this key whose last forward pass is done with, made if there is room."""
        for made in self._captures:
            if made.key == key and not made.busy:
                return made
        if len(self._captures) == self._limit:
            return None

        logger.info("capturing an encoder of inputs %s", [list(t.shape) for t in inputs.tensors])
        call = _Call(self._encoder, self._captured_forward, inputs)
        made = _Capture(key, call, inputs.tensors, self._parameters if trains else ())
        self._captures.append(made)
        return made


class _Inputs:
    """What an encoder is called with, taken apart: tensors, however nested, which may change, and the rest."""

    def __init__(self, args: tuple, keywords: dict[str, object]) -> None:
        leaves, self._form = flatten((args, keywords))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._rest = [_HERE if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def fit_a_graph(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether a replay for other tensors and the same rest is right.

        Not with tensors on the host, whose values the encoder may look at, nor with objects that may
        hold tensors.
        """
        device = parameters[0].device if parameters else None
        return all(t.device == device and not t.requires_grad for t in self.tensors) and all(
            leaf is _HERE or leaf is None or isinstance(leaf, _PLAIN) for leaf in self._rest
        )

    @property
    def key(self) -> tuple:
        """Equal for inputs that one capture serves."""
        rest = tuple((type(leaf), leaf) for leaf in self._rest)
        return self._form, rest, tuple((t.shape, t.dtype) for t in self.tensors)

    def put_together(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, object]]:
        """Arguments and keyword arguments with `tensors` in place of their own."""
        values = iter(tensors)
        leaves = [next(values) if leaf is _HERE else leaf for leaf in self._rest]
        return unflatten(leaves, self._form)


class _Call(nn.Module):
    """An encoder's own forward pass, of its tensor inputs in order."""

    def __init__(self, encoder: nn.Module, forward: Callable, inputs: _Inputs) -> None:
        super().__init__()
        self.encoder = encoder
        self._forward, self._put_together = forward, inputs.put_together

    def forward(self, *values: Tensor) -> Tensor:
        args, keywords = self._put_together(values)
        output = self._forward(*args, **keywords)
        while not isinstance(output, Tensor):
            output = next(iter(output.values() if isinstance(output, Mapping) else output))
        return output


class _Capture:
    """Graphs of one shape and the memory that they work on."""

    def __init__(self, key: tuple, call: _Call, inputs: Sequence[Tensor], parameters: tuple[nn.Parameter, ...]) -> None:
        self.key, self.busy = key, False
        # The parameters' memory under other names: autograd hangs a node on each leaf that remembers
        # the stream of its first use, and one of an earlier, ordinary pass would break the capture.
        # They are parameters too, so that what is compiled for them serves an ordinary pass.
        aliases: dict[str, Tensor] = {
            name: nn.Parameter(parameter.detach(), parameter.requires_grad and bool(parameters))
            for name, parameter in call.named_parameters()
        }
        self._trained = [alias for alias in aliases.values() if alias.requires_grad]
        self._places = [parameter.requires_grad for parameter in parameters]
        self._inputs = [tensor.clone() for tensor in inputs]
        self._forward, self._backward = new_graph(), new_graph()
        pool = torch.cuda.graph_pool_handle()
        with tracker_without_forks(), torch.set_grad_enabled(bool(self._trained)):
            forward = partial(functional_call, call, aliases)
            kept = self._warm_up(forward)
            with capture(self._forward, pool):
                # The pool begins with one block for all that a forward pass keeps: grown piece by piece,
                # a segment for each tensor, it would be larger.
                torch.empty(kept, dtype=torch.uint8, device=self._inputs[0].device)
                output = forward(tuple(self._inputs))
            self._output = output.detach()
            if self._trained:
                self._gradient = torch.empty_like(output)
                with capture(self._backward, pool):
                    self._gradients = torch.autograd.grad(output, self._trained, self._gradient, allow_unused=True)

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output for `inputs`, in memory that the next replay writes over."""
        for static, tensor in zip(self._inputs, inputs):
            static.copy_(tensor)
        self._forward.replay()
        return self._output

    def replay_backward(self, gradient: Tensor) -> list[Tensor | None]:
        """The gradient of every parameter, None for those without one."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        # Views, and kept: a gradient that nobody else holds would become `param.grad` itself, and the
        # next replay would write over what was accumulated there. Held, it is copied.
        self._given = [None if g is None else g.detach() for g in self._gradients]
        gradients = iter(self._given)
        return [next(gradients) if trained else None for trained in self._places]

    def _warm_up(self, forward: Callable[[tuple[Tensor, ...]], Tensor]) -> int:
        """Runs both passes a few times and gives the bytes that the forward pass keeps for the backward pass."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(WARMUP_PASSES):
                output, before = None, torch.cuda.memory_allocated()
                output = forward(tuple(self._inputs))
                kept = torch.cuda.memory_allocated() - before
                if self._trained:
                    torch.autograd.grad(output, self._trained, torch.zeros_like(output), allow_unused=True)
        torch.cuda.synchronize()
        # What cuBLAS works with on that stream, which nothing runs on any more.
        clear_cublas_workspaces()
        return kept


class _Replay(torch.autograd.Function):
    """Both graphs as one node of the autograd graph."""

    @staticmethod
    def forward(ctx, capture: _Capture, inputs: int, *tensors: Tensor) -> Tensor:
        capture.busy = True
        ctx.capture, ctx.inputs = capture, inputs
        # A view: autograd writes its own node into what is returned.
        output = capture.replay(tensors[:inputs])
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradients = ctx.capture.replay_backward(gradient)
        ctx.capture.busy = False
        return None, None, *([None] * ctx.inputs), *gradients


def _check(encoder: nn.Module) -> None:
    name = type(encoder).__name__
    if not torch.cuda.is_available():
        raise ValueError(
            f"{name}: CUDA graphs need a GPU, found none. Leave the encoder out of `graphed` (--graph-encoders)."
        )
    check_one_cudnn(f"{name}: CUDA graphs")
    for module in encoder.modules():
        if isinstance(module, MegatronModule) and module.config.gradient_accumulation_fusion:
            raise ValueError(
                f"{name}: gradient_accumulation_fusion adds gradients to a buffer that the capture does "
                "not know. Set it to False in the encoder's configuration, or leave the encoder out of "
                "`graphed`."
            )
        if isinstance(module, MegatronModule) and module.config.recompute_granularity is not None:
            raise ValueError(
                f"{name}: Megatron's activation recomputation (recompute_granularity="
                f"{module.config.recompute_granularity!r}) cannot be captured. Leave it out of the encoder's "
                "configuration (--encoder-recompute-granularity), or the encoder out of `graphed`."
            )
        if module.training and getattr(module, "track_running_stats", False):
            raise ValueError(
                f"{name}: it has {type(module).__name__}, whose running statistics the passes before a capture "
                "would move. Freeze the encoder, or leave it out of `graphed`."
            )
        drops = isinstance(module, nn.Dropout) and module.p > 0
        if isinstance(module, MegatronModule):
            drops = module.config.hidden_dropout > 0 or module.config.attention_dropout > 0
        if drops:
            raise ValueError(
                f"{name}: it has dropout, which would draw the same numbers in every replay of a CUDA "
                "graph. Set its dropout to 0, or leave the encoder out of `graphed`."
            )
