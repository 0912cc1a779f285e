"""What the commands' tests run on: tiny parts, a folder of captioned pictures, and a recipe's changes for them."""

import json
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from PIL import Image
from transformers import (
    EncodecConfig,
    EncodecModel,
    JanusVQVAE,
    JanusVQVAEConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from examples.llava.tiny import COLOURS, SIZE, make_parts
from tests import warm


@cache
def parts() -> tuple[Path, Path]:
    """Directories of a language model and of a tower that reads images, made once a session."""
    return make_parts(Path(mkdtemp(prefix="mimo-commands-")))


@cache
def pictures(count: int = 60, text: str = "It is {}.") -> Path:
    """A folder of pictures of one colour, each with its caption beside it."""
    folder = Path(mkdtemp(prefix="mimo-commands-")) / "pictures"
    folder.mkdir()
    for number in range(count):
        colour, shade = list(COLOURS.items())[number % len(COLOURS)]
        Image.new("RGB", (SIZE, SIZE), shade).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(text.format(colour))
    return folder


def caption(directory: Path, *changes: str, steps: int = 6) -> list[str]:
    """`train caption` at tiny size, as words of the command line."""
    language_model, tower = parts()
    rates = "{images/input_projections: 3e-3, language_model: 3e-3}"
    return [
        "train", "caption", f"directory={directory}", f"data={pictures()}", f"model.language_model={language_model}",
        f"model.modalities.images.reads={tower}", "model.dtype=float32", "packing.length=128", "stages.0.steps=2",
        f"stages.1.steps={steps}", "stages.0.microbatches=1", "stages.1.microbatches=2", f"stages.1.trains={rates}",
        "checkpoints.every=2", "loggers.progress=false", *changes,
    ]  # fmt: skip


def command(*words: object, **options) -> warm.Done:
    """`megatron-mimo words` in a process of its own."""
    return warm.python("-m", "megatron_mimo.cli", *words, **options)


def whole_way(run: Callable[..., warm.Done], train: list[str], data: Path, where: Path) -> list[str]:
    """From a folder to an exported model: `train`, `generate`, `evaluate`, and `convert` to Hugging Face, as commands.

    Args:
        run: runs `megatron-mimo words`, such as `command`.
        train: words whose run is `where / "run"`.
        data: that it is asked and scored on.
        where: a directory, which then has `answers`, `scores` and `hf` too.

    Returns:
        What it says of each record; what was converted says the same.
    """
    short, said = ("--max-new-tokens", 12), {}
    for words in (
        train,
        ["generate", where / "run", data, "--output", where / "answers", *short],
        ["evaluate", where / "run", data, "--output", where / "scores", *short],
        ["convert", where / "run", where / "hf"],
        ["generate", where / "hf", data, "--output", where / "again", *short],
    ):
        done = run(*words)
        assert done.returncode == 0, (words, done.stderr)
        assert len(done.stderr.splitlines()) < 10, done.stderr  # nothing of weights that are left out on purpose
        said[words[0]] = done.stdout
    found, again = (texts(where / name) for name in ("answers", "again"))
    assert found == again
    (scores,) = json.loads((where / "scores" / "scores.json").read_text()).values()
    assert scores["records"] == len(found) and f"{data.name}: records {len(found)}, exact" in said["evaluate"]
    assert "<html" in (where / "scores" / "samples.html").read_text()
    return found


def texts(answers: Path) -> list[str]:
    """What the lines of a directory of answers say, in order."""
    found = [json.loads(line) for line in (answers / "answers.jsonl").read_text().splitlines()]
    assert [line["index"] for line in found] == list(range(len(found)))
    return [line["text"] for line in found]


@cache
def whisper() -> Path:
    """A directory of a Whisper that hears a second, with its feature extractor."""
    directory = Path(mkdtemp(prefix="mimo-commands-"))
    torch.manual_seed(1)
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=50, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(directory)
    return directory


@cache
def sounds(count: int = 40, text: str = "It is {}.") -> Path:
    """A folder of WAV files of unequal length with one of four tones, each with its text beside it."""
    folder = Path(mkdtemp(prefix="mimo-commands-")) / "sounds"
    folder.mkdir()
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        seconds = torch.arange(6000 + 200 * number) / 16000
        tone = (torch.sin(2 * torch.pi * 300 * 2 ** (number % 4) * seconds) * 20000).to(torch.int16)
        with wave.open(str(folder / f"{number:02}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(tone.numpy().tobytes())
        (folder / f"{number:02}.txt").write_text(text.format(colour))
    return folder


def listen(directory: Path, *changes: str, steps: int = 6) -> list[str]:
    """`train listen` at tiny size."""
    language_model, _ = parts()
    rates = "{audio/input_projections: 3e-3, language_model: 3e-3}"
    return [
        "train", "listen", f"directory={directory}", f"data={sounds()}", f"model.language_model={language_model}",
        f"model.modalities.audio.reads.name={whisper()}", "model.dtype=float32", "packing.length=256",
        "stages.0.steps=2", f"stages.1.steps={steps}", "stages.0.microbatches=1", "stages.1.microbatches=2",
        f"stages.1.trains={rates}", "stages.1.decay=constant", "loggers.progress=false", *changes,
    ]  # fmt: skip


def any_to_any(directory: Path, *changes: str, steps: int = 6) -> list[str]:
    """`train any_to_any` at tiny size: pictures are read and drawn, sounds are read."""
    language_model, tower = parts()
    data = f"[{{path: {pictures()}}}, {{path: {pictures()}, columns: write}}, {{path: {sounds()}}}]"
    trained = ("images/input_projections", "audio/input_projections", "images/generation_input", "images/decoders")
    rates = "{" + "".join(f"{part}: 3e-3, " for part in trained) + "language_model: 3e-3}"
    return [
        "train", "any_to_any", f"directory={directory}", f"data={data}", f"model.language_model={language_model}",
        f"model.modalities.images.reads={tower}", f"model.modalities.audio.reads.name={whisper()}",
        "model.modalities.images.writes={kind: flow, size: [8, 8], patch: 4, hidden_width: 32, depth: 2}",
        "model.dtype=float32", "packing.length=256", "stages.0.steps=2", f"stages.1.steps={steps}",
        "stages.0.microbatches=1", "stages.1.microbatches=2", f"stages.1.trains={rates}", "stages.1.decay=constant",
        "loggers.progress=false", *changes,
    ]  # fmt: skip


@cache
def codec() -> Path:
    """A directory of a VQ-VAE of Janus whose codes stand for squares of two pixels, of fresh weights."""
    directory = Path(mkdtemp(prefix="mimo-commands-"))
    torch.manual_seed(1)
    config = JanusVQVAEConfig(
        embed_dim=4, num_embeddings=32, latent_channels=8, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, num_patches=4,
    )  # fmt: skip
    JanusVQVAE(config).save_pretrained(directory)
    return directory


@cache
def sound_codec() -> Path:
    """A directory of an EnCodec of two codebooks that has other codes for each of the tones of `sounds`."""
    directory = Path(mkdtemp(prefix="mimo-commands-"))
    torch.manual_seed(1)
    config = EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16, upsampling_ratios=[8, 5, 4],
        num_residual_layers=1, num_lstm_layers=1, sampling_rate=8000, target_bandwidths=[0.5], normalize=False,
    )  # fmt: skip
    model = EncodecModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("original0"):  # the norm of a layer's weight
                parameter.fill_(2.0)
    for name, buffer in model.named_buffers():
        if name.endswith("embed"):  # codebooks begin as zeros
            buffer.copy_(0.1 * torch.randn(buffer.shape))
    model.save_pretrained(directory)
    return directory


def spoken() -> Path:
    """`sounds` whose texts ask for them."""
    return sounds(text="Say {}.")


def say_and_draw(directory: Path, *changes: str, steps: int = 6) -> list[str]:
    """`train draw` at tiny size, of a model that says sounds as codes and draws pictures by a flow transformer."""
    draws = "{kind: flow_transformer, size: [8, 8], patch: 4, hidden_width: 32, depth: 2, heads: 4}"
    says = f"{{kind: codes, codec: {sound_codec()}, seconds: 0.9, hidden_width: 32}}"
    trained = ("images/generation_input", "images/decoders", "audio/generation_input", "audio/decoders")
    rates = "{" + "".join(f"{part}: 3e-3, " for part in trained) + "language_model: 3e-3}"
    stage = f"{{name: whole, steps: {steps}, microbatches: 2, decay: constant, trains: {rates}}}"
    return draw(
        directory, f"data=[{{path: {pictures()}, columns: write}}, {{path: {spoken()}, columns: write}}]",
        f"model.modalities.images.writes={draws}",
        f"model.modalities.audio={{writes: {says}, generation_token: <say>}}", f"stages=[{stage}]", *changes,
    )  # fmt: skip


def draw(directory: Path, *changes: str, steps: int = 6) -> list[str]:
    """`train draw` at tiny size."""
    language_model, _ = parts()
    rates = "{images/generation_input: 3e-3, images/decoders: 3e-3, language_model: 3e-3}"
    return [
        "train", "draw", f"directory={directory}", f"data={{path: {pictures()}, columns: write}}",
        f"model.language_model={language_model}", f"model.modalities.images.writes.codec={codec()}",
        "model.modalities.images.writes.size=[8, 8]", "model.dtype=float32", "packing.length=128", "stages.0.steps=2",
        f"stages.1.steps={steps}", "stages.0.microbatches=1", "stages.1.microbatches=2", f"stages.1.trains={rates}",
        "stages.1.decay=constant", "loggers.progress=false", *changes,
    ]  # fmt: skip
