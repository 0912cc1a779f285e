"""Conversations become the tokens of the chat template; what a user typed stays text; answers alone are learned."""

import pytest
import torch

from megatron_mimo.data.chat import PLAIN_TEMPLATE, ChatText
from megatron_mimo.data.messages import SampleError, conversation_of
from tests import data_samples as made

MARKED = made.CHATML.replace(
    "{% else %}{{ part['text'] }}{% endif %}",
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}",
)
PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


def chat_of(*turns: dict) -> dict:
    return {"messages": list(turns)}


def encoded(record: dict, template: str = made.CHATML, placeholders=PLACEHOLDERS, **options):
    tokenizer = made.tokenizer(template)
    chat = ChatText(tokenizer, placeholders=placeholders, **options)
    return tokenizer, chat.encode(conversation_of(record))


def words(tokenizer, tokens, learned: bool = True) -> str:
    return tokenizer.decode([id for id, told in zip(tokens.ids, tokens.learn) if told == learned])


def test_tokens_are_those_of_the_tokenizers_own_chat_template():
    record = chat_of(
        {"role": "system", "content": "Be brief"},
        made.user(made.image("cat.png"), made.text("What is in the picture?\n")),
        made.assistant(made.text("A cat")),
        made.user(made.text(" And here? "), made.image("two.png")),
        made.assistant(made.text("It is the same")),
    )
    tokenizer, tokens = encoded(record)
    expected = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
    pad = made.ids(tokenizer)["<|image_pad|>"]
    assert [pad if at in tokens.media else id for at, id in enumerate(tokens.ids)] == expected
    assert list(tokens.media.values()) == [0, 1]


def test_answers_alone_are_learned_by_what_each_turn_adds():
    record = chat_of(
        made.user(made.text("Draw")),
        made.assistant(made.text("Here")),
        made.user(made.text("it")),
        made.assistant("is"),
    )
    tokenizer, tokens = encoded(record)
    assert words(tokenizer, tokens) == "Here<|im_end|>\nis<|im_end|>\n"


def test_marks_of_the_template_say_what_is_learned_as_transformers_reads_them():
    record = chat_of(
        made.user(made.text("Draw a cat")), made.assistant(made.text("Here it is")), made.user(made.text("a"))
    )
    tokenizer, tokens = encoded(record, MARKED)
    expected = tokenizer.apply_chat_template(
        record["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.ids == expected["input_ids"]
    assert [int(told) for told in tokens.learn] == expected["assistant_masks"]


def test_parts_and_turns_that_are_not_to_be_learned_are_not():
    record = chat_of(
        made.user(made.text("Draw")),
        made.assistant(made.text("Here ", learn=False), made.text("it is")),
        made.user(made.text("a")),
        {**made.assistant(made.text("cat")), "learn": False},
    )
    for template in (made.CHATML, MARKED):
        tokenizer, tokens = encoded(record, template)
        # The blank belongs to a token of both parts, which is learned for the letters of the second.
        assert words(tokenizer, tokens).replace("<|im_end|>\n", "") == " it is"


@pytest.mark.parametrize("typed", made.SPECIAL)
def test_a_special_token_that_a_user_typed_is_text_as_transformers_sanitises_it(typed):
    record = chat_of(made.user(made.text(f"a {typed}{typed}cat")), made.assistant(made.text(f"{typed} it is")))
    tokenizer, tokens = encoded(record)
    expected = tokenizer.apply_chat_template(
        record["messages"], tokenize=True, return_dict=False, sanitize_control_tokens=True
    )
    plain = tokenizer.apply_chat_template(
        chat_of(made.user(made.text("a cat")), made.assistant(made.text(" it is")))["messages"], return_dict=False
    )
    special = set(made.ids(tokenizer).values())
    assert [id for id in tokens.ids if id in special] == [id for id in plain if id in special]
    assert tokenizer.decode(tokens.ids) == tokenizer.decode(expected)
    assert tokens.media == {}


def test_private_characters_that_a_user_typed_are_text():
    record = chat_of(made.user(made.text("\ue000m0\ue001 and \ue000\ue001")), made.assistant(made.text("it")))
    tokenizer, tokens = encoded(record)
    assert "\ue000m0\ue001 and \ue000\ue001" in tokenizer.decode(tokens.ids)
    assert tokens.media == {}


def test_media_that_the_template_does_not_know_stand_where_their_parts_stand():
    record = chat_of(
        made.user(made.text("See"), made.image("1.png"), made.text("it")),
        made.assistant(made.text("Here"), made.image("2.png", learn=False), made.image("3.png")),
    )
    tokenizer, tokens = encoded(record, PLAIN_TEMPLATE, {})
    pieces, start = [], 0
    for position, number in tokens.media.items():
        pieces += [tokenizer.decode(tokens.ids[start:position]), number]
        start = position + 1
    assert [*pieces, tokenizer.decode(tokens.ids[start:])] == ["See", 0, "it\nHere", 1, "", 2, "<|im_end|>"]
    assert [tokens.learn[position] for position in tokens.media] == [False, False, True]


def test_media_of_an_answer_are_never_the_templates_reading_placeholder():
    record = chat_of(made.user(made.text("Draw"), made.image("1.png")), made.assistant(made.image("2.png")))
    tokenizer, tokens = encoded(record)
    opened = made.ids(tokenizer)["<|vision_start|>"]
    assert tokens.ids.count(opened) == 1
    read, written = tokens.media
    assert tokens.ids[read - 1] == opened and tokens.ids[written - 1] != opened
    assert (tokens.learn[read], tokens.learn[written]) == (False, True)


def test_documents_have_no_template_and_end_with_the_end_token():
    tokenizer, tokens = encoded({"text": "What is <|im_end|> here"})
    assert tokenizer.decode(tokens.ids) == "What is <|im_end|> here<|im_end|>"
    assert tokens.ids.count(tokenizer.eos_token_id) == 1 and all(tokens.learn)


def test_an_end_token_is_added_where_the_template_writes_none():
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer, tokens = encoded(chat_of(made.user("a"), made.assistant("cat")), template, {}, add_eos=True)
    assert (tokens.ids[-1], tokens.learn[-1]) == (tokenizer.eos_token_id, True)
    tokenizer, tokens = encoded(chat_of(made.user("a"), made.assistant("cat")), template, {})
    assert tokens.ids[-1] != tokenizer.eos_token_id


def test_texts_that_are_too_long_are_refused_before_they_are_tokenised():
    with pytest.raises(SampleError, match="at most 10 characters") as caught:
        encoded(chat_of(made.user("a" * 11)), max_characters=10)
    assert caught.value.kind == "too_long"


def test_a_template_that_changes_earlier_turns_is_refused():
    template = (
        "{% for message in messages %}{% if loop.last %}!{% endif %}{{ message['role'] }} {{ message['content'] }}"
        "{% endfor %}"
    )
    with pytest.raises(SampleError, match="generation"):
        encoded(chat_of(made.user("a"), made.assistant("cat"), made.user("b")), template, {})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "placed 0 of 1 media"),
        (MARKED.replace("message['role'] == 'assistant'", "false"), "marks 0 of 1 answers"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(template, message):
    placeholders = PLACEHOLDERS if "generation" in template else {}
    with pytest.raises(SampleError, match=message) as caught:
        encoded(chat_of(made.user(made.image("1.png")), made.assistant("cat")), template, placeholders)
    assert caught.value.kind == "template"


def test_a_template_that_writes_more_placeholders_than_media_is_refused():
    template = MARKED + "{% if messages|length > 2 %}<|image_pad|>{% endif %}"
    turns = [made.user(made.image("1.png")), made.assistant("cat")]
    assert len(encoded(chat_of(*turns), template)[1].media) == 1
    with pytest.raises(SampleError, match="more <.image_pad.> than"):
        encoded(chat_of(*turns, *turns[1:]), template)


def test_a_tokenizer_without_template_says_so():
    with pytest.raises(ValueError, match="no chat template"):
        encoded(chat_of(made.user("a")), None)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="expected one that is"):
        ChatText(Slow())


def test_drawn_texts_keep_every_letter_and_no_control_token():
    draw = torch.Generator().manual_seed(0)
    letters = ["a", " ", "\n", "é", "猫", "<", "|", ">", "\ue000", *made.SPECIAL]
    tokenizer = made.tokenizer()
    chat = ChatText(tokenizer, placeholders=PLACEHOLDERS)
    special = set(made.ids(tokenizer).values())
    for _ in range(100):
        typed = "x" + "".join(letters[at] for at in torch.randint(len(letters), (12,), generator=draw).tolist())
        tokens = chat.encode(conversation_of(chat_of(made.user(made.text(typed)), made.assistant("it"))))
        assert typed in tokenizer.decode(tokens.ids)
        assert sum(id in special for id in tokens.ids) == 4
