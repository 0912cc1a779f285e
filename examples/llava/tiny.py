"""What the example runs on without a download: a language model, a tower, and images of one colour."""

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
QUESTION = "What colour is it?"
# Turns end with a line break, answers with the end token.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
)
SIZE, PATCH = 16, 4


def make_parts(directory: Path) -> tuple[Path, Path]:
    """Directories of a language model and of a tower, with random weights."""
    torch.manual_seed(0)
    machine = Tokenizer(models.BPE())
    machine.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    machine.train_from_iterator(
        [QUESTION, *(f"It is {colour}." for colour in COLOURS)],
        trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=machine, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    text = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer) + 8, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    Qwen2ForCausalLM(text).save_pretrained(directory / "language_model")
    tokenizer.save_pretrained(directory / "language_model")
    CLIPVisionModel(vision).save_pretrained(directory / "tower")
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(directory / "tower")
    return directory / "language_model", directory / "tower"


def make_conversations(directory: Path, count: int = 32) -> Path:
    """Conversations about images of one colour, in LLaVA's own form: a file, and the images beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        colour, shade = list(COLOURS.items())[number % len(COLOURS)]
        Image.new("RGB", (SIZE, SIZE), shade).save(directory / f"{number}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": f"It is {colour}."},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    file = directory / "conversations.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
