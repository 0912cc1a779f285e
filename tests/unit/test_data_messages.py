"""Every spelling of a record becomes the one form of conversation."""

import base64

import pytest

from megatron_mimo.data.messages import Conversation, Medium, Part, SampleError, Turn, conversation_of

NORMAL = Conversation(
    (
        Turn("user", (Part("image", medium=Medium("cat.png")), Part("text", "What is it?"))),
        Turn("assistant", (Part("text", "A cat."),)),
    )
)
SPELLINGS = {
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is it?"}],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "OpenAI's image_url": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "cat.png"}},
                    {"type": "text", "text": "What is it?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ]
    },
    "tags and a column": {
        "messages": [
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": "A cat."},
        ],
        "images": ["cat.png"],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}],
        "image": "cat.png",
    },
    "ShareGPT without its tag": {
        "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}],
        "image": "cat.png",
    },
    "question and answer": {"question": "What is it?", "answer": "A cat.", "image": "cat.png"},
    "Alpaca": {"instruction": "What is it?", "input": "", "output": "A cat.", "images": ["cat.png"]},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_form(name):
    assert conversation_of(SPELLINGS[name]) == NORMAL


def test_text_beside_a_medium_is_read_or_written_as_the_source_says():
    record = {"image": "cat.png", "text": "A cat."}
    read, written = conversation_of(record), conversation_of(record, columns="write")
    assert [(turn.role, turn.parts[0].kind) for turn in read.turns] == [("user", "image"), ("assistant", "text")]
    assert [(turn.role, turn.parts[0].kind) for turn in written.turns] == [("user", "text"), ("assistant", "image")]


def test_text_alone_is_a_document():
    assert conversation_of({"text": "Once."}).turns == (Turn("document", (Part("text", "Once."),)),)


def test_tags_become_media_in_their_order_and_other_tags_stay_text():
    record = {
        "messages": [
            {"role": "user", "content": "<image> and <audio> and <image>"},
            {"role": "assistant", "content": "<image>"},
        ],
        "images": ["1.png", "2.png", "3.png"],
    }
    user, answer = conversation_of(record).turns
    assert [part.text or part.medium.path for part in user.parts] == ["1.png", " and <audio> and ", "2.png"]
    assert answer.parts == (Part("image", medium=Medium("3.png")),)


def test_tags_in_parts_are_text():
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is <image>?"}]}]}
    assert conversation_of(record).media() == []


def test_learn_is_kept_of_parts_and_turns():
    record = {
        "messages": [
            {"role": "assistant", "content": [{"type": "text", "text": "no", "learn": False}, "yes"]},
            {"role": "assistant", "content": "no", "learn": False},
        ]
    }
    first, second = conversation_of(record).turns
    assert [part.learn for part in first.parts] == [False, True]
    assert first.learn and not second.learn


def test_data_urls_and_base64_are_bytes():
    coded = base64.b64encode(b"sound").decode()
    parts = [
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{coded}"}},
        {"type": "input_audio", "input_audio": {"data": coded, "format": "wav"}},
        {"type": "audio", "audio": {"bytes": b"sound", "path": None}},
        {"type": "audio", "audio": "data:text/plain,sound"},
    ]
    turn = conversation_of({"messages": [{"role": "user", "content": parts}]}).turns[0]
    assert [part.medium.data for part in turn.parts] == [b"sound"] * 4


def test_decoded_sounds_are_values():
    record = {"audio": {"array": [0.0, 1.0], "sampling_rate": 8000}, "text": "tick"}
    assert conversation_of(record).media()[0][1].medium.value == ([0.0, 1.0], 8000)


def said(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


REFUSED = {
    "no mapping": (["text"], "form", "expected a record with names"),
    "unknown columns": ({"title": "x"}, "form", "expected 'messages'"),
    "turns that are no list": ({"messages": "hello"}, "form", "expected a list of turns"),
    "a turn that is no mapping": ({"messages": ["hello"]}, "form", "expected a turn"),
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "form", "role: expected one of"),
    "a part without a type": (said({"text": "x"}), "form", "expected a part with a 'type'"),
    "a part of unknown type": (said({"type": "smell", "smell": "x"}), "form", "expected text, image"),
    "a text part without text": (said({"type": "text"}), "form", "needs 'text'"),
    "input_audio without data": (said({"type": "input_audio"}), "form", "needs 'input_audio'"),
    "learn that is no truth": (said({"type": "text", "text": "x", "learn": 1}), "form", "expected true or false"),
    "no turns": ({"messages": []}, "empty", "at least one turn"),
    "an empty turn": ({"messages": [{"role": "user", "content": "  "}]}, "empty", "turn 0 (user) is empty"),
    "a turn without content": ({"messages": [{"role": "user", "content": None}]}, "empty", "is empty"),
    "a URL": (said({"type": "image", "image": "https://a.org/cat.png"}), "url", "URLs are not fetched"),
    "a file URL": (said({"type": "image", "image": "file:///etc/passwd"}), "url", "URLs are not fetched"),
    "no base64": (said({"type": "image", "image": "data:image/png;base64,*"}), "media", "expected base64"),
    "a data URL without data": (said({"type": "image", "image": "data:image/png"}), "media", "without a comma"),
    "a medium that is a number": (said({"type": "image", "image": 7}), "form", "expected a path or bytes"),
    "a medium that is nothing": (said({"type": "image"}), "form", "expected a path or bytes"),
    "a medium with other names": (said({"type": "image", "image": {"name": "x"}}), "form", "expected 'path'"),
    "more tags than media": (
        {"messages": [{"role": "user", "content": "<image><image>"}], "images": ["1.png"]},
        "tags",
        "2 tags <image> but 1",
    ),
    "more media than tags": (
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["1.png", "2.png"]},
        "tags",
        "1 tags <image> but 2",
    ),
    "media in parts and in a column": (
        {**said({"type": "image", "image": "1.png"}), "images": ["2.png"]},
        "form",
        "expected one of them",
    ),
    "a medium that no user's turn takes": (
        {"messages": [{"role": "assistant", "content": "x"}], "images": ["1.png"]},
        "tags",
        "no user's turn",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_of_them_is_refused(name):
    record, kind, message = REFUSED[name]
    with pytest.raises(SampleError) as caught:
        conversation_of(record)
    assert caught.value.kind == kind
    assert message in str(caught.value)
