"""What the language model sees at generation tokens."""

import pytest
import torch
from torch import nn

from megatron_mimo.decoders import (
    CodeInput,
    CodeTokenizer,
    FlowDecoder,
    LatentTokenizer,
    NoisedTargetInput,
    QueryInput,
    RectifiedFlow,
    TargetInput,
)


class Thirds(nn.Module):
    """A codec of values in [0, 1) by thirds."""

    def encode(self, media):
        return (media * 3).long()

    def decode(self, codes):
        return (codes + 0.5) / 3


def test_queries_repeat_for_every_span():
    feed = QueryInput(hidden_size=5, rows_per_item=2)
    rows = feed(feed.pick({"a": {}, "b": {}}), num_rows=6)
    assert torch.equal(rows, feed.queries.repeat(3, 1))
    rows.sum().backward()
    assert torch.equal(feed.queries.grad, torch.full((2, 5), 3.0))
    assert not feed.reads("a")
    with pytest.raises(ValueError, match=r"images: QueryInput reads no targets, found \['x'\]"):
        feed.prepare({"x": torch.zeros(1)}, "images")


def test_queries_refuse_a_part_of_a_span():
    with pytest.raises(ValueError, match="spans of 2 positions, but the batch has 3"):
        QueryInput(hidden_size=5, rows_per_item=2)(None, num_rows=3)


def test_a_target_is_projected():
    feed = TargetInput(hidden_size=5, target_width=2, hidden_width=3)
    target = torch.randn(4, 2)
    assert feed.num_rows({"target": target}) == 4
    assert torch.equal(feed({"target": target}, num_rows=4), feed.projection(target))


def test_embeddings_of_several_codebooks_add_up():
    feed = CodeInput(hidden_size=5, codebook_sizes=(3, 4), embedding_width=2)
    codes = torch.tensor([[0, 3], [2, 1]])
    first, second = feed.embeddings
    wanted = feed.projection(first.weight[codes[:, 0]] + second.weight[codes[:, 1]])
    assert torch.equal(feed({"codes": codes}, num_rows=2), wanted)


def test_one_codebook_at_full_width_is_a_lookup():
    feed = CodeInput(hidden_size=5, codebook_sizes=3)
    codes = torch.tensor([2, 0])
    assert torch.equal(feed({"codes": codes}, num_rows=2), feed.embeddings[0].weight[codes])


def test_codes_come_from_media_where_the_input_has_the_tokenizer():
    feed = CodeInput(hidden_size=5, codebook_sizes=3, tokenizer=CodeTokenizer(Thirds(), grid=(2,)))
    media = torch.tensor([[0.1, 0.4], [0.9, 0.5]])
    assert feed.num_rows({"media": media}) == 4
    prepared = feed.prepare({"media": media})
    assert prepared["codes"].tolist() == [0, 1, 2, 1] and "media" not in prepared
    assert feed.num_rows(prepared) == 4


def test_a_noised_target_is_the_decoders_own_point_on_the_path(no_run):
    flow = RectifiedFlow(time="logit-normal")
    decoder = FlowDecoder(width=6, target_width=2, hidden_width=8, rows_per_item=2, flow=flow)
    feed = NoisedTargetInput(hidden_size=6, target_width=2, rows_per_item=2, flow=flow)
    targets = {"target": torch.randn(4, 2)}
    torch.manual_seed(0)
    theirs = decoder.prepare(targets, "images/pixels")
    torch.manual_seed(0)
    ours = feed.prepare(targets, "images/pixels")
    assert all(torch.equal(theirs[name], ours[name]) for name in ("time", "noise"))
    t = ours["time"].repeat_interleave(2)[:, None]
    x = (1 - t) * ours["target"] + t * ours["noise"]
    wanted = feed.projection(x) + feed.time(t[:, 0])
    torch.testing.assert_close(feed(ours, num_rows=4), wanted)
    torch.testing.assert_close(feed.at(x, ours["time"]), wanted)


@pytest.mark.parametrize(
    "feed",
    [TargetInput(hidden_size=6, target_width=2), CodeInput(hidden_size=6, codebook_sizes=3)],
    ids=lambda feed: type(feed).__name__,
)
def test_an_input_that_shows_the_target_needs_the_predecessor_rule(feed):
    feed.check_rule("predecessor")
    with pytest.raises(ValueError, match="would learn to copy"):
        feed.check_rule("own")


def test_other_inputs_go_with_either_rule():
    for rule in ("own", "predecessor"):
        QueryInput(hidden_size=6, rows_per_item=1).check_rule(rule)
        NoisedTargetInput(hidden_size=6, target_width=2).check_rule(rule)


def test_an_input_picks_its_decoders_targets():
    targets = {"a": {"target": 1}, "b": {"target": 2}}
    named = TargetInput(hidden_size=6, target_width=2, decoder="b")
    assert named.pick(targets) == {"target": 2}
    unnamed = TargetInput(hidden_size=6, target_width=2)
    assert unnamed.pick({"a": {"target": 1}}) == {"target": 1}
    with pytest.raises(ValueError, match=r"the only decoder, found targets of \['a', 'b'\]"):
        unnamed.pick(targets)
    assert named.reads("b") and not named.reads("a") and unnamed.reads("a")
    with pytest.raises(ValueError, match="decoder 'b', found"):
        named.pick({"a": {}})


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (None, "from the target 'target', found none"),
        ({"code": 1}, r"found \['code'\]"),
        ({"target": torch.zeros(3, 2)}, "has 3 target for 4 generation tokens"),
    ],
)
def test_missing_or_miscounted_targets_are_refused(targets, match):
    with pytest.raises(ValueError, match=match):
        TargetInput(hidden_size=6, target_width=2)(targets, num_rows=4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: QueryInput(hidden_size=0, rows_per_item=1), "hidden_size must be"),
        (lambda: QueryInput(hidden_size=2, rows_per_item=0), "rows_per_item must be"),
        (lambda: TargetInput(hidden_size=2, target_width=0), "target_width must be"),
        (lambda: NoisedTargetInput(hidden_size=3, target_width=1), "even width, got 3"),
    ],
)
def test_bad_options_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


class Quartered(nn.Module):
    """A codec whose latents are a quarter of the image, whatever dtype it is given."""

    def encode(self, media):
        return media / 4

    def decode(self, latents):
        return latents * 4


def latents() -> LatentTokenizer:
    return LatentTokenizer(Quartered(), latent_shape=(1, 2, 2))


def test_targets_come_from_media_where_the_input_has_the_tokenizer():
    media = torch.rand(2, 1, 2, 2)
    feed = TargetInput(hidden_size=6, target_width=1, tokenizer=latents())
    assert feed.num_rows({"media": media}) == 8
    prepared = feed.prepare({"media": media})
    assert torch.equal(prepared["target"], media.reshape(8, 1) / 4) and "media" not in prepared


def test_a_noised_target_from_media_is_the_decoders_own_point_on_the_path(no_run):
    media = torch.rand(2, 1, 2, 2)
    decoder = FlowDecoder(width=6, target_width=1, hidden_width=8, rows_per_item=4, tokenizer=latents())
    feed = NoisedTargetInput(hidden_size=6, target_width=1, rows_per_item=4, tokenizer=latents())
    assert feed.num_rows({"media": media}) == decoder.num_rows({"media": media}) == 8
    torch.manual_seed(0)
    theirs = decoder.prepare({"media": media}, "images/pixels")
    torch.manual_seed(0)
    ours = feed.prepare({"media": media}, "images/pixels")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


FEEDS = {
    "target": TargetInput(hidden_size=6, target_width=2),
    "codes": CodeInput(hidden_size=6, codebook_sizes=3),
    "noised": NoisedTargetInput(hidden_size=6, target_width=2, rows_per_item=2),
}


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
def test_media_that_nothing_on_this_stage_encodes_are_refused(feed):
    for ask in (feed.num_rows, feed.prepare):
        with pytest.raises(
            ValueError,
            match="hold media, but nothing here encodes them to .*`tokenizer`",
        ):
            ask({"media": torch.zeros(1, 3, 4, 4)})


@pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS)
def test_targets_are_checked_on_a_stage_without_the_decoder(feed):
    name = "codes" if isinstance(feed, CodeInput) else "target"
    value = torch.zeros(4, dtype=torch.long) if name == "codes" else torch.zeros(4, 2)
    with pytest.raises(ValueError, match=rf"lack \['{name}'\]: expected \['{name}'\].*found \['other'\]"):
        feed.num_rows({"other": value})
    with pytest.raises(TypeError, match=rf": {name} must be a tensor, got list"):
        feed.num_rows({name: value.tolist()})
    with pytest.raises(ValueError, match=rf": {name} must be .*\[N.*got .*\[4, 3\]"):
        feed.num_rows({name: value.new_zeros(4, 3)})
    with pytest.raises(ValueError, match=r"weight must have shape \[4\] beside the other targets, got \[3\]"):
        feed.num_rows({name: value, "weight": torch.ones(3)})


def test_draws_and_spans_of_a_noised_input_are_checked_without_the_decoder():
    feed, target = FEEDS["noised"], torch.zeros(4, 2)
    with pytest.raises(ValueError, match="got 3 targets, which is no whole number of items of 2"):
        feed.num_rows({"target": target[:3]})
    with pytest.raises(ValueError, match=r"time must have shape \[2\]"):
        feed.prepare({"target": target, "time": torch.zeros(4)})


def test_codes_outside_their_codebook_are_refused_where_they_count():
    feed = CodeInput(hidden_size=5, codebook_sizes=3)
    codes = torch.tensor([2, -100, 7])
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 3\), found -100 in row 1"):
        feed({"codes": codes}, num_rows=3)
    rows = feed({"codes": codes, "weight": torch.tensor([1, 0, 0])}, num_rows=3)
    assert torch.equal(rows, feed.embeddings[0].weight[[2, 0, 2]])


@pytest.mark.parametrize("name", ["target", "noised"])
def test_the_language_model_sees_no_nan_of_targets_that_do_not_count(name):
    feed, target = FEEDS[name], torch.zeros(2, 2)
    target[1] = torch.nan
    prepared = feed.prepare({"target": target, "weight": torch.tensor([1, 0])})
    assert feed(prepared, num_rows=2).isfinite().all()
