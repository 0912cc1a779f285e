"""Which parts of a model train, how fast, and which are compiled.

Parts are named as they are configured:

    language_model                       everything of the language model
    encoders, input_projections, generation_input, decoders, output_projections
                                         that part of every modality
    images                               a whole modality
    images/encoders, images/decoders     one part of it
    images/encoders/clip                 one encoder or decoder
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from numbers import Real
from typing import cast

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_mimo.compat.megatron import is_tied_copy, key_without_decay
from megatron_mimo.config import SUBMODULE_KEYS, MimoModelConfig
from megatron_mimo.modality.submodules import ModalitySubmodules
from megatron_mimo.model import MimoModel
from megatron_mimo.training.parts.compiled import CompiledForward, compile_layers
from megatron_mimo.training.parts.graphed import GraphedForward
from megatron_mimo.training.settings import check_whole

LANGUAGE_MODEL = "language_model"


@dataclass(frozen=True)
class TrainingControl:
    """How the parts of a model train. Everything trains alike unless said otherwise.

    Args:
        frozen: parts without gradient and optimizer state. Their running statistics stay as they are, as in
            evaluation; dropout goes on as configured but for encoders in `evaluating`.
        embedding_rows: token ids whose rows of the language model's embedding train while the
            table's other rows stay as they are, e.g. new special tokens of a frozen language model.
            Tied output weights follow.
        learning_rate: part -> factor on the learning rate.
        weight_decay: part -> factor on the weight decay of those of its parameters that have any.
        compiled: encoders to run through `torch.compile`, named as parts, and 'language_model' for its layers in
            plain torch; see `compiled.py`. On a CPU they run as they are, since that would take a C++ compiler.
        graphed: encoders to replay as CUDA graphs, named as parts; see `graphed.py`. Of encoders that are
            compiled too, what is replayed are the compiled kernels.
        own_precision: frozen encoders, named as parts, whose weights and buffers keep the dtype that they were built
            with, such as float32 beside a language model in bf16. Inputs and rows are cast where modules meet.
        evaluating: frozen encoders, named as parts, that run as in evaluation while the rest trains: without dropout,
            with fixed running statistics.

    Example:
        >>> control = TrainingControl(frozen=("language_model", "images/encoders"), learning_rate={"decoders": 10})
    """

    frozen: Sequence[str] = ()
    embedding_rows: Sequence[int] = ()
    learning_rate: Mapping[str, float] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    compiled: Sequence[str] = ()
    graphed: Sequence[str] = ()
    own_precision: Sequence[str] = ()
    evaluating: Sequence[str] = ()

    def check(self, config: MimoModelConfig) -> None:
        """Refuses parts and token ids that the model does not have; needs no rank.

        Raises:
            TypeError: a factor that is no number, a token id that is no whole one, names in one string.
            ValueError: naming the option, the part and what there is.
        """
        for option in ("frozen", "compiled", "graphed", "own_precision", "evaluating"):
            if isinstance(given := getattr(self, option), str):
                raise TypeError(f"{option} must be a list of parts, got the string {given!r}. Write [{given!r}].")
        of_encoders = ("compiled", "graphed", "own_precision", "evaluating")
        for option in ("frozen", "learning_rate", "weight_decay", *of_encoders):
            for part in getattr(self, option):
                prefixes = parameter_prefixes(part, config, option)
                compiles = option == "compiled" and part == LANGUAGE_MODEL
                if option in of_encoders and "encoders" not in part.split("/") and not compiles:
                    raise ValueError(
                        f"{option}: {part!r} is no encoder. Name encoders, such as 'encoders' or 'images/encoders'."
                    )
                if option in of_encoders[2:] and not all(p.startswith(self.frozen_prefixes(config)) for p in prefixes):
                    raise ValueError(
                        f"{option}: {part!r} trains, expected an encoder that is frozen. Name it in frozen too."
                    )
        for option in ("learning_rate", "weight_decay"):
            for part, factor in getattr(self, option).items():
                if not isinstance(factor, Real):
                    raise TypeError(f"{option}[{part!r}] must be a number, got {factor!r}")
                if not (math.isfinite(factor) and float(factor) >= 0):
                    raise ValueError(f"{option}[{part!r}] must be finite and at least 0, got {factor}")
                self._check_trains(option, part, config)
            _check_apart(option, getattr(self, option), config)
        vocabulary = config.language_model.params.get("vocab_size")
        for row in self.embedding_rows:
            check_whole("embedding_rows: a token id", row)
            if row < 0 or (vocabulary is not None and row >= vocabulary):
                raise ValueError(
                    f"embedding_rows: {row} is outside the vocabulary [0, {vocabulary}): it has no row. "
                    "Give ids inside it, or enlarge the language model's vocab_size."
                )

    def frozen_prefixes(self, config: MimoModelConfig) -> tuple[str, ...]:
        """What the names of the frozen parts' parameters begin with; sorted, none inside another.

        All encoders of a modality, or all decoders, named one by one are `encoders` or `decoders`.
        """
        found = set(self._prefixes(self.frozen, config))
        found |= {whole for whole, parts in _named_parts(config) if found.issuperset(parts)}
        return tuple(sorted(p for p in found if not any(p != other and p.startswith(other) for other in found)))

    def _check_trains(self, option: str, part: str, config: MimoModelConfig) -> None:
        frozen = self.frozen_prefixes(config)
        # Rows of a frozen embedding train, though without weight decay.
        rows = part == LANGUAGE_MODEL and option == "learning_rate" and bool(self.embedding_rows)
        if not rows and frozen and all(p.startswith(frozen) for p in parameter_prefixes(part, config, option)):
            raise ValueError(
                f"{option}[{part!r}]: the part is frozen by frozen={list(self.frozen)}, a factor changes nothing. "
                "Give it no factor, or do not freeze it."
            )

    def apply(self, model: MimoModel) -> None:
        """Freezes and compiles the parts of `model`; before it is wrapped in DDP.

        A module that two parts share is frozen with either.

        Raises:
            ValueError: a factor of a part whose parameters count as another's.
        """
        self._check_names(model)
        frozen = self._prefixes(self.frozen, model.mimo_config)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name.startswith(frozen):
                parameter.requires_grad_(False)
        for name, module in model.named_modules(remove_duplicate=False):
            if f"{name}.".startswith(frozen) and getattr(module, "track_running_stats", False):
                _keep_evaluating(module)
        for encoder in self._encoders(self.evaluating, model):
            _keep_evaluating(encoder)
        if self.embedding_rows:
            for weight in _embedding_weights(model):
                weight.requires_grad_(True)
        graphed = set(self._encoders(self.graphed, model))
        for encoder in self._encoders(self.compiled, model):
            if encoder not in graphed:
                encoder.forward = CompiledForward(encoder)
        if LANGUAGE_MODEL in self.compiled:
            compile_layers(model.language_model)

    def _check_names(self, model: MimoModel) -> None:
        """Refuses factors of parameters that the optimizer knows by another part's name."""
        known = {parameter: name for name, parameter in model.named_parameters()}
        for option in ("learning_rate", "weight_decay"):
            for part in getattr(self, option):
                prefixes = parameter_prefixes(part, model.mimo_config, option)
                for name, parameter in model.named_parameters(remove_duplicate=False):
                    if name.startswith(prefixes) and not known[parameter].startswith(prefixes):
                        raise ValueError(
                            f"{option}[{part!r}]: {name} is shared, known to the optimizer as {known[parameter]!r}: "
                            "the factor would change nothing. Name that part."
                        )

    def graph(self, model: MimoModel) -> None:
        """Has the encoders of `graphed` replay CUDA graphs, captured when they first run.

        Raises:
            ValueError: there is no GPU, or an encoder has what cannot be replayed.
        """
        compiled = set(self._encoders(self.compiled, model))
        for encoder in self._encoders(self.graphed, model):
            encoder.forward = GraphedForward(encoder, compiled=encoder in compiled)

    @contextmanager
    def keeping_precision(self, model: MimoModel) -> Iterator[None]:
        """Within it, a cast of `model` leaves the encoders of `own_precision` as they are."""
        modules = [each for encoder in self._encoders(self.own_precision, model) for each in encoder.modules()]
        weights = {each: each.data for module in modules for each in module.parameters(recurse=False)}
        buffers = [(module, dict(module.named_buffers(recurse=False))) for module in modules]
        yield
        for weight, before in weights.items():
            weight.data = before
        for module, of_module in buffers:
            for name, buffer in of_module.items():  # a cast puts another tensor in a buffer's place
                setattr(module, name, buffer)

    def finalize_func(self):
        """What goes into `TransformerConfig.finalize_model_grads_func`: Megatron's, then the row mask.

        After the reduction, because some kernels add the gradient of a tied output layer straight
        into the reduction buffer, where no hook on the parameter sees it.
        """
        if not self.embedding_rows:
            return finalize_model_grads
        return partial(_finalize_with_rows, rows=frozenset(self.embedding_rows))

    def overrides(self, optimizer: OptimizerConfig, config: MimoModelConfig) -> dict[ParamKey, ParamGroupOverride]:
        """Megatron's parameter-group overrides, its standard ones included.

        Args:
            optimizer: whose learning rate and weight decay the factors multiply.
            config: of the model, which says what the parts are called.
        """
        if self.learning_rate and optimizer.lr is None:
            raise ValueError(
                f"learning_rate: factors of {list(self.learning_rate)} multiply OptimizerConfig.lr, which is None. "
                "Give it."
            )
        overrides = dict(get_standard_config_overrides(optimizer))
        without_decay = key_without_decay(overrides)
        for part, factor in self.learning_rate.items():
            override: ParamGroupOverride = {"max_lr": optimizer.lr * factor}
            if optimizer.min_lr is not None:
                override["min_lr"] = optimizer.min_lr * factor
            overrides[self._key("learning_rate", part, config)] = override
        for part, factor in self.weight_decay.items():
            key = self._key("weight_decay", part, config, without_decay)
            overrides[key] = {"wd_mult": float(factor)}
        if self.embedding_rows:
            # Adam's decoupled decay would shrink the rows that have no gradient.
            overrides[_key("embedding_rows", lambda p, name: _is_embedding_weight(p, name))] = {"wd_mult": 0.0}
        return overrides

    def _key(self, option: str, part: str, config: MimoModelConfig, excluded: tuple[ParamKey, ...] = ()) -> ParamKey:
        prefixes = parameter_prefixes(part, config, option)
        rows = bool(self.embedding_rows) and option == "weight_decay"

        def matches(parameter: nn.Parameter, name: str) -> bool:
            if not _unwrapped(name).startswith(prefixes):
                return False
            if rows and _is_embedding_weight(parameter, name):
                return False
            return not any(key.matches(parameter, name) for key in excluded)

        return _key(f"{option} {part}", matches)

    def _encoders(self, parts: Sequence[str], model: MimoModel) -> Iterator[nn.Module]:
        """The encoders on this stage that are named."""
        named = self._prefixes(parts, model.mimo_config)
        for modality, submodule in model.modality_submodules.items():
            for name, encoder in cast(ModalitySubmodules, submodule).encoders.items():
                if f"modality_submodules.{modality}.encoders.{name}.".startswith(named):
                    yield encoder

    @staticmethod
    def _prefixes(parts: Sequence[str], config: MimoModelConfig) -> tuple[str, ...]:
        return tuple(prefix for part in parts for prefix in parameter_prefixes(part, config, "parts"))


def parameter_prefixes(part: str, config: MimoModelConfig, option: str = "part") -> tuple[str, ...]:
    """What the names of a part's parameters begin with, in an unwrapped `MimoModel`.

    Args:
        part: see the top of this file.
        config: of the model.
        option: what named the part, for the error.

    Raises:
        ValueError: the model has no such part.

    Example:
        >>> from megatron.core.transformer.spec_utils import ModuleSpec
        >>> config = MimoModelConfig(ModuleSpec(module=object), {"images": ModuleSpec(module=object)})
        >>> parameter_prefixes("images/encoders", config)
        ('modality_submodules.images.encoders.',)
    """
    if part == LANGUAGE_MODEL:
        return ("language_model.",)
    modality, *rest = part.split("/")
    modalities, path = (list(config.modality_submodules), [part]) if part in SUBMODULE_KEYS else ([modality], rest)
    found = [name for name in modalities if name in config.modality_submodules and _exists(name, path, config)]
    if found:
        return tuple(".".join(["modality_submodules", name, *path, ""]) for name in found)
    raise ValueError(
        f"{option}: the model has no part {part!r}. Expected 'language_model', one of "
        f"{list(SUBMODULE_KEYS)}, or one of the modalities {sorted(config.modality_submodules)}, such "
        "as 'images', 'images/encoders' or 'images/encoders/clip'."
    )


def _check_apart(option: str, parts: Iterable[str], config: MimoModelConfig) -> None:
    """Refuses two factors for one parameter, which say neither that they multiply nor which one holds."""
    for one, other in combinations(parts, 2):
        ours, theirs = (parameter_prefixes(part, config, option) for part in (one, other))
        if any(a.startswith(b) or b.startswith(a) for a in ours for b in theirs):
            raise ValueError(
                f"{option}: {one!r} and {other!r} share parameters, which of their factors holds is open. "
                "Name parts that lie side by side."
            )


def _named_parts(config: MimoModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Prefixes of a modality's encoders and of its decoders, each with those of the single ones."""
    for modality in config.modality_submodules:
        for key, specs in config.submodule_specs(modality).items():
            if isinstance(specs, Mapping) and specs:
                whole = f"modality_submodules.{modality}.{key}."
                yield whole, [f"{whole}{name}." for name in specs]


def _exists(modality: str, rest: list[str], config: MimoModelConfig) -> bool:
    if not rest:
        return True
    if rest[0] not in SUBMODULE_KEYS or len(rest) > 2:
        return False
    specs = config.submodule_specs(modality)
    names = specs.get(rest[0])
    if len(rest) == 1:
        return bool(names) or not specs  # a class of the user's own may build its parts itself
    return isinstance(names, Mapping) and rest[1] in names


def _key(name: str, matches) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=matches))


def _unwrapped(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _is_embedding_weight(parameter: nn.Parameter, name: str) -> bool:
    if _unwrapped(name) == "language_model.embedding.word_embeddings.weight":
        return True
    # Megatron marks the copy of a tied embedding on the last pipeline stage.
    return _unwrapped(name) == "language_model.output_layer.weight" and is_tied_copy(parameter)


def _embedding_weights(model: MimoModel) -> Iterator[nn.Parameter]:
    """The word embedding on the first stage, and its copy where the output weights are tied to it."""
    for name, parameter in model.named_parameters():
        if _is_embedding_weight(parameter, name):
            yield parameter


def _finalize_with_rows(model_chunks, num_tokens=None, *, rows: frozenset[int], **options) -> None:
    """Megatron's finalize_model_grads; then zeros in the embedding's gradient outside `rows`."""
    finalize_model_grads(model_chunks, num_tokens, **options)
    for chunk in model_chunks:
        mimo = unwrap_model(chunk)
        for weight in _embedding_weights(mimo):
            first = weight.shape[0] * mimo.pg_collection.tp.rank()
            local = sorted(row - first for row in rows if first <= row < first + weight.shape[0])
            _zero_rows_except(weight.main_grad, local)  # type: ignore[attr-defined]  # DDP's


def _keep_evaluating(module: nn.Module) -> None:
    """Has a module run as in evaluation from now on, whatever mode the model is put into."""
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def _zero_rows_except(gradient: torch.Tensor, rows: Sequence[int]) -> None:
    """Zeros in all but `rows` (ascending) of `[V / tp, H]`; slices, since a mask would be copied there."""
    start = 0
    for row in [*rows, gradient.shape[0]]:
        gradient[start:row].zero_()
        start = row + 1
