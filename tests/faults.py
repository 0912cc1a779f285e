"""Puts one fault after another into a copy of the tree: a named test must fail each time.

    python -m tests.faults             # all of them, about 20 s each
    python -m tests.faults tp2_sp      # those whose test has that in its name

A suite that is made smaller keeps its claims as long as every fault here dies. Add a line where a test's claim has
none; text that is no longer in its file is an error, so that the list stays true.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """One line of the package made wrong, and the case of `tests.distributed` that must see it."""

    what: str
    file: str
    right: str
    wrong: str
    case: str


def layout(name: str, ranks: int = 2) -> str:
    return f"layouts.{name}_equals_one_rank[{ranks}]"


def decoder(kind: str, name: str) -> str:
    return f"decoders.{kind}_on_{name}_equals_one_rank[2]"


FAULTS = [
    Fault(
        "gradients of replicated encoders summed for their names",
        "modality/marks.py",
        "if summed == partial or",
        "if not partial or",
        "marks.replicated_encoders_keep_their_gradients_whatever_their_parameters_are_called[2-tp2]",
    ),
    Fault(
        "gradients of norms of cut heads averaged, not summed",
        "modality/marks.py",
        "return gradient * factor",
        "return gradient",
        "marks.norms_of_an_encoder_s_cut_heads_equal_one_rank_whatever_the_language_model_has[2]",
    ),
    Fault("rows of other ranks are kept", "route.py", "if groups:", "if False:", layout("tp2_sp")),
    Fault("rows stay on their rank", "route.py", "for group in groups:", "for group in ():", layout("tp2_sp")),
    Fault(
        "gradients of rows stay on the rank that decoded them",
        "route.py",
        "if ctx.context_group is not None:",
        "if False:",
        decoder("flow_transformer", "cp2"),
    ),
    Fault(
        "the second chunk of the zigzag is another rank's",
        "sharding.py",
        "(2 * cp_size - 1 - 2 * cp_rank) * chunk",
        "(2 * cp_size - 2 - 2 * cp_rank) * chunk",
        layout("cp2"),
    ),
    Fault(
        "counts of a step are those of one rank",
        "training/forward.py",
        "data_group=data_hosts if mimo.post_process and mimo.training else None",
        "data_group=None",
        layout("dp2"),
    ),
    Fault(
        "a loss per token is scaled by microbatches and ranks",
        "training/scale.py",
        "max(self.tokens, 1.0) if self.per_token else float(self.parts)",
        "float(self.parts)",
        layout("tp2"),
    ),
    Fault(
        "a loss per microbatch forgets the ranks",
        "training/forward.py",
        "self._microbatches() * mimo.pg_collection.dp_cp.size()",
        "self._microbatches()",
        layout("tp2_pp2_dp2_ep2", 8),
    ),
    Fault(
        "tokens are reported where microbatches count",
        "training/scale.py",
        "if not scale.per_token:",
        "if False:",
        layout("tp2_pp2_cp2_ep2", 8),
    ),
    Fault(
        "an idle encoder gives no gradient",
        "idle.py",
        "return grad, ctx.parameter.new_zeros(()).expand_as(ctx.parameter)",
        "return grad, None",
        layout("dp2_distributed_optimizer"),
    ),
    Fault(
        "an idle decoder's parameters get no gradient",
        "idle.py",
        "return grad, ctx.parameter.new_zeros(()).expand_as(ctx.parameter)",
        "return grad, None",
        decoder("diffusers", "dp2_one_without"),
    ),
    Fault(
        "an idle encoder gathers no parameters",
        "idle.py",
        "for hook in gather_hooks(part):",
        "for hook in ():",
        layout("dp2_distributed_optimizer"),
    ),
    Fault(
        "data-parallel ranks begin with weights of their own",
        "launch.py",
        "    torch.manual_seed(seed + 100 * pipeline_rank)\n    model",
        "    seed += dist.get_rank()\n    torch.manual_seed(seed + 100 * pipeline_rank)\n    model",
        layout("dp2"),
    ),
    Fault(
        "stages of a pipeline begin with other tied weights",
        "megatron_model.py",
        "return self.language_model.share_embeddings_and_output_weights",
        "return False",
        layout("pp2_tied"),
    ),
    Fault(
        "a share of the targets begins with the first item",
        "decoders/prepared.py",
        "_item_slice(value, items, start_item, stop_item) for",
        "_item_slice(value, items, 0, stop_item - start_item) for",
        decoder("discrete", "cp2"),
    ),
    Fault(
        "the first context-parallel rank takes every item",
        "model.py",
        "share = (self.pg_collection.cp.rank(), self.pg_collection.cp.size())",
        "share = (0, 1)",
        decoder("flow", "cp2_one_item"),
    ),
    Fault(
        "the loss of cut logits is that of one rank's",
        "decoders/discrete.py",
        "if self._group is None:\n            return F.cross",
        "if True:\n            codes = codes % logits.shape[1]\n            return F.cross",
        decoder("discrete", "tp2"),
    ),
    Fault(
        "cut layers split rows that are whole",
        "decoders/layers.py",
        "config.sequence_parallel = False",
        "config.sequence_parallel = True",
        decoder("discrete", "tp2_sp"),
    ),
    Fault(
        "partial products of a row layer are not summed",
        "decoders/parallel_layers.py",
        "return super().forward(x)[0]\n\n\ndef",
        "return torch.nn.functional.linear(x, self.weight, self.bias)\n\n\ndef",
        decoder("flow_transformer", "tp2"),
    ),
    Fault(
        "attention has every head on every rank",
        "decoders/flow_transformer.py",
        "self.heads = heads // sharding.size",
        "self.heads = heads",
        decoder("flow_transformer_own", "tp2"),
    ),
    Fault(
        "rows of the null condition stay in the loss's count",
        "losses.py",
        "parts.append(weight * LossTerm(term.sum, count).mean())",
        "parts.append(weight * LossTerm(term.sum, term.count).mean())",
        decoder("regression", "dp2_uneven"),
    ),
]

RUN = """
import os, sys
from tests import warm
ranks, directory, *cases = sys.argv[1:]
environment = os.environ | {"MIMO_CASES_DIRECTORY": directory}
done = warm.ranks(int(ranks), "-m", "tests.distributed.rank", *cases, env=environment, timeout=400)
warm.stop()
print("DIED" if done.returncode else "LIVES")
"""


def passes(tree: Path, cases: Sequence[str]) -> bool:
    """Whether all of `cases`, which take the same number of ranks, pass in `tree`."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-c", RUN, ranks_of(cases[0]), directory, *cases],
            cwd=tree,
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.strip().endswith("LIVES")


def ranks_of(case: str) -> str:
    return case.rpartition("[")[2].rstrip("]").partition("-")[0]


def copied(where: Path) -> Path:
    """The tree without what running leaves behind."""
    for name in ("megatron_mimo", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
    return where


def dies(fault: Fault) -> bool:
    """Whether its test fails with the fault."""
    with tempfile.TemporaryDirectory(prefix="mimo-fault-") as directory:
        tree = copied(Path(directory))
        path = tree / "megatron_mimo" / fault.file
        text = path.read_text()
        if text.count(fault.right) != 1:
            raise ValueError(f"{fault.what}: expected once in {fault.file}, found {text.count(fault.right)} times: "
                             f"{fault.right!r}")  # fmt: skip
        path.write_text(text.replace(fault.right, fault.wrong))
        return not passes(tree, [fault.case])


def main(wanted: str = "") -> None:
    lives, tried = [], [fault for fault in FAULTS if wanted in fault.case]
    with tempfile.TemporaryDirectory(prefix="mimo-fault-") as directory:
        tree, cases = copied(Path(directory)), sorted({fault.case for fault in tried}, key=ranks_of)
        for _, same in groupby(cases, key=ranks_of):
            if not passes(tree, list(same)):
                raise SystemExit("a test fails without any fault; mend that first")
    for fault in tried:
        dead = dies(fault)
        print(f"{'dies ' if dead else 'LIVES'}  {fault.case}: {fault.what}", flush=True)
        lives += [] if dead else [fault.what]
    if lives:
        raise SystemExit(f"{len(lives)} faults are seen by no test: {lives}")


if __name__ == "__main__":
    main(*sys.argv[1:])
