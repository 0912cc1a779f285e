"""Pretrained models on a GPU: filled into TransformerEngine's layers they compute what transformers computes there."""

import pytest
import torch

import megatron_mimo

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def run():
    yield megatron_mimo.initialize(seed=3)
    megatron_mimo.shutdown()


@pytest.fixture(autouse=True)
def without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# TransformerEngine multiplies float32 in TF32, whose steps are 1e-3 of a number; plain layers in float32.
BACKENDS = [("torch", 1e-4), ("transformer_engine", 1e-2)]


@pytest.mark.parametrize(("backend", "tolerance"), BACKENDS)
@pytest.mark.parametrize("name", ["llama-3", "mistral", "qwen2-tied", "qwen3"])
def test_language_models_compute_what_transformers_does(tmp_path, name, backend, tolerance):
    from tests import checkpoints

    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine")
    theirs = checkpoints.language_model(name)
    source = checkpoints.written(theirs, tmp_path / "model")
    model = megatron_mimo.from_pretrained(source, backend=backend)
    ids = checkpoints.ids().cuda()
    with torch.no_grad():
        expected, found = theirs.cuda()(ids).logits, model(ids)[0]
    assert distance(found, expected) < tolerance
    megatron_mimo.save_pretrained(model, tmp_path / "exported")
    again = type(theirs).from_pretrained(tmp_path / "exported").cuda().eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize(("backend", "tolerance"), BACKENDS)
@pytest.mark.parametrize(("tower", "language"), [("clip", "llama"), ("siglip", "qwen2")])
def test_llava_computes_from_pixels_to_logits_what_transformers_does(tmp_path, tower, language, backend, tolerance):
    from tests import checkpoints

    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine")
    theirs = checkpoints.llava(tower, language)
    model = megatron_mimo.from_pretrained(checkpoints.written(theirs, tmp_path / "model"), backend=backend)
    pixels, ids = (one.cuda() for one in checkpoints.images_and_ids())
    with torch.no_grad():
        expected = theirs.cuda()(input_ids=ids, pixel_values=pixels).logits
        found = model(ids, modality_inputs={"images": {"tower": {"pixel_values": pixels}}})[0]
    assert distance(found, expected) < tolerance


def test_a_misread_field_would_be_seen_in_transformer_engine_s_layers(tmp_path):
    """The tolerance of TF32 is loose; what a wrong rotary base or norm changes is not within it."""
    from tests import checkpoints
    from tests.parity.test_hf_fields import changed

    pytest.importorskip("transformer_engine")
    theirs = checkpoints.language_model("llama-3")
    sources = [checkpoints.written(theirs, tmp_path / name) for name in ("norm", "rope")]
    ids = checkpoints.ids().cuda()
    with torch.no_grad():
        expected = theirs.cuda()(ids).logits
    changes = {"rms_norm_eps": 1e-1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    for source, (field, value) in zip(sources, changes.items()):
        directory = changed(source, field, value)
        with torch.no_grad():
            found = megatron_mimo.from_pretrained(directory, backend="transformer_engine")(ids)[0]
        assert distance(found, expected) > 3e-2, field
