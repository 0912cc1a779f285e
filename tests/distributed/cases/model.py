"""What holds in one process holds on two ranks."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_mimo import MimoModel, VisionModalitySubmodules
from megatron_mimo.launch import Run
from tests import tiny
from tests.distributed.harness import case, relayout
from tests.distributed.shards import load_whole_weights, whole_weights
from tests.unit import test_model, test_specification

TENSOR = {"tensor_model_parallel_size": 2}


def build(run: Run, modality_submodules=None, **changes) -> MimoModel:
    config = tiny.language_config(tensor_model_parallel_size=run.layout.tensor_model_parallel_size, **changes)
    return MimoModel(tiny.mimo_config(tiny.language_spec(config)), modality_submodules)


@case(ranks=2)
@case(ranks=2, **TENSOR)
def snippets_of_the_specification_run(run: Run) -> None:
    test_specification.test_custom_submodules(run)
    test_specification.test_alignment(run)
    test_specification.test_vision_language_model(run)
    test_specification.test_forward_usage(run)


class Doubled(VisionModalitySubmodules):
    def encode(self, inputs) -> Tensor:
        return 2 * super().encode(inputs)


@case(ranks=2)
def an_overridden_encode_and_replaced_submodules_equal_one_rank(run: Run) -> None:
    spec = tiny.image_spec()
    doubled = {"images": ModuleSpec(module=Doubled, submodules=spec.submodules)}
    torch.manual_seed(1)
    whole = build(run, doubled)
    expected = tiny.total(whole, tiny.batch())
    expected.backward()
    weights = whole_weights(whole)
    gradient = whole.modality_submodules["images"].encoders["patches"].linear.weight.grad

    for sequence_parallel in (False, True):
        run = relayout(**TENSOR)
        model = build(run, doubled, sequence_parallel=sequence_parallel)
        assert isinstance(model.modality_submodules["images"], Doubled)
        load_whole_weights(model, weights, run.groups.tp)
        loss = tiny.total(model, tiny.batch())
        loss.backward()
        torch.testing.assert_close(loss, expected)
        found = model.modality_submodules["images"].encoders["patches"].linear.weight.grad
        torch.testing.assert_close(found, gradient)


@case(ranks=2)
def hidden_states_and_text_only_batches_are_those_of_the_bare_language_model(run: Run) -> None:
    torch.manual_seed(1)
    whole = build(run).eval()
    weights = whole_weights(whole)
    ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(2))
    ids[0, 3:6] = tiny.WRITE
    language = whole.language_model
    hidden = language.decoder(language.embedding(ids, None), None, rotary_pos_emb=language.rotary_pos_emb(8))
    expected = hidden.transpose(0, 1)[ids == tiny.WRITE]
    text = ids.masked_fill(ids == tiny.WRITE, 1)
    losses = language(text, torch.arange(8).expand(2, 8), None, labels=text)

    for sequence_parallel in (False, True):
        run = relayout(**TENSOR)
        model = build(run, sequence_parallel=sequence_parallel).eval()
        load_whole_weights(model, weights, run.groups.tp)
        torch.testing.assert_close(model(ids)[0].modalities["images"].hidden, expected)
        torch.testing.assert_close(model(text, labels=text)[0].language, losses)


COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)


@case(ranks=2, **TENSOR)
def bad_batches_are_refused_before_any_collective(run: Run) -> None:
    model = build(run, sequence_parallel=True)
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def refuse(*_, **__):
        raise AssertionError("a collective ran before the batch was refused")

    for cases, error in ((test_model.BAD_VALUES, ValueError), (test_model.BAD_TYPES, TypeError)):
        for mistake, message in cases.values():
            arguments = mistake(tiny.batch())
            try:
                for name in COLLECTIVES:
                    setattr(dist, name, refuse)
                with pytest.raises(error, match=message):
                    model(**arguments)
            finally:
                for name, original in originals.items():
                    setattr(dist, name, original)
    tiny.total(model, tiny.batch()).backward()  # and the ranks still work together
