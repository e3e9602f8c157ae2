"""The process that calls the wandb package for `ternlm.tracking.wandb`: JSON lines in, JSON lines out.

The first line holds the ``arguments`` of `wandb.init` and its ``init_timeout`` in seconds; the answer is ``url`` and
``directory``, or ``missing``, or a ``problem``. Every later line is one call of `log`, or ``close``, which is answered
when everything was sent.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

FAREWELL_S = 30
"""How long this process may go on sending after training has ended."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # training saves first, then closes this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the package prints must not look like an answer
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        _serve(sys.stdin, answer)
    except Exception as error:  # noqa: BLE001 - every failure is told to the other side, which goes on without
        answer(problem=" ".join(str(error).split()) or type(error).__name__)
    finally:
        os._exit(0)  # a normal exit would wait for the network once more


def _serve(lines: TextIO, answer: Callable[..., None]) -> None:
    start = json.loads(lines.readline())
    try:
        import wandb

        init = wandb.init
    except (ImportError, AttributeError):  # a folder that happens to be called wandb imports, too
        answer(missing=True)
        return
    settings = wandb.Settings(
        silent=True, console="off", disable_code=True, disable_git=True, save_code=False, label_disable=True,
        symlink=False, x_disable_stats=True, init_timeout=start["init_timeout"],
    )  # fmt: skip
    run = init(**start["arguments"], settings=settings, allow_val_change=True)
    # Rows of different kinds come at the same step: the package counts rows itself, and plots over ours.
    run.define_metric("*", step_metric="step")
    directory = Path(run.dir).parent
    for path in directory.rglob("*"):
        if path.is_symlink():
            path.unlink()  # to a log in the user's cache; the folder of a run may be moved anywhere
    answer(url=None if run.offline else run.url, directory=str(directory))
    for line in lines:
        message = json.loads(line)
        if "close" in message:
            run.finish()
            answer(done=True)
            return
        pages = {name: wandb.Html(io.StringIO(page), inject=False) for name, page in message.get("html", {}).items()}
        run.log({**message["log"], **pages})
    run.finish(exit_code=1)  # training ended without a word


def _leave_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(FAREWELL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
