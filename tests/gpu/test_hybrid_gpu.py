"""Megatron's HybridModel as the language model; its stack needs TransformerEngine."""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec

import megatron_mimo
from megatron_mimo import specs
from tests import tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["megatron", "ours"])
def hybrid(request):
    pytest.importorskip("transformer_engine", reason="HybridModel's stack is TransformerEngine's")
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    megatron_mimo.initialize(seed=3)
    config = tiny.language_config(num_layers=4)
    language = ModuleSpec(
        module=HybridModel,
        params=dict(
            config=config,
            hybrid_stack_spec=hybrid_stack_spec
            if request.param == "megatron"
            else specs.hybrid_stack_spec(config, "transformer_engine"),
            vocab_size=tiny.VOCABULARY,
            max_sequence_length=64,
            hybrid_layer_pattern="*-*-",  # attention, MLP: state-space layers need yet another package
            position_embedding_type="rope",
        ),
    )
    yield megatron_mimo.MimoModel(tiny.mimo_config(language)).cuda()
    megatron_mimo.shutdown()


def on_device(value):
    if isinstance(value, dict):
        return {key: on_device(item) for key, item in value.items()}
    return value.cuda()


def test_hybrid_model_reads_and_writes(hybrid):
    hybrid.zero_grad(set_to_none=True)
    loss = tiny.total(hybrid, on_device(tiny.batch()))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hybrid.parameters())
    assert hybrid.modality_submodules["images"].encoders["patches"].linear.weight.grad.abs().sum() > 0


def test_its_hidden_states_are_those_of_the_bare_model(hybrid):
    hybrid.eval()
    ids = torch.tensor([[1, 2, tiny.WRITE, tiny.WRITE, 3, 4, 5, 6]]).cuda()
    kept = []
    handle = hybrid.language_model.decoder.register_forward_hook(lambda *args: kept.append(args[-1]))
    with torch.no_grad():
        hybrid.language_model(ids, torch.arange(8).cuda()[None], None)
        rows = hybrid(ids)[0].modalities["images"].hidden
    handle.remove()
    torch.testing.assert_close(rows, kept[0].transpose(0, 1)[ids == tiny.WRITE])
    hybrid.train()
