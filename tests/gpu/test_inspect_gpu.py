"""`inspect` tells the peak of a step of packs on a GPU, for each backend's own layers."""

import gc
from pathlib import Path

import pytest
import torch
import transformers
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

import megatron_mimo
from megatron_mimo.cli.building import model_config
from megatron_mimo.cli.counting import Step, footprints
from megatron_mimo.cli.laying_out import processor_of
from megatron_mimo.cli.models import find, model_of
from megatron_mimo.cli.settings import Settings
from megatron_mimo.data import PackedData, PackShape, ReadingOptions, open_source
from megatron_mimo.training import Trainer, TrainerSettings
from megatron_mimo.training.sources import batch_of
from tests.checkpoints import language_config, written
from tests.commands import parts

pytestmark = pytest.mark.gpu
LENGTH = 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """60 million parameters, with a tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts()[0])
    tokenizer.save_pretrained(directory)
    sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
    config = language_config("qwen2", num_key_value_heads=4, vocab_size=len(tokenizer), **sizes)
    return written(transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16), directory)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_the_peak_that_is_told_is_within_a_tenth_of_the_one_that_is_allocated(
    model: Path, backend: str, dtype: str, tmp_path: Path, no_run
) -> None:
    if backend == "transformer_engine":
        pytest.importorskip("transformer_engine")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "It is red. It is green. It is blue."}\n' * 400)
    place = find(str(model))
    (told,) = footprints(place, Step(length=LENGTH, dtype=dtype, backend=backend, data_path=data))

    run = megatron_mimo.initialize()
    asked = model_of(place).model_copy(update={"dtype": dtype, "backend": backend})
    config = model_config(asked, Settings())
    reading = ReadingOptions(shuffle=False)
    process = processor_of(config, None)
    batch = batch_of(next(PackedData([open_source(data)], process, PackShape(LENGTH), options=reading)))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer = Trainer(
        config,
        run,
        TrainerSettings(steps=3, progress=False, decay="constant"),
        optimizer=OptimizerConfig(lr=1e-5),
        ddp=DistributedDataParallelConfig(),
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train(lambda *_: [batch])
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(told.peak, rel=0.1)
