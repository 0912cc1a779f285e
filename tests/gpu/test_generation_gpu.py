"""On a GPU recorded and compiled decode steps say what eager ones say, and a step waits for nothing."""

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.generation import Session
from megatron_mimo.generation.loop import Loop
from tests import generating, tiny
from tests.generating import prompts

pytestmark = pytest.mark.gpu
NEW = 24
SWIGLU = dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
              normalization="RMSNorm", bias_activation_fusion=False)  # fmt: skip
WAYS = {"graphs": dict(graphs=True), "compiled": dict(compiled=True, graphs=False), "both": dict(compiled=True)}


@pytest.fixture(scope="module", autouse=True)
def one_gpu():
    yield megatron_mimo.initialize(seed=3)
    megatron_mimo.shutdown()


def model_of(kind: str, backend: str = "torch", **changes) -> megatron_mimo.MimoModel:
    spec = generating.language(kind, **changes)
    spec.params["transformer_layer_spec"] = specs.language_layer_spec(spec.params["config"], backend)
    model = megatron_mimo.MimoModel(tiny.mimo_config(spec)).cuda()
    generating.spread(model)
    return model


def with_media(prompt: dict, factor: float) -> dict:
    """The prompt with other media of the same shapes."""
    given = prompt.get("modality_inputs", {})
    scaled = {
        modality: {encoder: {key: factor * x for key, x in inputs.items()} for encoder, inputs in encoders.items()}
        for modality, encoders in given.items()
    }
    return prompt | {"modality_inputs": scaled} if scaled else prompt


def said(outputs) -> list[list[int]]:
    return [output.ids for output in outputs]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["groups", "learned", "mrope", "window", "qk-norm"])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.8, top_k=20, seed=[1, 2, 3, 4])], ids=["greedy", "drawn"])
def test_fast_ways_say_what_the_eager_one_says(way, kind, options):
    model, sections = model_of(kind, **SWIGLU), 3 if kind == "mrope" else 1
    asked = prompts(sections)
    with Session(model, graphs=False) as session:
        expected = model.generate(asked, NEW, modalities=(), session=session, **options)
    with Session(model, **WAYS[way]) as session:
        for calls in range(4):  # steps are captured, then replayed; so are the prompts' passes from the second on
            found = model.generate(asked, NEW, modalities=(), session=session, **options)
            assert said(found) == said(expected)
            for mine, theirs in zip(found, expected):
                torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-3, rtol=0)  # TF32 is off
            # From the second call on the prompts' pass and two encoders are recorded too.
            assert session.recorder is None or len(session.recorder) == (4 if calls else 1)
        assert (session.stage.fused is not None) == bool(WAYS[way].get("compiled"))


@pytest.mark.parametrize("kind", ["groups", "mrope"])
def test_other_prompts_of_as_many_buckets_are_read_by_the_recorded_pass(kind):
    model, sections = model_of(kind, **SWIGLU), 3 if kind == "mrope" else 1
    asked = prompts(sections)
    others = [with_media(one | {"input_ids": one["input_ids"].flip(-1)}, -1.0) for one in asked]
    with Session(model, graphs=False) as session:
        expected = [said(model.generate(each, NEW, modalities=(), session=session)) for each in (asked, others)]
    assert expected[0] != expected[1]
    with Session(model, graphs=True) as session:
        for each, theirs in [(asked, expected[0]), (others, expected[1])] * 2:
            assert said(model.generate(each, NEW, modalities=(), session=session)) == theirs
        assert len(session.recorder) == 4


def test_media_go_through_recorded_encoders_each_as_it_is():
    model = model_of("groups", **SWIGLU)
    asked = [[with_media(one, factor) for one in prompts()] for factor in (1.0, -2.0, 0.5)]
    with Session(model, graphs=False) as session:
        expected = [model.generate(each, 4, modalities=(), session=session) for each in asked]
    with Session(model) as session:
        for _ in range(3):
            for each, theirs in zip(asked, expected):
                found = model.generate(each, 4, modalities=(), session=session)
                assert said(found) == said(theirs)
                for mine, wanted in zip(found, theirs):
                    torch.testing.assert_close(mine.logprobs, wanted.logprobs, atol=1e-4, rtol=0)
    assert len({tuple(map(tuple, said(each))) for each in expected}) == 3


@pytest.mark.skipif(not HAVE_TE, reason="TransformerEngine is not installed")
@pytest.mark.parametrize("compiled", [False, True], ids=["modules", "compiled"])
def test_layers_of_transformer_engine_say_over_the_cache_what_their_whole_passes_say(compiled):
    model = model_of("groups", "transformer_engine", **SWIGLU).eval()
    asked = prompts(media=False)
    with Session(model, compiled=compiled) as session:
        outputs = model.generate(asked, NEW, modalities=(), session=session, stop_ids=[])
    for prompt, output in zip(asked, outputs):
        ids = prompt["input_ids"].cuda()
        for token in output.ids:
            with torch.no_grad():
                logits = model(ids[None])[0].language[0, -1].float()
            logits[tiny.WRITE] = -torch.inf
            # Ties within rounding: TransformerEngine and compiled layers differ by 1.7e-3 on an H100.
            assert logits[token] > logits.max() - 1e-2
            ids = torch.cat([ids, torch.tensor([token], device="cuda")])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_waits_for_nothing(monkeypatch, graphs):
    model, advance = model_of("groups"), Loop._advance
    with Session(model, graphs=graphs) as session:
        model.generate(prompts(), NEW, modalities=(), session=session)

        def watched(self) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                advance(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(Loop, "_advance", watched)
        model.generate(prompts(), NEW, modalities=(), session=session)
