"""Everything one can see of a checkpoint's quantizers, as plain data, and the alarms that it raises.

Weights, activations, sensitivity and time are measured in files of their own; here they are put together.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ternlm.data.batch import Batch
from ternlm.data.corpus import TokenStream
from ternlm.data.masking import MaskingSettings
from ternlm.data.windows import build_windows
from ternlm.evaluation.activations import analyze_activations
from ternlm.evaluation.evaluate import require_fitting
from ternlm.evaluation.protocols import scored_batches
from ternlm.evaluation.sensitivity import measure_sensitivity
from ternlm.evaluation.timing import measure_time
from ternlm.evaluation.weights import analyze_matrices, analyze_skips
from ternlm.models import LanguageModel
from ternlm.tokenizers import Tokenizer

CLIP_LIMIT = 0.2
UTILIZATION_LIMIT = 0.5
OCCUPANCY_LIMIT = 0.7

Row = dict[str, Any]


class Wanted(NamedTuple):
    """What is measured besides weights and activations.

    Attributes:
        sensitivity: Score the model once more for each block and layer, with it in full precision.
        repeats: Timed passes; 0 measures no time.
        backward: Time backward passes as well.
    """

    sensitivity: bool = True
    repeats: int = 5
    backward: bool = False


def analyze(
    model: LanguageModel,
    batches: Sequence[Batch],
    wanted: Wanted = Wanted(),
    check: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda text: None,
) -> Row:
    """Measure a model.

    Args:
        model: Put back exactly as it was.
        batches: Held-out text, at least one batch; the first one is what time is measured on.
        wanted: What to leave out, or to add.
        check: Called before each batch; may raise to stop.
        report: Called with what is about to be measured.

    Returns:
        `matrices` (`analyze_matrices`), `skips` (`analyze_skips`), `sites`, `norms`, `stream`
        (`analyze_activations`), `sensitivity` (`measure_sensitivity`, or None), `time` (`measure_time`, or None)
        and `alarms` (`find_alarms`). A number that is not finite is None.
    """
    report("weights")
    result: Row = {"matrices": analyze_matrices(model), "skips": analyze_skips(model)}
    report("activations")
    result |= analyze_activations(model, batches, check)
    result["time"] = None
    if wanted.repeats:
        report("time")
        result["time"] = measure_time(model, batches[0], wanted.repeats, wanted.backward, check)
    result["sensitivity"] = None
    if wanted.sensitivity:
        scored = lambda name: report(f"sensitivity, {name}")  # noqa: E731
        result["sensitivity"] = measure_sensitivity(model, batches, check, scored)
    finite: Row = _finite(result | {"alarms": find_alarms(result)})
    return finite


def held_out_batches(
    model: LanguageModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    sequence_length: int,
    batch_size: int,
    max_tokens: int,
    masking: MaskingSettings | None = None,
) -> list[Batch]:
    """The first windows of a split on the model's device: whole ones, or all of a shorter split, without padding.

    Args:
        model: What reads them.
        stream, tokenizer: The text, and the tokenizer that made it.
        sequence_length: Tokens per window.
        batch_size: Windows per batch.
        max_tokens: Read at most so many tokens, but at least one window.
        masking: How tokens are hidden from an encoder; None for a causal model.

    Raises:
        TokenizerError: The tokenizer's ids do not fit the model.
        SettingsError: The tokenizer has no mask token, and the model is an encoder.
        DataError: There is nothing to score.
    """
    require_fitting(model, tokenizer)
    windows = build_windows(masking, tokenizer, sequence_length)
    whole = max(1, (min(len(stream), max_tokens) - windows.overlap) // windows.stride)
    last = min(len(stream), whole * windows.stride + windows.overlap)
    device: torch.device = next(model.parameters()).device
    batches = scored_batches(stream, tokenizer, sequence_length, batch_size, last, masking)
    if masking is None and last - windows.overlap < windows.stride:
        read = last - windows.overlap  # the one window is padded behind these
        batches = (Batch(batch.tokens[:, :read], batch.targets[:, :read]) for batch in batches)
    return [batch.to(device) for batch in batches]


def find_alarms(result: Row) -> list[Row]:
    """What deserves a look, one row per matrix, norm or site.

    Each has `kind`, `name`, `value`, `limit` and a `sentence`. Kinds: ``nonfinite``, ``norm_clipping`` and
    ``clipping`` (clip_rate of a norm, of a site, above 0.2), ``utilization`` (of a codebook, below 0.5),
    ``occupancy`` (share of one ternary code above 0.7) and ``dead_rows`` (any).
    """
    alarms = []
    for row in [*result["matrices"], *result["sites"], *result["stream"]]:
        if row["nonfinite"]:
            found = f"{row['nonfinite']:,} values are not finite"
            alarms.append(_alarm("nonfinite", row, row["nonfinite"], 0, found))
    for row in result["norms"]:
        if row["clip_rate"] > CLIP_LIMIT:
            found = f"{row['clip_rate']:.0%} of its inputs are clipped (limit {CLIP_LIMIT:.0%}) and pass no gradient"
            alarms.append(_alarm("norm_clipping", row, row["clip_rate"], CLIP_LIMIT, found))
    for row in result["sites"]:
        if row["clip_rate"] is not None and row["clip_rate"] > CLIP_LIMIT:
            found = f"{row['clip_rate']:.0%} of its values lie beyond the largest code (limit {CLIP_LIMIT:.0%})"
            alarms.append(_alarm("clipping", row, row["clip_rate"], CLIP_LIMIT, found))
        if row["utilization"] is not None and row["utilization"] < UTILIZATION_LIMIT:
            found = (
                f"{row['codes_used']} of {len(row['codes'])} activation codes are in use "
                f"({row['utilization']:.0%}, limit {UTILIZATION_LIMIT:.0%})"
            )
            alarms.append(_alarm("utilization", row, row["utilization"], UTILIZATION_LIMIT, found))
    return alarms + _matrix_alarms(result["matrices"])


def _matrix_alarms(matrices: Sequence[Row]) -> list[Row]:
    alarms = []
    for row in matrices:
        for code, share in (("-1", row["negative"]), ("0", row["zero"]), ("+1", row["positive"])):
            if share is not None and share > OCCUPANCY_LIMIT:
                found = f"{share:.0%} of its codes are {code} (limit {OCCUPANCY_LIMIT:.0%})"
                alarms.append(_alarm("occupancy", row, share, OCCUPANCY_LIMIT, found))
        if row["dead_rows"]:
            found = f"{row['dead_rows']:,} of {row['rows']:,} rows are all 0, so these outputs are always 0"
            alarms.append(_alarm("dead_rows", row, row["dead_rows"], 0, found))
    return alarms


def _alarm(kind: str, row: Row, value: float, limit: float, found: str) -> Row:
    return {"kind": kind, "name": row["name"], "value": value, "limit": limit, "sentence": f"{row['name']}: {found}."}


def _finite(value: Any) -> Any:
    """The same, with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
