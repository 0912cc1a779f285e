"""What every rank of a job of `tests.distributed.harness` runs: the cases named on the command line, in order."""

import faulthandler
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback

from megatron_mimo.launch import initialize
from tests.distributed.harness import Case, all_cases, end_run, shared_directory


def main(ids: list[str]) -> None:
    cases = all_cases()
    gc.freeze()  # what is imported stays; looking through it after each case would take half a second of every rank
    with open(shared_directory() / f"rank{os.environ['RANK']}.jsonl", "w") as results:
        for id in ids:
            began, computed = time.perf_counter(), time.process_time()
            report = run_case(cases[id])
            line = [id, report, time.perf_counter() - began, time.process_time() - computed]
            print(json.dumps(line), file=results, flush=True)
            if report:
                # Peers that fail in the same way get to say so before torchrun ends them.
                time.sleep(1.0)
                for child in multiprocessing.active_children():
                    child.kill()  # dist_checkpointing's writers would outlive this process
                os._exit(1)
    faulthandler.cancel_dump_traceback_later()


def run_case(case: Case) -> str:
    """The traceback of a case that raised, an empty string where it passed."""
    faulthandler.dump_traceback_later(case.timeout_s, exit=True)
    try:
        run = initialize(backend="gloo", timeout_s=case.timeout_s, **dict(case.layout))
        case.function(run)
        end_run()
    except BaseException:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main(sys.argv[1:])
