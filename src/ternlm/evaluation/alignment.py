"""A model, part by part, against the definition of BitNet b1.58: measured on its weights and on a pass, never assumed.

Each row says what the definition wants, what this model does, and whether that is the same. Schedules, which no
checkpoint shows, are left to the report, which reads them off the log.

Source:
    Ma et al. 2024 (arXiv 2402.17764) and its note "Training Tips, Code and FAQ"; the block, 2B4T (arXiv 2504.12285).
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ternlm import checkpoint
from ternlm.checkpoint import Loaded
from ternlm.errors import CheckpointError
from ternlm.evaluation.architecture_check import (
    Judged,
    biases,
    computation,
    coverage,
    ends,
    gate,
    norms,
    rotary,
    ternary_layers,
    type_name,
    types_seen,
)
from ternlm.evaluation.probe import Observation, observe
from ternlm.evaluation.quantizer_check import (
    ProductCheck,
    WeightCheck,
    check_products,
    check_weights,
    ties_go_to_even,
)
from ternlm.files import replace_durably, to_json
from ternlm.models import LanguageModel
from ternlm.run_directory import RunDirectory

SCHEMA = 1

_MOST_PRODUCTS = 48


def measure(loaded: Loaded) -> dict[str, Any]:
    """What ``eval/alignment.json`` holds: `schema`, `checkpoint`, `step`, `parameters` and `rows`."""
    counts = loaded.model.parameter_counts()
    weights = check_weights(loaded.model.bit_linears())
    ternary = sum(layer.weight.numel() for layer in ternary_layers(loaded.model).values())
    return {
        "schema": SCHEMA,
        "checkpoint": loaded.path.name,
        "step": loaded.state["step"],
        "parameters": {"total": counts.total, "ternary": ternary, "embedding": counts.embedding,
                       "scales": weights.scales, "packed_bytes": checkpoint.packed_bytes(loaded.model)},
        "rows": _rows(loaded, weights),
    }  # fmt: skip


def align(loaded: Loaded) -> list[dict[str, str]]:
    """The rows: {part, definition, run, verdict, source}.

    Args:
        loaded: A checkpoint's model, left as it is.
    """
    return _rows(loaded, check_weights(loaded.model.bit_linears()))


def write_alignment(run: RunDirectory, loaded: Loaded) -> None:
    """Measure a checkpoint's model and replace the run's ``eval/alignment.json``.

    Raises:
        OSError: It cannot be written.
    """
    content = to_json(measure(loaded))
    run.alignment.parent.mkdir(exist_ok=True)
    replace_durably(run.alignment, content)


def update_alignment(run: RunDirectory) -> bool:
    """Measure the newest good checkpoint of a run, if there is one.

    Returns:
        Whether there was.

    Raises:
        OSError: The result cannot be written.
    """
    try:
        loaded = checkpoint.load(checkpoint.newest_valid(run.checkpoints))
    except CheckpointError:
        return False
    write_alignment(run, loaded)
    return True


def _rows(loaded: Loaded, weights: WeightCheck) -> list[dict[str, str]]:
    model, seen = loaded.model, observe(loaded.model, loaded.tokenizer)
    products = _tried(model, seen)
    judged: list[tuple[str, str, Judged]] = [
        ("ternary weights", "codes clip(round(W / g), -1, 1) in every layer that is quantized", _codes(model, weights)),
        ("scale of weights", "one per matrix, g = mean|W|", _scales(model, weights)),
        ("rounding", "half to even, of weights and activations", _ties(model)),
        (
            "activations",
            "8-bit integers, one scale per token from its largest magnitude",
            _activations(model, products),
        ),
        ("product", "of integer codes, exact, scaled after it", _products(model, seen, products)),
        ("coverage", "all linear layers of the blocks are ternary", coverage(model)),
        ("embedding and head", "full precision", ends(model, seen)),
        ("latent weights", "float32", _latents(model)),
        ("state of the optimizer", "float32", _optimizer_state(loaded.path)),
        ("computation", "bfloat16, statistics of norms in float32", computation(model, seen)),
        ("norms", "RMSNorm right before every ternary layer", norms(seen)),
        ("feed-forward network", "gated by SiLU", gate(seen)),
        ("positions", "rotary", rotary(loaded)),
        ("biases", "none", biases(model)),
    ]
    return [
        {"part": part, "definition": definition, "run": run, "verdict": verdict,
         "source": f"checkpoints/{loaded.path.name}"}
        for part, definition, (run, verdict) in judged
    ]  # fmt: skip


def _codes(model: LanguageModel, found: WeightCheck) -> Judged:
    if model.is_packed:
        return f"packed codes of {found.matrices} matrices, without the weights they were made of", "unknown"
    if found.rounding < found.matrices:
        kinds = sorted({layer.mode.weights for layer in model.bit_linears().values()} - {"ternary"})
        other = ", ".join("full precision" if kind == "none" else kind for kind in kinds)
        return f"{found.rounding} of {found.matrices} matrices are ternary, the others {other}", "differs"
    if found.equal == found.matrices:
        return f"all codes of {found.matrices} matrices equal", "same"
    return f"{100 * found.wrong_codes:.2g} % of the codes differ, in {found.matrices - found.equal} matrices", "differs"


def _scales(model: LanguageModel, found: WeightCheck) -> Judged:
    if model.is_packed:
        return f"{found.scales} packed scales, without the weights they were made of", "unknown"
    if not found.rounding:
        return "no matrix is ternary", "differs"
    if found.scales_equal == found.rounding:
        return f"one scale, mean|W|, in each of {found.rounding} matrices", "same"
    if found.scales > found.rounding:
        return f"{found.scales} scales in {found.rounding} matrices", "differs"
    return f"off by up to {100 * found.worst_scale:.2g} % of mean|W|", "differs"


def _ties(model: LanguageModel) -> Judged:
    layers = ternary_layers(model)
    if not layers:
        return "nothing is ternary", "differs"
    name, layer = min(layers.items(), key=lambda pair: pair[1].in_features)
    if layer.in_features < 5 or model.is_packed:
        return "no layer to try it on", "unknown"
    weights, activations = ties_go_to_even(layer)
    names = [what for what, even in (("weights", weights), ("activations", activations)) if even is False]
    if names:
        return f"{' and '.join(names)} of {name} are not rounded half to even", "differs"
    words = f"half to even, tried on a layer like {name}"
    return words if activations is not None else f"{words}; it does not round its input", "same"


def _tried(model: LanguageModel, seen: Observation) -> ProductCheck | None:
    """Products of layers that round their input themselves; None where there is no such layer."""
    layers = {name: layer for name, layer in model.bit_linears().items() if layer.rounds_input}
    inputs = {name: seen.inputs[name] for name in layers if name in seen.inputs}
    every = -(-len(inputs) // _MOST_PRODUCTS) or 1
    return check_products(layers, dict(list(inputs.items())[::every])) if inputs else None


def _activations(model: LanguageModel, found: ProductCheck | None) -> Judged:
    layers = model.bit_linears()
    elsewhere = sum(not layer.rounds_input for layer in layers.values())
    if elsewhere:
        return f"rounded before {elsewhere} of {len(layers)} layers, at places with scales of their own", "differs"
    if found is None:
        return "no layer was reached", "unknown"
    kinds = [f"{_roundings(bits)} in {count} layers" for bits, count in found.bits.items()]
    words = f"{', '.join(kinds)} of {found.layers} tried, on activations of a sentence"
    return words, "same" if set(found.bits) == {8} else "differs"


def _roundings(bits: int | str | None) -> str:
    if bits is None:
        return "not rounded"
    return f"{bits} bits per token" if isinstance(bits, int) else "rounded in another way, or wrong"


def _products(model: LanguageModel, seen: Observation, found: ProductCheck | None) -> Judged:
    if not ternary_layers(model):
        return "no layer multiplies codes", "differs"
    if found is None or any(not layer.rounds_input for layer in model.bit_linears().values()):
        return "codes of places with scales of their own; not tried", "unknown"
    words = f"exact in {found.exact} of {found.layers} layers, in {types_seen(seen)}"
    return words, "same" if found.exact == found.layers else "differs"


def _latents(model: LanguageModel) -> Judged:
    weights = [layer.weight for layer in model.bit_linears().values()]
    if not weights or model.is_packed:
        return "there are no latent weights: this checkpoint is packed", "unknown"
    types = sorted({type_name(weight.dtype) for weight in weights})
    finer = sum(int((weight != weight.bfloat16().float()).sum()) for weight in weights)
    share = finer / sum(weight.numel() for weight in weights)
    words = f"{', '.join(types)}; {100 * share:.0f} % of them need more digits than bfloat16 has"
    return words, "same" if types == ["float32"] and share > 0.5 else "differs"


def _optimizer_state(path: Path) -> Judged:
    file = path / "optimizer.safetensors"
    try:
        with safe_open(str(file), "pt") as tensors:
            kinds = {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return "the checkpoint has none", "unknown"
    if not kinds:
        return "it is empty", "unknown"
    return f"{', '.join(sorted(kinds))} in {file.name}", "same" if kinds == {"F32"} else "differs"
