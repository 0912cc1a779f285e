"""`generate`: records in, answers and media out, in order; the same command goes on where it was stopped."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mimo.cli.errors import Refused
from megatron_mimo.cli.models import Opened
from megatron_mimo.cli.prompts import Prompt, Spoken, prompts_of
from megatron_mimo.data.sources import Source
from megatron_mimo.data.written import write_whole
from megatron_mimo.generation.results import GenerationOutput, MediaPart, TextPart, save
from megatron_mimo.launch import Run
from megatron_mimo.training.progress import Progress

logger = logging.getLogger(__name__)

#: Below the output's directory: what is finished, what was asked for, and the lines of each attempt and rank.
ANSWERS, ASKED, PARTS = "answers.jsonl", "asked.json", "parts"

#: Positions of an answer's text where nothing else is asked for.
TEXT_TOKENS = 128

#: Of what is asked for: not options of `MimoModel.generate` that are passed on as they are.
_OURS = ("model", "ema", "max_new_tokens", "seed")


def generate(
    opened: Opened, source: Source, output: Path, run: Run, *, asked: Mapping[str, Any], batch_size: int
) -> Path:
    """Answers every record of a source, and gives the file with the answers in its order. Collective over all ranks.

    A line has `index`, `read` (files that the record shows), `text`, `parts` (media as paths below `output`), `reason`
    and, where a record cannot be used, `error`. Data-parallel ranks share the records out.

    Args:
        opened: the model.
        source: of records; what stands before a record's last answer is asked.
        output: directory of the answers, with those of an earlier attempt.
        run: in progress.
        asked: options of `MimoModel.generate`, `seed` an int, `max_new_tokens` (None for `TEXT_TOKENS` and one
            medium), and whatever else an answer depends on, as JSON.
        batch_size: records that are answered together.

    Raises:
        Refused: `output` holds answers that were asked for otherwise.
    """
    parts = output / PARTS
    asked = {**asked, "max_new_tokens": asked["max_new_tokens"] or TEXT_TOKENS + opened.written.rows}
    done = _done(parts)
    attempt = len({path.name.partition("-")[0] for path in parts.glob("*.jsonl")}) if parts.is_dir() else 0
    _barrier(run)  # every rank has looked before one writes
    _check_asked(output, {**asked, "records": len(source), "data": str(source.path), "columns": source.columns}, run)
    options = {name: value for name, value in asked.items() if name not in _OURS}
    spoken = Spoken(opened.config)
    options |= {"stop_ids": spoken.ends, "tokenizer": spoken, "on_error": "return"}
    left = [index for index in range(len(source)) if index not in done or "error" in done[index]]
    mine = left[run.data_rank :: run.layout.data_parallel_size]
    writes = run.tensor_rank == run.pipeline_rank == run.context_rank == 0
    if writes:
        parts.mkdir(parents=True, exist_ok=True)
    file = parts / f"{attempt:05d}-{run.data_rank:05d}.jsonl"
    with Progress(len(mine), shown=writes and run.data_rank == 0, unit="record") as bar:
        for count, indices in enumerate(batched(mine, batch_size)):
            began = time.monotonic()
            prompts = list(prompts_of(source, opened.process, indices))
            answers = _answered(opened, prompts, asked, options)
            if writes:
                rate = opened.written.sampling_rate
                lines = [_line(one, answer, output, rate) for one, answer in zip(prompts, answers)]
                with file.open("a", encoding="utf-8") as stream:
                    stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            bar.show(count * batch_size + len(indices), {}, (time.monotonic() - began) / len(indices))
    _barrier(run)
    if run.rank == 0:
        found = _done(parts)
        written = output / f"writing_{ANSWERS}"
        with written.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(found[index], ensure_ascii=False) + "\n" for index in sorted(found))
        written.replace(output / ANSWERS)
        if failed := [line["error"] for line in found.values() if "error" in line]:
            said = "%s: %d of %d records have no answer; mend them and give the same command. The first: %s"
            logger.warning(said, source.path, len(failed), len(found), failed[0])
    _barrier(run)
    return output / ANSWERS


def read_answers(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of answers; one that was cut short is left out."""
    for line in file.read_text("utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        yield found


def _answered(
    opened: Opened, prompts: Sequence[Prompt], asked: Mapping[str, Any], options: Mapping[str, Any]
) -> list[GenerationOutput]:
    """An answer to each prompt; one that cannot be used has its error."""
    usable = [one for one in prompts if one.given is not None]
    answers: list[GenerationOutput] = []
    if usable:
        # A record's draws are its own, whatever batch and rank it falls to.
        seeds = [asked["seed"] + one.index for one in usable]
        model = opened.models[0]
        answers = model.generate([one.given for one in usable], asked["max_new_tokens"], seed=seeds, **options)
    found = {one.index: answer for one, answer in zip(usable, answers)}
    return [found.get(one.index) or GenerationOutput(error=ValueError(one.error), reason="error") for one in prompts]


def _line(prompt: Prompt, answer: GenerationOutput, output: Path, rate: int) -> dict[str, Any]:
    line: dict[str, Any] = {"index": prompt.index, "read": list(prompt.read), "text": answer.text, "parts": []}
    line["reason"] = answer.reason
    if answer.error is not None:
        return line | {"error": " ".join(str(answer.error).split())}
    media = [part for part in answer.parts if not isinstance(part, TextPart)]
    paths = iter(_saved(media, output / "media" / f"{prompt.index:08d}", rate) if media else ())
    for part in answer.parts:
        if isinstance(part, TextPart):
            line["parts"].append({"type": "text", "text": part.text})
        else:
            line["parts"].append({"type": part.kind, part.kind: str(next(paths).relative_to(output))})
    return line


def _saved(media: Sequence[MediaPart], folder: Path, rate: int) -> list[Path]:
    """The files of a record's media, clips of `rate` samples a second; the folder is there once all are whole, and one
    of an earlier attempt goes."""
    writing = folder.with_name(f"writing_{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    written = save([GenerationOutput(parts=list(media))], writing, sampling_rate=rate)
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    return [folder / path.name for path in written]


def _done(parts: Path) -> dict[int, dict[str, Any]]:
    files = sorted(parts.glob("*.jsonl")) if parts.is_dir() else []
    return {line["index"]: line for file in files for line in read_answers(file)}


def _check_asked(output: Path, asked: Mapping[str, Any], run: Run) -> None:
    file = output / ASKED
    before = json.loads(file.read_text("utf-8")) if file.is_file() else None
    changed = sorted(key for key in asked if before is not None and before.get(key) != asked[key])
    if before is not None and changed:
        told = ", ".join(f"{key}: {before.get(key)!r} then, {asked[key]!r} now" for key in changed)
        raise Refused(f"{output}: holds answers that were asked for otherwise ({told}); give another --output")
    _barrier(run)
    if run.rank == 0 and before is None:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asked, indent=2))


def _barrier(run: Run) -> None:
    if run.world_size > 1:
        dist.barrier()
