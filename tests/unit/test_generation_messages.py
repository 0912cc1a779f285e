"""Messages are prompts: laid out as in training, up to where the assistant's turn begins."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from PIL import Image
from torch import nn

import megatron_mimo
from megatron_mimo.data.messages import SampleError, conversation_of
from megatron_mimo.generation.messages import prompt_of
from tests import data_samples, tiny
from tests.generating import spread

VOCABULARY, PICTURE = 448, data_samples.png(16, 8)
QUESTION = {
    "role": "user",
    "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is in the picture <|im_end|>"}],
}


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, tiny.HIDDEN)

    def forward(self, patches):
        return self.linear(patches / 255)


def model() -> megatron_mimo.MimoModel:
    images = ModuleSpec(
        module=megatron_mimo.VisionModalitySubmodules, submodules=dict(encoders={"tower": ModuleSpec(module=Tower)})
    )
    known = data_samples.ids(data_samples.tokenizer())
    made = megatron_mimo.MimoModel(
        megatron_mimo.MimoModelConfig(
            language_model=tiny.language_spec(vocab_size=VOCABULARY, max_sequence_length=128),
            modality_submodules={"images": images},
            special_token_ids={"images": known["<|image_pad|>"]},
        )
    )
    spread(made)
    return made


@pytest.mark.parametrize("template", [data_samples.CHATML, data_samples.PLAIN_TEMPLATE], ids=["chatml", "plain"])
def test_a_prompt_is_the_training_sample_up_to_where_the_answer_begins(template):
    processor = data_samples.processor(template)
    answer = {"role": "assistant", "content": "a cat"}
    whole = processor(conversation_of({"messages": [QUESTION, answer]}))
    prompt = processor(conversation_of({"messages": [QUESTION]}), prompt=True)
    assert torch.equal(prompt.input_ids, whole.input_ids[: len(prompt)])
    assert whole.learn.nonzero()[0] == len(prompt) and not prompt.learn.any()
    assert torch.equal(prompt.items[0].tensors["tower"]["patches"], whole.items[0].tensors["tower"]["patches"])
    with pytest.raises(SampleError, match="a prompt ends with a turn of the assistant"):
        processor(conversation_of({"messages": [QUESTION, answer]}), prompt=True)


def test_messages_are_answered_as_the_ids_and_media_that_they_stand_for(single_process):
    processor, ours = data_samples.processor(data_samples.CHATML), model()
    messages = [[QUESTION], [{"role": "user", "content": "Draw a cat"}]]
    outputs = ours.generate(messages, 6, processor=processor)
    for asked, output in zip(messages, outputs):
        sample = processor(conversation_of({"messages": asked}), prompt=True)
        inputs = {"images": sample.items[0].tensors} if sample.items else {}
        expected = ours.generate([{"input_ids": sample.input_ids, "modality_inputs": inputs}], 6)[0]
        assert output.ids == expected.ids
        assert output.text == processor.chat.decode(output.ids)
    with pytest.raises(ValueError, match="sample 1: a prompt ends with a turn of the assistant"):
        ours.generate([[QUESTION], [QUESTION, {"role": "assistant", "content": "no"}]], 6, processor=processor)
    with pytest.raises(ValueError, match="sample 0: .*expected a path below the media root, found the URL"):
        url = {"role": "user", "content": [{"type": "image", "image": "http://host/a.png"}]}
        ours.generate([[url]], 6, processor=processor)


def test_what_was_written_in_earlier_turns_is_shown_as_it_was_then():
    processor = data_samples.processor(data_samples.PLAIN_TEMPLATE)
    drawn = {"role": "assistant", "content": [{"type": "image", "image": data_samples.png(4, 4)}]}
    messages = [{"role": "user", "content": "Draw a cat"}, drawn, {"role": "user", "content": "What is it"}]
    prompt = prompt_of(messages, processor, SimpleNamespace())
    item = processor(conversation_of({"messages": messages}), prompt=True).items[0]
    assert item.written
    shown, written = prompt["generation_inputs"]["images"], item.tensors["pixels"]
    assert shown.keys() == written.keys() and all(torch.equal(shown[name], written[name]) for name in shown)


def test_a_processor_of_transformers_lays_messages_out_too(single_process):
    from transformers import CLIPImageProcessor, LlavaProcessor

    clip = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    tokenizer = data_samples.tokenizer(data_samples.CHATML)
    processor = LlavaProcessor(
        clip, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<|image_pad|>",
        num_additional_image_tokens=1, chat_template=data_samples.CHATML,
    )  # fmt: skip
    picture = Image.new("RGB", (28, 28), (200, 30, 60))
    question = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What"}]}
    prompt = prompt_of([question], processor, model())
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text=text, images=[picture], return_tensors="pt")
    assert torch.equal(prompt["input_ids"], expected["input_ids"][0])
    assert torch.equal(prompt["modality_inputs"]["images"]["tower"]["pixel_values"], expected["pixel_values"])
