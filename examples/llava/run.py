"""The four commands."""

import argparse
from pathlib import Path

import torch

import megatron_mimo
from examples.llava.caption import caption
from examples.llava.tiny import QUESTION, make_conversations, make_parts
from examples.llava.train import STAGES, train


def convert(output: Path, language_model: str | None, tower: str | None) -> None:
    """A language model and a tower -> a LLaVA whose projector begins fresh; tiny ones where none are named."""
    if language_model is None or tower is None:
        made = make_parts(output.with_name(output.name + "-parts"))
        make_conversations(output.with_name(output.name + "-images"))
        language_model, tower = language_model or str(made[0]), tower or str(made[1])
    model = megatron_mimo.from_pretrained(
        language_model=language_model,
        encoders={"images": {"tower": tower}},
        special_tokens={"images": "<image>"},
    )
    megatron_mimo.save_pretrained(model, output)


def export(source: str, output: Path, dtype: torch.dtype | None) -> None:
    """A trained LLaVA, or any other, in another dtype, for transformers and vLLM."""
    megatron_mimo.save_pretrained(megatron_mimo.from_pretrained(source), output, dtype=dtype)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.llava", description="LLaVA from its parts to captions.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("convert", help="put a language model and a tower together")
    start.add_argument("--language-model", default=None, help="a directory or name on the hub; a tiny one by default")
    start.add_argument("--tower", default=None, help="the same: CLIP or SigLIP")
    teach = commands.add_parser("train", help="train in two stages")
    teach.add_argument("--model", required=True, help="a directory, or a name such as llava-hf/llava-1.5-7b-hf")
    teach.add_argument("--data", type=Path, required=True, help="conversations, such as LLaVA's own files")
    teach.add_argument("--stages", nargs="*", choices=sorted(STAGES), default=list(STAGES))
    teach.add_argument("--steps", type=int, default=100, help="of each stage")
    teach.add_argument("--microbatches", type=int, default=4, help="packs of each step, on each data-parallel rank")
    teach.add_argument("--length", type=int, default=4096, help="positions of a pack")
    teach.add_argument("--learning-rate", type=float, default=None, help="of both stages, in place of LLaVA 1.5's")
    teach.add_argument("--tensor-parallel", type=int, default=1)
    teach.add_argument("--pipeline-parallel", type=int, default=1)
    say = commands.add_parser("caption", help="ask about an image")
    say.add_argument("--model", required=True)
    say.add_argument("--image", type=Path, required=True)
    say.add_argument("--question", default=QUESTION)
    out = commands.add_parser("export", help="write a model for transformers and vLLM")
    out.add_argument("--model", required=True)
    for command in (start, teach, out):
        command.add_argument("--output", type=Path, required=True, help="a directory that is not there yet")
    for command in (teach, out):
        command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    args = parser.parse_args()
    layout = {}
    if args.command == "train":
        layout = {
            "tensor_model_parallel_size": args.tensor_parallel,
            "pipeline_model_parallel_size": args.pipeline_parallel,
        }
    run = megatron_mimo.initialize(**layout)
    if args.command == "convert":
        convert(args.output, args.language_model, args.tower)
    elif args.command == "train":
        source = args.model
        for stage in args.stages:
            last = stage == args.stages[-1]
            trainer = train(
                run,
                source,
                args.data,
                STAGES[stage],
                steps=args.steps,
                microbatches=args.microbatches,
                length=args.length,
                dtype=None if args.dtype is None else getattr(torch, args.dtype),
                learning_rate=args.learning_rate,
            )
            source = args.output if last else args.output.with_name(f"{args.output.name}-{stage}")
            megatron_mimo.save_pretrained(trainer.models, source)
    elif args.command == "caption":
        print(caption(megatron_mimo.from_pretrained(args.model), args.image, args.question))
    else:
        export(args.model, args.output, None if args.dtype is None else getattr(torch, args.dtype))
    megatron_mimo.shutdown()
