"""Tokens a second of `model.generate` beside `transformers` on the same weights in the same run.

LLaVA with random weights in bfloat16, a prompt of 640 positions with one image, greedy. The first token is timed by a
call that asks for one; the others by the difference to a call that asks for all. On a CPU it is float32, since
kernels there round bfloat16 each in their way, and the likeliest of random tokens is near the next.

python -m benchmarks.generate                                # on an H100: 1.04 B beside CLIP-L/336
python -m benchmarks.generate --profile profile.json         # and the kernels of one decode step
python -m benchmarks.generate --shape small --new 8 --repeats 1 --batches 1 2      # anywhere, in a minute
python -m benchmarks.generate --pictures                     # a 32 x 32 flow picture, one of 576 codes; both loops
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.decoders import CodeInput, DiscreteDecoder, FlowDecoder, NoisedTargetInput
from megatron_mimo.generation import Session, Writing

#: Of the language model layers, width, feed-forward width, heads, groups, vocabulary; of the tower width, feed-forward
#: width, layers, heads, image size, patch.
SHAPES = {
    "llava": ((20, 2048, 5632, 16, 4, 32064), (1024, 4096, 24, 16, 336, 14)),
    "small": ((2, 128, 256, 4, 2, 512), (32, 64, 3, 4, 56, 14)),
}
#: Reading weights at this rate is what nothing beats: an H100's HBM3, as a copy kernel measures it.
BANDWIDTH = 3.0e12


def theirs_of(shape: str, dtype: torch.dtype) -> Any:
    language, tower = SHAPES[shape]
    layers, width, wide, heads, groups, vocabulary = language
    tower_width, tower_wide, tower_layers, tower_heads, size, patch = tower
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=wide, num_attention_heads=heads,
            num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=4096,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=tower_width, intermediate_size=tower_wide, num_hidden_layers=tower_layers,
            num_attention_heads=tower_heads, image_size=size, patch_size=patch,
        ),
        image_token_index=vocabulary - 32, image_seq_length=(size // patch) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).to(dtype).eval()


def prompt_of(theirs: Any, batch: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, S]` with one image each, and pixels."""
    config, draw = theirs.config, torch.Generator().manual_seed(1)
    rows, size = config.image_seq_length, config.vision_config.image_size
    ids = torch.randint(0, config.text_config.vocab_size - 64, (batch, rows + text), generator=draw)
    ids[:, 5 : 5 + rows] = config.image_token_index
    return ids, torch.randn(batch, 3, size, size, generator=draw, dtype=torch.float32).to(theirs.dtype)


def timed(call: Callable[[int], object], new: int, repeats: int) -> tuple[float, float]:
    """Milliseconds to the first token, and of each after it: medians."""
    call(new)  # captures and compiles
    call(1)
    found: dict[int, list[float]] = {1: [], new: []}
    for _ in range(repeats):
        for count in found:
            wait()
            began = time.perf_counter()
            call(count)
            wait()
            found[count].append(1e3 * (time.perf_counter() - began))
    first = statistics.median(found[1])
    return first, (statistics.median(found[new]) - first) / (new - 1)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def line(name: str, batch: int, first: float, each: float, least: float, base: float | None) -> dict[str, object]:
    """One line of the table, printed."""
    ratio = f"{base / each:6.2f}x" if base else "      "
    share = f"{100 * least / each:5.1f} %"
    speed = f"{first:9.1f} | {each:8.2f} | {1e3 * batch / each:8.0f}"
    print(f"| {name:34} | {batch:5} | {speed} | {share} | {ratio} |", flush=True)
    return dict(name=name, batch=batch, first_ms=first, ms_a_token=each, tokens_a_second=1e3 * batch / each)


def texts(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    theirs = theirs_of(arguments.shape, dtype)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        model = megatron_mimo.from_pretrained(directory, dtype=dtype)
    theirs = theirs.to(device)
    weights = sum(p.numel() * p.element_size() for p in model.language_model.parameters())
    # Of the embedding one row is read.
    least = 1e3 * (weights - model.language_model.embedding.word_embeddings.weight.nbytes) / BANDWIDTH
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}; weights read at")
    print(f"{BANDWIDTH / 1e12:.1f} TB/s take {least:.3f} ms; linear layers are {type(linear_of(model)).__name__}")
    print("| what | batch | first ms | ms/token | tokens/s | bandwidth | of compiled |")
    lines = []
    for batch in arguments.batches:
        ids, pixels = (x.to(device) for x in prompt_of(theirs, batch, arguments.text))
        prompts = [
            {"input_ids": own.cpu(), "modality_inputs": {"images": {"tower": {"pixel_values": pixel[None]}}}}
            for own, pixel in zip(ids, pixels)
        ]
        said: dict[str, list[list[int]]] = {}

        base = None
        for name, options in {"transformers": {}, "transformers, static": {"cache_implementation": "static"}}.items():
            if options and device.type != "cuda":
                continue  # it compiles for minutes
            with torch.no_grad():
                call = partial(peer, theirs, ids, pixels, options)
                first, each = timed(call, arguments.new, arguments.repeats)
                said[name] = call(arguments.new).tolist()
            base = each
            lines.append(line(name, batch, first, each, least, None))
        ways: dict[str, dict[str, Any]] = {"ours, eager": dict(graphs=False)}
        if device.type == "cuda":
            ways |= {"ours, graphs": dict(), "ours, compiled and graphs": dict(compiled=True)}
        for name, options in ways.items():
            with Session(model, **options) as session:
                call = partial(ours, model, prompts, session)
                first, each = timed(call, arguments.new, arguments.repeats)
                said[name] = [output.ids for output in call(arguments.new)]
                graphs = 0 if session.recorder is None else len(session.recorder)
                if arguments.profile and name.endswith("graphs"):
                    profiled(partial(call, arguments.new), Path(arguments.profile), name, batch)
            lines.append(line(f"{name}: {graphs}" if graphs else name, batch, first, each, least, base))
        reference = said["ours, eager"]
        for name, tokens in said.items():
            same = sum(a == b for x, y in zip(tokens, reference) for a, b in zip(x, y))
            print(f"  tokens of {name} that are those of ours, eager: {same} of {batch * arguments.new}")
    return lines


def peer(theirs: Any, ids: torch.Tensor, pixels: torch.Tensor, options: dict[str, Any], count: int) -> torch.Tensor:
    """What `transformers` says, int64 `[B, count]`."""
    said = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=count,
        min_new_tokens=count, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    return said[:, ids.shape[1] :]


def ours(model: megatron_mimo.MimoModel, prompts: list[dict], session: Session, count: int) -> Any:
    return model.generate(prompts, count, session=session)


def linear_of(model: megatron_mimo.MimoModel) -> torch.nn.Module:
    return model.language_model.decoder.layers[0].self_attention.linear_qkv


def profiled(call: Callable[[], object], path: Path, name: str, batch: int) -> None:
    """The kernels that take longest, printed; all of them as a trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        wait()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25))
    found.export_chrome_trace(str(path.with_name(f"{path.stem}-{name.replace(' ', '-')}-{batch}{path.suffix}")))


# Pictures ---------------------------------------------------------------------------------------------------------


def writer_of(kind: str, shape: str, device: torch.device) -> tuple[megatron_mimo.MimoModel, int]:
    """A model that writes pictures, and generation tokens of one."""
    (layers, width, wide, heads, groups, vocabulary), _ = SHAPES[shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = TransformerConfig(
        num_layers=layers, hidden_size=width, ffn_hidden_size=wide, num_attention_heads=heads, num_query_groups=groups,
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, bias_activation_fusion=False, hidden_dropout=0.0,
        attention_dropout=0.0, params_dtype=dtype, bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    rows = (64 if kind == "flow" else 576) if shape == "llava" else 16
    if kind == "flow":
        # 32 x 32 in RGB: 64 patches of 4 x 4.
        params: dict[str, Any] = dict(width=width, target_width=48, rows_per_item=rows, hidden_width=width // 2)
        decoder, feed = FlowDecoder, NoisedTargetInput
    else:
        params = dict(width=width, codebook_sizes=vocabulary // 4)
        decoder, feed = DiscreteDecoder, CodeInput
    images = ModuleSpec(
        module=megatron_mimo.VisionModalitySubmodules,
        submodules=dict(
            decoders={"out": ModuleSpec(module=decoder, params=params | {"config": config})},
            generation_input=ModuleSpec(module=feed, params=dict(hidden_size=width)),
        ),
    )
    language = ModuleSpec(
        module=GPTModel,
        params=dict(
            config=config, transformer_layer_spec=specs.language_layer_spec, vocab_size=vocabulary,
            max_sequence_length=4096, position_embedding_type="rope",
        ),
    )  # fmt: skip
    model = megatron_mimo.MimoModel(
        megatron_mimo.MimoModelConfig(
            language_model=language,
            modality_submodules={"images": images},
            generation_token_ids={"images": vocabulary - 1},
        )
    )
    return model.to(device=device, dtype=dtype).eval(), rows


def pictures(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    lines = []
    print("| pictures | batch | whole passes/s | cached/s | ratio |")
    for kind in ("flow", "codes"):
        model, rows = writer_of(kind, arguments.shape, device)
        token = model.mimo_config.generation_token_ids["images"]
        for batch in arguments.batches:
            ids = torch.randint(0, 256, (batch, 32), generator=torch.Generator().manual_seed(1))
            prompts = [{"input_ids": [*own, token]} for own in ids.tolist()]
            whole = torch.cat([ids, torch.full((batch, rows), token)], dim=1).to(device)
            options: dict[str, Any] = {"steps": arguments.steps} if kind == "flow" else {"temperature": 0}
            wanted = {"images": Writing(rows=rows, options=options)}

            before = partial(whole_passes, model, whole, kind, options)
            seconds = [seconds_of(before, arguments.repeats)]
            with Session(model) as session:
                cached = partial(model.generate, prompts, rows, modalities=wanted, session=session)
                seconds.append(seconds_of(cached, arguments.repeats))
            old, new = (batch / one for one in seconds)
            print(f"| {kind}, {rows} rows | {batch} | {old:.2f} | {new:.2f} | {new / old:.1f}x |", flush=True)
            lines.append(dict(kind=kind, batch=batch, whole_passes_a_second=old, cached_a_second=new))
    return lines


def whole_passes(model: megatron_mimo.MimoModel, ids: torch.Tensor, kind: str, options: dict[str, Any]) -> object:
    """The loops that run the model on the whole sequence at each step."""
    if kind == "flow":
        return megatron_mimo.sample_flow(model, ids, "images", **options)
    return megatron_mimo.sample_one_by_one(model, ids, "images", options=options)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    call()
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llava")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--text", type=int, default=64, help="positions of text beside the image's")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="of the flow's solver")
    parser.add_argument("--pictures", action="store_true", help="pictures in place of text")
    parser.add_argument("--profile", help="a file for traces of ours with graphs")
    parser.add_argument("--json", help="a file for the figures")
    arguments = parser.parse_args()
    run = megatron_mimo.initialize(seed=1)
    transformers.logging.set_verbosity_error()
    lines = pictures(arguments, run.device) if arguments.pictures else texts(arguments, run.device)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(lines, indent=1))
    megatron_mimo.shutdown()


if __name__ == "__main__":
    main()
