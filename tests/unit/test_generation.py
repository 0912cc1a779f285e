"""Cached generation says what one whole forward pass a token says, and leaves the model as it was."""

import math

import pytest
import torch
from megatron.core.ssm.mamba_layer import MambaLayer

from megatron_mimo.cached_attention import CachedAttention, Turn, cache_bytes
from megatron_mimo.generation.borrow import attentions_of, borrowed
from megatron_mimo.generation.results import TextPart, save
from megatron_mimo.generation.sampling import Sampler, Sampling, uniform
from tests import generating, tiny
from tests.generating import check_greedy, model_of, one_by_one, prompts

KINDS = ["rope", "learned", "groups", "qk-norm", "window", "mrope", "experts", "hybrid", "no-rope", "yarn"]
NEW = 7


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_token_for_token_what_whole_passes_say_and_gives_training_s_log_probabilities(single_process, kind):
    model, sections = model_of(kind), 3 if kind == "mrope" else 1
    asked = prompts(sections)
    outputs = model.generate(asked, NEW, modalities=(), rescore=True)
    check_greedy(outputs, [one_by_one(model, prompt, NEW, sections) for prompt in asked])
    assert len({token for output in outputs for token in output.ids}) > 4
    for output in outputs:
        torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=generating.LOGPROBS, rtol=0)
        assert output.reason == "length" and output.seconds >= output.first_token > 0
    alone = [model.generate([prompt], NEW, modalities=())[0].ids for prompt in asked]
    assert alone == [output.ids for output in outputs]


def test_a_cache_that_forgot_a_position_would_be_seen(single_process):
    """The window of 3 is what tells these models apart: without it other tokens come."""
    narrow, wide = model_of("window"), model_of("window", window_size=None)
    assert [o.ids for o in narrow.generate(prompts(), NEW, modalities=())] != [
        o.ids for o in wide.generate(prompts(), NEW, modalities=())
    ]


def state(model: torch.nn.Module) -> dict[str, object]:
    """Every flag, config value and submodule that a call could have changed."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, bool)}
        found |= {f"{name}/{key}": id(child) for key, child in module.named_children()}
        config = getattr(module, "config", None)
        found |= {f"{name}:{key}": value for key, value in vars(config).items()} if config is not None else {}
    return found


def test_everything_is_put_back_after_a_call_an_exception_and_a_stream_that_is_left(single_process, monkeypatch):
    model = model_of("groups")
    model.modality_submodules["images"].eval()  # a part of its own mode
    before = state(model)
    model.generate(prompts(), 3)
    assert state(model) == before
    stream = model.generate(prompts(), 5, stream=True)
    next(stream)
    assert state(model) != before
    stream.close()
    assert state(model) == before

    def fail(*args: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(CachedAttention, "_keep", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.generate(prompts(), 5)
    assert state(model) == before
    ids = torch.arange(8)[None]
    assert model.eval()(ids)[0].language.isfinite().all()


def test_a_stream_tells_each_token_when_it_is_there_and_ends_with_the_same_output(single_process):
    model = model_of("rope")
    events = list(model.generate(prompts(), 4, modalities=(), stream=True, tokenizer=Letters()))
    outputs = model.generate(prompts(), 4, modalities=(), tokenizer=Letters())
    for index, output in enumerate(outputs):
        own = [event for event in events if event.sample == index]
        assert [event.id for event in own[:-1]] == output.ids
        assert "".join(event.text for event in own[:-1]) == output.text
        assert own[-1].output.ids == output.ids
    first = [event.sample for event in events[:4]]
    assert sorted(first) == [0, 1, 2, 3]  # side by side, not one after the other


class Letters:
    """A tokenizer whose tokens are a letter each."""

    def decode(self, ids):
        return "".join(chr(ord("0") + token) for token in ids)


def test_stop_ids_strings_and_limits_end_each_sample_by_itself(single_process):
    model = model_of("rope")
    free = model.generate(prompts(), 8, modalities=())
    stop = free[0].ids[2]
    outputs = model.generate(prompts(), 8, modalities=(), stop_ids=[stop])
    for output, whole in zip(outputs, free):
        end = whole.ids.index(stop) + 1 if stop in whole.ids else 8
        assert output.ids == whole.ids[:end]
        assert output.reason == ("stop_id" if stop in whole.ids else "length")
    text = Letters().decode(free[1].ids)
    outputs = model.generate(prompts(), 8, modalities=(), stop_strings=[text[3:5]], tokenizer=Letters())
    assert outputs[1].text.endswith(text[3:5]) and outputs[1].reason == "stop_string"
    assert outputs[1].ids == free[1].ids[: text.index(text[3:5]) + 2]
    limits = [1, 8, 3, 5]
    outputs = model.generate(prompts(), limits, modalities=())
    assert [output.ids for output in outputs] == [whole.ids[:n] for whole, n in zip(free, limits)]


SAMPLED = dict(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


def test_draws_depend_on_a_sample_s_own_seed_and_not_on_its_place(single_process):
    model, seeds = model_of("groups"), [3, 11, 7, 5]
    outputs = model.generate(prompts(), 8, modalities=(), seed=seeds, **SAMPLED)
    backwards = model.generate(prompts()[::-1], 8, modalities=(), seed=seeds[::-1], **SAMPLED)[::-1]
    alone = [model.generate([p], 8, modalities=(), seed=[s], **SAMPLED)[0] for p, s in zip(prompts(), seeds)]
    assert [o.ids for o in outputs] == [o.ids for o in backwards] == [o.ids for o in alone]
    others = model.generate(prompts(), 8, modalities=(), seed=[s + 1 for s in seeds], **SAMPLED)
    assert all(a.ids != b.ids for a, b in zip(outputs, others))
    assert model.generate(prompts()[:1], 8, modalities=(), seed=3, **SAMPLED)[0].ids == outputs[0].ids


def test_both_log_probabilities_are_those_of_their_distributions(single_process):
    model, prompt = model_of("rope"), prompts()[0]
    output = model.generate(
        [prompt], 6, modalities=(), temperature=0.5, top_k=3, repetition_penalty=1.5, seed=4, rescore=True
    )[0]
    torch.testing.assert_close(output.rescored_logprobs, output.logprobs, atol=generating.LOGPROBS, rtol=0)
    ids = prompt["input_ids"]
    model.eval()
    for token, found in zip(output.ids, output.sampling_logprobs):
        logits = generating.whole(model, prompt, ids)[-1]
        said = ids.unique()
        logits[said] = torch.where(logits[said] > 0, logits[said] / 1.5, logits[said] * 1.5)
        logits[tiny.WRITE] = -torch.inf
        kept = logits.topk(3)
        expected = (kept.values / 0.5).log_softmax(-1)[kept.indices == token]
        torch.testing.assert_close(found[None], expected, atol=generating.LOGPROBS, rtol=0)
        ids = torch.cat([ids, torch.tensor([token])])


# The sampler by itself -----------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.3, 0.0, -0.5, -1.0, 1.45])
DRAWS = 4000


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The probability of counts at least as far from those expected; 0 where something impossible was drawn."""
    if counts[expected == 0].any():
        return 0.0
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = torch.tensor((int(kept.sum()) - 1) / 2.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))


def counted(rule: Sampling, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    numbers = torch.tensor([uniform(rule.seed, index) for index in range(DRAWS)], dtype=torch.float64)
    sampler = Sampler([rule] * DRAWS, "cpu")
    everything = torch.ones(len(logits), dtype=torch.bool)
    return sampler.draw(logits.expand(DRAWS, -1), everything, numbers).ids.bincount(minlength=len(logits)).double()


def distribution(rule: Sampling) -> torch.Tensor:
    """What the rule means, token by token in plain Python: the oracle."""
    weights = [math.exp(value / rule.temperature) for value in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])[: rule.top_k]
    total = sum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if reached >= rule.top_p or weights[token] < rule.min_p * weights[order[0]]:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in kept)
    return torch.tensor([weights[t] / total if t in kept else 0.0 for t in range(len(weights))], dtype=torch.float64)


RULES = {
    "temperature": Sampling(temperature=0.7, seed=1),
    "top-k": Sampling(temperature=1.0, top_k=4, seed=2),
    "top-p": Sampling(temperature=1.3, top_p=0.7, seed=3),
    "min-p": Sampling(temperature=1.0, min_p=0.3, seed=4),
    "all": Sampling(temperature=0.9, top_k=6, top_p=0.9, min_p=0.1, seed=5),
}


@pytest.mark.parametrize("name", RULES)
def test_draws_follow_the_distribution_that_the_rule_means(name):
    assert chi_square_p(counted(RULES[name]), DRAWS * distribution(RULES[name])) > 1e-3


@pytest.mark.parametrize("wrong", [3, 5])
def test_a_sampler_that_is_off_by_one_rank_in_top_k_fails_the_chi_square_test(wrong):
    rule = Sampling(temperature=1.0, top_k=wrong, seed=2)
    assert chi_square_p(counted(rule), DRAWS * distribution(RULES["top-k"])) < 1e-3


def test_rows_of_a_batch_keep_their_own_rules_and_greedy_ones_take_the_likeliest():
    rules = [Sampling(), Sampling(temperature=1.0, top_k=1), Sampling(temperature=5.0, seed=9)]
    drawn = Sampler(rules, "cpu").draw(
        LOGITS.expand(3, -1), torch.arange(8) > 0, torch.tensor([0.9, 0.9, 0.999]).double()
    )
    assert drawn.ids[:2].tolist() == [1, 1] and drawn.ids[2] != 1
    assert drawn.sampling_logprobs[:2].tolist() == [0, 0] and drawn.sampling_logprobs[2] < 0
    torch.testing.assert_close(drawn.logprobs[0], LOGITS.log_softmax(-1)[1])


# Refused before any work -----------------------------------------------------------------------------------------


def bad(**changes):
    return {"input_ids": [1, 2, 3]} | changes


IMAGES = {"images": {"patches": {"x": torch.zeros(1, 2, tiny.PIXELS)}}}
BAD = {
    "an empty prompt": (bad(input_ids=[]), "expected at least one token, found an empty prompt"),
    "a prompt and limit beyond the model's length": (
        bad(input_ids=[1] * 60),
        "expected at most 64 positions, which the model has, found a prompt of 60 and max_new_tokens=5",
    ),
    "media without tokens": (bad(modality_inputs=IMAGES), "images: expected its token .-200. where modality_inputs go"),
    "tokens without media": (bad(input_ids=[1, -200]), "images: expected modality_inputs for its tokens"),
    "an id that is none": (bad(input_ids=[1, 64]), r"expected ids in \[0, 64\), found \[64\]"),
    "ids that are no integers": (bad(input_ids=torch.zeros(2)), r"expected integers \[S\], found torch.float32 \[2\]"),
    "a batch": (bad(input_ids=torch.zeros(1, 2, dtype=torch.int64)), r"expected integers \[S\], found .* \[1, 2\]"),
    "a word": ("hello", "expected a prompt with 'input_ids', found str"),
    "an unknown key": (bad(pixels=1), "expected a prompt of .* found .*pixels"),
    "an unknown modality": (bad(modality_inputs={"video": {}}), "modality_inputs has modality 'video'"),
    "messages without a processor": ([{"role": "user", "content": "hi"}], "give processor="),
    "a span that no decoder can be asked for": (
        bad(input_ids=[1, 2, tiny.WRITE]),
        "images: the prompt ends with the token that begins it, but it is not among the modalities",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_prompt_that_cannot_be_used_is_refused_by_its_number_before_anything_runs(single_process, monkeypatch, name):
    prompt, message = BAD[name]
    model = model_of("rope")
    monkeypatch.setattr(model, "embed", None)  # nothing may run
    with pytest.raises(ValueError, match=f"sample 1: .*{message}"):
        model.generate([bad(), prompt], 5, modalities=())


@pytest.mark.parametrize("name", BAD)
def test_with_on_error_return_it_carries_its_error_and_the_others_are_served(single_process, name):
    prompt, message = BAD[name]
    model = model_of("rope")
    good = model.generate([bad()], 5, modalities=())
    outputs = model.generate([prompt, bad()], 5, modalities=(), on_error="return")
    assert outputs[1].ids == good[0].ids
    assert outputs[0].reason == "error" and outputs[0].parts == []
    with pytest.raises(ValueError, match=f"sample 0: .*{message}"):
        raise outputs[0].error


def test_media_of_another_number_of_rows_than_tokens_end_their_own_sample(single_process):
    model = model_of("rope")
    wrong = {"input_ids": [1, tiny.READ, 2], "modality_inputs": IMAGES}
    with pytest.raises(ValueError, match="sample 0: images: .* 1 special tokens? but 2"):
        model.generate([wrong, bad()], 5)
    outputs = model.generate([wrong, bad()], 5, modalities=(), on_error="return")
    assert outputs[0].reason == "error" and "images" in str(outputs[0].error)
    assert outputs[1].ids == model.generate([bad()], 5, modalities=())[0].ids


OPTIONS = {
    "no prompts": (dict(prompts=[]), "expected a list of at least one prompt"),
    "limits of another number": (dict(max_new_tokens=[1, 2]), "max_new_tokens: expected one value or 1"),
    "no limit": (dict(max_new_tokens=0), "sample 0: max_new_tokens: expected an integer of at least 1"),
    "temperature": (dict(temperature=-1.0), "sample 0: temperature: expected a finite number"),
    "top_k": (dict(top_k=0), "top_k: expected an integer of at least 1"),
    "top_p": (dict(top_p=0.0), r"top_p: expected a number in \(0, 1\]"),
    "min_p": (dict(min_p=1.5), r"min_p: expected a number in \[0, 1\]"),
    "penalty": (dict(repetition_penalty=0.0), "repetition_penalty: expected a number above 0"),
    "seed": (dict(seed=[1.5]), "seed: expected an integer"),
    "stop strings without a tokenizer": (dict(stop_strings=["a"]), "stop_strings: expected a tokenizer"),
    "on_error": (dict(on_error="ignore"), "on_error: expected 'raise' or 'return'"),
    "a modality without a sampler": (dict(modalities=["audio"]), "modalities: expected some of .'images'., found"),
    "memory": (dict(memory=100), "the cache of 1 rows of 64 positions takes .* MiB"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_mean_nothing_are_refused_before_anything_runs(single_process, monkeypatch, name):
    options, message = OPTIONS[name]
    model = model_of("rope")
    monkeypatch.setattr(model, "embed", None)
    with pytest.raises(ValueError, match=message):
        model.generate(**(dict(prompts=[bad()], max_new_tokens=5) | options))


LAYERS = {
    "attention sinks": (dict(softmax_type="off-by-one"), "softmax_type='vanilla'"),
    "graphs of layers": (dict(cuda_graph_impl="local"), "cuda_graph_impl='none'"),
    "interleaved stages": (
        dict(virtual_pipeline_model_parallel_size=2),
        "expected virtual_pipeline_model_parallel_size=None, found virtual_pipeline_model_parallel_size=2",
    ),
    "a window that reaches ahead": (dict(window_size=(2, 2)), "expected a window that does not reach ahead"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_the_cache_does_not_serve_are_refused_before_anything_runs(single_process, monkeypatch, name):
    changes, message = LAYERS[name]
    model = model_of("rope")
    monkeypatch.setattr(model, "embed", None)
    for attribute, value in changes.items():  # set after the build: some need a GPU to be built
        setattr(model.config, attribute, value)
    with pytest.raises(ValueError, match=message):
        model.generate([bad()], 5, modalities=())


def test_layers_with_a_state_of_their_own_are_refused_by_name_before_anything_runs(single_process, monkeypatch):
    """Megatron's Mamba layers need kernels of a GPU to be built: one that was never given its weights stands here."""
    model = model_of("hybrid")
    layers = model.language_model.decoder.layers
    layers[1] = MambaLayer.__new__(MambaLayer)
    torch.nn.Module.__init__(layers[1])
    monkeypatch.setattr(model, "embed", None)
    with pytest.raises(ValueError, match=r"expected a pattern of attention .* found \['MambaLayer'\]"):
        model.generate([bad()], 5, modalities=())


def test_the_memory_that_is_predicted_is_what_the_cache_takes(single_process):
    model, turn = model_of("groups"), Turn()
    attentions = attentions_of(model.language_model.decoder)
    predicted = cache_bytes(attentions, rows=3, slots=128)
    with torch.no_grad(), borrowed(model, turn, 3, 128) as cached:
        from megatron_mimo.cached_attention import Step

        place = torch.arange(4).expand(3, -1)
        turn.step = Step(place, place, place, 64, fresh=True)
        model.language_model(None, None, None, decoder_input=torch.zeros(4, 3, tiny.HIDDEN))
        taken = sum(x.numel() * x.element_size() for one in cached for x in (one.key, one.value))
    assert taken == predicted == 2 * 2 * 3 * 2 * 128 * 8 * 4  # layers, keys and values, rows, groups, slots, D, bytes


# Results ---------------------------------------------------------------------------------------------------------


def test_text_is_saved_as_files(single_process, tmp_path):
    model = model_of("rope")
    outputs = model.generate([bad(), "no prompt"], 4, tokenizer=Letters(), on_error="return")
    assert isinstance(outputs[0].parts[0], TextPart)
    paths = save(outputs, tmp_path / "out")
    assert [path.name for path in paths] == ["0-0.txt", "1-error.txt"]
    assert paths[0].read_text() == outputs[0].text != ""
    assert "sample 1" in paths[1].read_text()
