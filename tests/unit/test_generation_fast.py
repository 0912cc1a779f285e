"""The fast ways of a decode step say what the plain one says: fused layers, and graphs that are captured once."""

import gc

import pytest
import torch
from megatron.core.transformer import transformer_block, transformer_layer

from megatron_mimo.generation import Session
from megatron_mimo.generation import session as sessions
from megatron_mimo.generation.fused import why_not
from megatron_mimo.generation.loop import Loop
from tests import recorded_graphs
from tests.compiling import compiling
from tests.generating import LOGPROBS, model_of, prompts

NEW = 9
SWIGLU = dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
              normalization="RMSNorm", bias_activation_fusion=False)  # fmt: skip
FUSED = {
    "rope": ("rope", {}),
    "groups and swiglu": ("groups", SWIGLU),
    "qk-norm": ("qk-norm", SWIGLU),
    "learned": ("learned", {}),
    "window": ("window", {}),
    "mrope": ("mrope", {}),
    "no rope": ("no-rope", {}),
    "zero-centred norm": ("groups", dict(layernorm_zero_centered_gamma=True, normalization="RMSNorm")),
    "a part of each head rotates": ("groups", {"rotary_percent": 0.5}),
}


def built(kind: str, changes: dict):
    percent = changes.pop("rotary_percent", None)
    model = model_of(kind, **changes)
    if percent is not None:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        model.language_model.rotary_pos_emb = RotaryEmbedding(8, rotary_percent=percent, use_cpu_initialization=True)
    with torch.no_grad():  # norms of ones and biases of zeros would hide that they are left out
        for parameter in model.language_model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def same(found, expected) -> None:
    assert [output.ids for output in found] == [output.ids for output in expected]
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=LOGPROBS, rtol=0)


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_say_what_the_modules_say_and_trace_in_one_piece(single_process, name):
    kind, changes = FUSED[name]
    model, sections = built(kind, dict(changes)), 3 if kind == "mrope" else 1
    expected = model.generate(prompts(sections), NEW, modalities=())
    with compiling() as graphs, Session(model, compiled=True) as session:
        same(model.generate(prompts(sections), NEW, modalities=(), session=session), expected)
        assert session.stage.fused is not None
        made = len(graphs)
        assert 2 <= made <= 4  # attention and MLP, each also as it is where the first layer differs from the others
        model.generate(prompts(sections), NEW, modalities=(), session=session)
        assert len(graphs) == made
        assert {type(layer).__name__ for layer in model.language_model.decoder.layers} == {"TransformerLayer"}
    assert [len(output.ids) for output in expected] == [NEW] * 4


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("experts", "MoELayer"), ("hybrid", "SelfAttention and IdentityOp"), ("yarn", "position_embedding_type='yarn'")],
)
def test_layers_of_which_nothing_is_known_run_as_they_are_and_a_message_says_why(single_process, caplog, kind, reason):
    model = model_of(kind)
    expected = model.generate(prompts(), NEW, modalities=())
    with Session(model, compiled="eager") as session:
        same(model.generate(prompts(), NEW, modalities=(), session=session), expected)
        assert session.stage.fused is None
    assert reason in caplog.text


def test_a_linear_layer_with_a_hook_runs_as_it_is(single_process):
    model = model_of("groups")
    model.language_model.decoder.layers[1].mlp.linear_fc1.register_forward_hook(lambda *args: None)
    with Session(model) as session:
        session.prepare(1, 64)
        assert "linear_fc1" in (why_not(model.language_model) or "")


@pytest.fixture
def recorded(monkeypatch):
    recorded_graphs.record_graphs(monkeypatch)
    for module in (transformer_block, transformer_layer):
        # It sets the memory of an empty tensor (`out.data = ...`), which is no operation that could be recorded.
        monkeypatch.setattr(module, "make_viewless_tensor", lambda inp, **options: inp)
    monkeypatch.setattr(sessions, "unrecordable", lambda model, stage: None)


@pytest.mark.parametrize("options", [{}, dict(temperature=0.9, top_k=20, seed=[1, 2, 3, 4])], ids=["greedy", "drawn"])
@pytest.mark.parametrize("compiled", [False, "eager"], ids=["modules", "fused"])
def test_replayed_steps_say_what_run_ones_say_and_serve_the_next_call(single_process, recorded, options, compiled):
    model, calls = model_of("groups"), (prompts(), prompts(media=False))
    expected = [model.generate(asked, NEW, modalities=(), **options) for asked in calls]
    with Session(model, graphs=True, compiled=compiled) as session:
        for number, (asked, wanted) in enumerate(zip(calls * 2, expected * 2)):
            same(model.generate(asked, NEW, modalities=(), session=session, **options), wanted)
            # Prompts of as many positions are recorded the second time that they come, and so are two encoders.
            assert session.recorder is not None and len(session.recorder) == (1, 2, 4, 4)[number]
    assert [o.ids for o in expected[0]] != [o.ids for o in expected[1]]


def test_a_session_whose_model_s_weights_moved_records_them_anew(single_process, recorded):
    model = model_of("groups")
    with Session(model, graphs=True) as session:
        model.generate(prompts(), NEW, modalities=(), session=session)
        with torch.no_grad():
            for weight in model.parameters():
                weight.data = weight.data * 1.5
        gc.collect()
        found = model.generate(prompts(), NEW, modalities=(), session=session)
    same(found, model.generate(prompts(), NEW, modalities=()))


def test_each_way_to_draw_has_a_graph_and_a_penalty_has_none(single_process, recorded):
    model = model_of("groups")
    with Session(model, graphs=True) as session:
        for options, count in (({}, 1), ({"temperature": 1.0}, 2), ({"repetition_penalty": 1.3}, 2), ({}, 2)):
            prompted = (
                session.recorder is not None
            )  # whose pass, and two encoders, are recorded from the second call on
            model.generate(prompts(), NEW, modalities=(), session=session, **options)
            assert len(session.recorder) == count + 3 * prompted


def test_samples_that_switch_between_replays_write_what_they_write_alone(single_process, recorded):
    from megatron_mimo.generation import Writing
    from tests import writing

    model = writing.model_of("codes", end=None)
    said = model.generate(writing.prompts(), 8, modalities=())
    model = writing.model_of("codes", end=None, begin=said[1].ids[2])
    wanted = {"images": Writing(rows=writing.ROWS, options={"temperature": 0})}
    with Session(model, graphs=False) as session:
        expected = model.generate(writing.prompts(), 12, modalities=wanted, session=session)
    with Session(model, graphs=True) as session:
        found = model.generate(writing.prompts(), 12, modalities=wanted, session=session)
        assert len(session.recorder) == 1
    same(found, expected)
    pairs = [(a, b) for x, y in zip(found, expected) for a, b in zip(x.parts, y.parts) if a.kind == "image"]
    assert pairs and all(torch.equal(a.samples, b.samples) for a, b in pairs)


def test_a_session_serves_calls_of_any_size_and_gives_the_model_back(single_process):
    model = model_of("groups")
    attention = model.language_model.decoder.layers[0].self_attention.core_attention
    sizes = ((2, 5), (2, 3), (4, 5), (2, 50), (1, 5))
    expected = [[model.generate([p], limit, modalities=())[0] for p in prompts()[:count]] for count, limit in sizes]
    with Session(model) as session:
        for (count, limit), wanted in zip(sizes, expected):
            same(model.generate(prompts()[:count], limit, modalities=(), session=session), wanted)
        assert model.language_model.decoder.layers[0].self_attention.core_attention is not attention
        rescored = model.generate(prompts()[:2], 3, modalities=(), session=session, rescore=True)
        torch.testing.assert_close(rescored[0].rescored_logprobs, rescored[0].logprobs, atol=LOGPROBS, rtol=0)
        model.generate(prompts()[:2], 3, modalities=(), session=session)
    assert model.language_model.decoder.layers[0].self_attention.core_attention is attention
    with Session(model_of("rope")) as session, pytest.raises(ValueError, match="expected one of this model"):
        model.generate(prompts(), 3, session=session)
    with Session(model, memory=10) as session:
        with pytest.raises(ValueError, match="memory: expected None beside a session"):
            model.generate(prompts(), 3, session=session, memory=10)
        with pytest.raises(ValueError, match="the cache of 4 rows of 64 positions takes"):
            model.generate(prompts(), 3, session=session)


def test_graphs_where_none_can_be_recorded_are_refused(single_process):
    with pytest.raises(ValueError, match="graphs: expected a decode step that can be recorded, found device 'cpu'"):
        Session(model_of("rope"), graphs=True)


def test_the_next_step_is_on_its_way_before_a_token_is_read(single_process, monkeypatch):
    order: list[str] = []
    run, read = Loop._run, Loop._read
    monkeypatch.setattr(Loop, "_run", lambda self, *args: order.append("run") or run(self, *args))
    monkeypatch.setattr(Loop, "_read", lambda self, drawn: order.append("read") or read(self, drawn))
    model_of("rope").generate(prompts(), 4, modalities=())
    assert order == ["run", "read", "run", "read", "run", "read", "read"]


def test_gradients_are_on_between_the_events_of_a_stream(single_process):
    for _ in model_of("rope").generate(prompts(), 3, stream=True):
        assert torch.is_grad_enabled()
