"""What every rank of a job of `tests.distributed.harness` runs: the cases named on the command line, in order."""

import faulthandler
import json
import multiprocessing
import os
import sys
import time
import traceback

from megatron_mimo.launch import initialize, shutdown
from tests.distributed.harness import all_cases, shared_directory


def main(ids: list[str]) -> None:
    cases = all_cases()
    results = open(shared_directory() / f"rank{os.environ['RANK']}.jsonl", "w")
    for id in ids:
        case = cases[id]
        faulthandler.dump_traceback_later(case.timeout_s, exit=True)
        try:
            run = initialize(backend="gloo", timeout_s=case.timeout_s, **dict(case.layout))
            case.function(run)
            shutdown()
            report = ""
        except BaseException:
            report = traceback.format_exc()
        print(json.dumps([id, report]), file=results, flush=True)
        if report:
            # Peers that fail in the same way get to say so before torchrun ends them.
            time.sleep(1.0)
            for child in multiprocessing.active_children():
                child.kill()  # dist_checkpointing's writers would outlive this process
            os._exit(1)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1:])
