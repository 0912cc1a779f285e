"""How long a checkpoint holds the step: written at once, and in the background. Prints the host memory at its peak.

python -m benchmarks.checkpoints --gigabytes 5                    # on a GPU
python -m benchmarks.checkpoints --gigabytes 0.05 --saves 3       # anywhere
"""

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_mimo
from megatron_mimo import specs
from megatron_mimo.training import CheckpointSettings, Trainer, TrainerSettings

# Of a layer of hidden size H: 12 H^2 weights, each with a float32 weight and two float32 moments.
HIDDEN, BYTES_OF_A_WEIGHT = 1024, 12


def config(layers: int) -> megatron_mimo.MimoModelConfig:
    language = TransformerConfig(
        num_layers=layers, hidden_size=HIDDEN, num_attention_heads=16, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, calculate_per_token_loss=True,
    )  # fmt: skip
    params = dict(
        config=language, transformer_layer_spec=specs.language_layer_spec, vocab_size=1024, max_sequence_length=32,
        position_embedding_type="rope",
    )  # fmt: skip
    return megatron_mimo.MimoModelConfig(language_model=ModuleSpec(module=GPTModel, params=params))


def data(step: int, rank: int, size: int) -> list[dict]:
    ids = torch.randint(0, 1024, (1, 32), generator=torch.Generator().manual_seed(step))
    return [dict(input_ids=ids, labels=ids.roll(-1, 1))]


def held(trainer: Trainer, background: bool) -> float:
    """Seconds from a call of `save` until the next step can begin."""
    synchronize()
    began = time.perf_counter()
    trainer.save(background=background)
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> float:
    """Host memory of this process at its peak, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of weights and optimizer state on each rank")
    parser.add_argument("--saves", type=int, default=4, help="of each kind")
    parser.add_argument("--directory", type=Path, default=None, help="to write to; a temporary one by default")
    args = parser.parse_args()
    layers = max(1, round(args.gigabytes * 1e9 / (12 * HIDDEN**2 * BYTES_OF_A_WEIGHT)))
    directory = args.directory or Path(tempfile.mkdtemp())
    run = megatron_mimo.initialize(seed=1)
    trainer = Trainer(
        config(layers), run, TrainerSettings(steps=1000, progress=False, directory=directory),
        optimizer=OptimizerConfig(lr=1e-4, use_distributed_optimizer=True),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True),
        checkpoints=CheckpointSettings(background=True, keep_last=1),
    )  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    trainer.train_step(data)
    print(f"{device}, torch {torch.__version__}, {run.world_size} ranks, {layers} layers")
    print(f"host memory before any checkpoint: {peak():.2f} GB")
    plain = []
    for _ in range(args.saves):
        plain.append(held(trainer, background=False))
        trainer.train_step(data)
    print(f"written at once holds the step for {' '.join(f'{each:.3f}' for each in plain)} s; host {peak():.2f} GB")
    behind, steps = [], 0
    for _ in range(args.saves):
        behind.append(held(trainer, background=True))
        while trainer._saver.busy:
            trainer.train_step(data)
            trainer._saver.poll()
            steps += 1
    print(f"in the background for {' '.join(f'{each:.3f}' for each in behind)} s; host {peak():.2f} GB")
    print(f"host buffer {trainer._saver.buffer.nbytes / 1e9:.2f} GB; {steps} steps ran while the files were written")
    later = sorted(behind[1:])[len(behind[1:]) // 2]
    print(f"ratio of the second and later ones to writing at once: {later / sorted(plain)[len(plain) // 2]:.3f}")
    if args.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
