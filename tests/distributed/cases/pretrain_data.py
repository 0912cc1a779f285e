"""`pretrain --data train.jsonl --processor NAME`, packed and in rows: from files made on the spot, resumed exactly."""

import json
import re

import pytest
import torch.distributed as dist
import transformers
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from transformers import CLIPImageProcessor, LlavaProcessor

from megatron_mimo import MimoModelConfig, VisionModalitySubmodules
from megatron_mimo.launch import Run, shutdown
from megatron_mimo.training import language_spec_from_args
from megatron_mimo.training.pretraining.packs import LoopData
from tests import checkpoints, tiny
from tests import data_samples as made
from tests.distributed.cases.pretrain import LAYOUTS, STEPS, alone, assert_close, losses, run_recipe
from tests.distributed.harness import case, shared_directory

SIDE, PATCH = 28, 14
IMAGE = made.SPECIAL.index("<|image_pad|>")


class Patches(nn.Module):
    """Images `[n, 3, SIDE, SIDE]` -> `[n, 4, 16]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, PATCH, PATCH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values).flatten(2).transpose(1, 2)


class Reads:
    """A recipe with a model alone: the data is --data."""

    def model_config(self, args) -> MimoModelConfig:
        images = ModuleSpec(
            VisionModalitySubmodules,
            submodules={
                "encoders": {"patches": ModuleSpec(Patches)},
                "input_projections": [tiny.linear(16, args.hidden_size)],
            },
        )
        return MimoModelConfig(language_spec_from_args(args), {"images": images}, special_token_ids={"images": IMAGE})


def files(where, *, pictures: bool = True) -> list[str]:
    """Pictures, conversations on them and a processor, made once for all ranks; the arguments that read them."""
    if dist.get_rank() == 0:
        where.mkdir()
        words = made.tokenizer()
        assert made.ids(words)["<|image_pad|>"] == IMAGE
        clip = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
        LlavaProcessor(
            clip, words, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<|image_pad|>",
            num_additional_image_tokens=1, chat_template=made.CHATML,
        ).save_pretrained(where / "processor")  # fmt: skip
        records = []
        for number in range(24):
            (where / f"{number}.png").write_bytes(made.png(40, 30, number))
            asked = [made.text("What is in the picture " * (1 + number % 3))]
            asked += [made.image(f"{number}.png")] if pictures and number % 2 else []
            records.append({"messages": [made.user(*asked), made.assistant(made.text("a cat " * (1 + number % 5)))]})
        made.lines(where / "train.jsonl", records)
        made.lines(where / "valid.jsonl", records[:10])
    dist.barrier()
    return [
        "--data", str(where / "train.jsonl"), "--processor", str(where / "processor"), "--pack",
        "--vocab-size", "500", "--seq-length", "128", "--max-position-embeddings", "128",
    ]  # fmt: skip


def evaluated(where) -> list[str]:
    return [
        "--valid-data-path", str(where / "valid.jsonl"), "--test-data-path", str(where / "valid.jsonl"),
        "--eval-iters", "1", "--eval-interval", "2",
    ]  # fmt: skip


def seen_by(monkeypatch, split: str) -> list[tuple[int, ...]]:
    """The positions of every batch that this rank reads of a split."""
    seen: list[tuple[int, ...]] = []
    batches = LoopData.batches

    def noted(self, process, of="train"):
        found = batches(self, process, of)
        return found if of != split or found is None else _noted(found, self._data[of], seen)

    monkeypatch.setattr(LoopData, "batches", noted)
    return seen


def _noted(found, data, seen):
    for batch in found:
        seen.append(tuple(batch["input_ids"].flatten().tolist()))
        yield batch


@case(ranks=2, timeout_s=240)
def pretrain_trains_on_packs_of_files_and_goes_on_exactly_from_a_checkpoint(run: Run) -> None:
    where = shared_directory() / "pretrain-data"
    given = files(where)
    last = run.rank == run.world_size - 1
    shutdown()
    for name, layout in LAYOUTS.items():
        own = where / name
        saved = ["--save", str(own / "saved"), "--save-interval", "2"]
        unbroken = run_recipe(own, *given, *layout, *saved, recipe=Reads())
        on = [*given, *layout, "--load", str(own / "saved"), "--ckpt-step", "2"]
        resumed = run_recipe(own / "resumed", *on, recipe=Reads())
        if last:
            assert_close(resumed, unbroken, range(3, STEPS + 1))
            assert unbroken["throughput/images tokens read/s"][1] > 0
        state = json.loads((own / "saved" / "iter_0000002" / "data.json").read_text())
        size = 2 if name == "dp2" else 1
        assert state["size"] == size and sorted(state["ranks"]) == [str(rank) for rank in range(size)]
    # Without what the checkpoint says of the data the same steps see others.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopData, "loaded", lambda self, checkpoint: None)
        anew = run_recipe(where / "anew", *on, recipe=Reads())
    if last:
        assert losses(anew)["text loss"][3] != pytest.approx(losses(unbroken)["text loss"][3], rel=2e-5)


@case(ranks=2, timeout_s=240)
def pretrain_trains_and_evaluates_on_rows_of_files_and_goes_on_exactly_on_two_layouts(run: Run) -> None:
    where = shared_directory() / "pretrain-rows"
    given = [word for word in files(where) if word != "--pack"] + evaluated(where)
    last = run.rank == run.world_size - 1
    shutdown()
    given += ["--micro-batch-size", "2", "--eval-micro-batch-size", "1", "--eval-global-batch-size", "2"]
    tensor = ["--tensor-model-parallel-size", "2"]
    saved = ["--save", str(where / "saved"), "--save-interval", "3"]
    with pytest.MonkeyPatch.context() as patch:
        read = seen_by(patch, "valid")
        unbroken = run_recipe(where / "tp2", *given, *tensor, *saved, recipe=Reads())
    with pytest.MonkeyPatch.context() as patch:
        again = seen_by(patch, "valid")
        on = ["--load", str(where / "saved"), "--ckpt-step", "3"]
        resumed = run_recipe(where / "on", *given, *tensor, *on, recipe=Reads())
    if run.rank == 0:  # which reads: two evaluations of two rows each in order, the last of the run once more
        assert len(set(read)) == len(read) >= 4
        assert again[:2] == read[2:4]
    pipeline = ["--pipeline-model-parallel-size", "2"]
    other = run_recipe(where / "pp2", *given, *pipeline, *on, recipe=Reads())
    if last:
        assert_close(resumed, unbroken, range(4, STEPS + 1))
        assert_close(other, unbroken, range(4, STEPS + 1))
        (tag,) = [tag for tag in unbroken if tag.startswith("text loss validation") and "ppl" not in tag and
                  "vs samples" not in tag]  # fmt: skip
        assert sorted(unbroken[tag]) == [2, 4]
        for found in (resumed, other):
            assert found[tag][4] == pytest.approx(unbroken[tag][4], rel=2e-5)


@case(ranks=2, timeout_s=120)
def pretrain_refuses_data_that_it_cannot_read_before_any_process_group(run: Run) -> None:
    where = shared_directory() / "pretrain-refused"
    given = files(where)
    shutdown()
    data, processor = given[:2], given[2:4]
    (where / ".nv-meta").mkdir(exist_ok=True)  # as if Energon had prepared it
    refused = {
        "--processor says how --data is read": processor,
        "--pack says how --data is read": ["--pack"],
        "--pack: expected --micro-batch-size 1": [*given, "--micro-batch-size", "2"],
        "--pack: expected --eval-micro-batch-size 1": [*given, "--eval-micro-batch-size", "2"],
        "with --eval-iters 3 give --valid-data-path too": [*given, "--eval-iters", "3"],
        "--valid-data-path: nothing is evaluated with --eval-iters 0": [*given, "--valid-data-path", data[1]],
        "expected --eval-iters without --full-validation": [*given, *evaluated(where), "--full-validation"],
        f"expected {where} by itself": [*given, "--data", data[1], str(where)],
        "expected --processor NAME": [*data, "--pack"],
        "tokens, expected at most the model's 64": [*data, *processor, "--pack"],
    }

    def built(*given, **named) -> None:
        raise AssertionError("a process group was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", built)
        for message, arguments in refused.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                run_recipe(where, *arguments, recipe=Reads())
        with pytest.raises(FileNotFoundError, match="expected a file or directory of training data"):
            run_recipe(where, *given, "--data", str(where / "nothing.jsonl"), recipe=Reads())
        with pytest.raises(ValueError, match=r"expected the model's special tokens {'images': -200}, found"):
            run_recipe(where, *given, recipe=Elsewhere())


class Elsewhere(Reads):
    """A model whose images stand at another token than the processor's."""

    def model_config(self, args) -> MimoModelConfig:
        config = super().model_config(args)
        return MimoModelConfig(config.language_model, config.modality_submodules, special_token_ids={"images": -200})


@case(ranks=2)
def pretrain_begins_from_a_directory_of_weights_alike_on_every_layout(run: Run) -> None:
    where = shared_directory() / "pretrain-begins"
    given = files(where, pictures=False)  # the encoder begins fresh, otherwise on each layout
    source = where / "llama"
    if run.rank == 0:
        config = checkpoints.language_config("llama", intermediate_size=64, vocab_size=500)
        checkpoints.written(checkpoints.randomized(transformers.LlamaForCausalLM(config)), source)
    last = run.rank == run.world_size - 1
    shutdown()
    given += [
        "--normalization", "RMSNorm", "--norm-epsilon", "1e-6", "--swiglu", "--disable-bias-linear",
        "--group-query-attention", "--num-query-groups", "2", "--no-bias-swiglu-fusion",
    ]  # fmt: skip
    begins, tensor = ["--pretrained", str(source)], ["--tensor-model-parallel-size", "2"]
    fresh = run_recipe(where / "fresh", *given, *tensor, steps=2, recipe=Reads())
    begun = run_recipe(where / "tp2", *given, *tensor, *begins, steps=2, recipe=Reads())
    if last:
        with alone():
            one = run_recipe(where / "one", *given, *begins, steps=2, recipe=Reads())
        assert_close(begun, one, range(1, 3))
        assert abs(fresh["text loss"][1] - begun["text loss"][1]) > 0.1
