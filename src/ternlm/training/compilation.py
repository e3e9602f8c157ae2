"""Compiling the blocks of a model, with the time shown and a way back."""

import time
from collections.abc import Callable

import torch

from ternlm.models import LanguageModel

MOST_GRAPHS = 256
"""Graphs that blocks may have in all: each rounding, perturbation, kind of block, and training or not has its own.

Past torch's own limit of 8 a block that must be one graph ends the run, in the middle of it.
"""


def compile_blocks(model: LanguageModel, try_out: Callable[[], None], say: Callable[[str], None]) -> bool:
    """Compile each block in place, run `try_out` once, and fall back to eager if that fails.

    Blocks are alike, so they share one compiled graph; parameter names do not change.

    Returns:
        Whether the model is compiled now.
    """
    say("compiling ...")
    started = time.perf_counter()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for block in model.blocks():
        block.compile(fullgraph=True)
    try:
        try_out()
    except Exception as error:  # noqa: BLE001 - the compiler's failures have no common base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"compiling failed ({reason[:200]}); going on without.")
        for block in model.blocks():
            block._compiled_call_impl = None
        torch._dynamo.reset()
        model.zero_grad(set_to_none=True)
        return False
    say(f"compiled in {time.perf_counter() - started:.0f} s (not counted in tokens/s)")
    return True
