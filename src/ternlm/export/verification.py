"""The proof of an export: what was written is read back and compared with the model it came from.

Logits of two programs are never equal to the bit: one activation that is rounded the other way moves all later ones.
So a folder for transformers is judged with the rounding of activations off on both sides, where names, norms,
positions, scales and the head show, and the difference with it on is told.

    L2 = |a - b| / |b|  over the logits of the probe, float64
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternlm import checkpoint
from ternlm.checkpoint import Loaded, ternary_matrices
from ternlm.errors import TernlmError
from ternlm.models import LanguageModel

_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_LIMIT_WITH_OTHER_CODES = 3e-2
_PROBE_TEXTS = (
    "The old fox slept.",
    "  Two  spaces,\ttabs\n\nand lines. ",
    "Hé 🙂 naïve Жук 猫 e\u0301 \x00.",
    "x = 3.14e-2;",
)


def compare_packed(loaded: Loaded, folder: Path, is_exact: bool) -> dict[str, Any]:
    """Load a packed folder and compare it with its source.

    Args:
        loaded: The source, on the CPU.
        folder: What was written.
        is_exact: Whether nothing was rounded, so that logits must be equal to the bit.

    Returns:
        What was found, for the user and the model card.

    Raises:
        TernlmError: Codes, scales or logits differ.
    """
    again = checkpoint.load(folder)
    before, after = ternary_matrices(loaded.model), ternary_matrices(again.model)
    if before.keys() != after.keys():
        raise _failed(f"{len(after)} ternary matrices came back instead of {len(before)}")
    for name, (codes, scale) in before.items():
        if not torch.equal(after[name][0], codes) or not torch.equal(after[name][1].view(-1), scale.view(-1)):
            raise _failed(f"codes or scales of '{name}' came back changed")
    tokens = _probe(loaded.model)
    with torch.inference_mode():
        ours, theirs = loaded.model(tokens).logits.float(), again.model(tokens).logits.float()
    largest = float((ours - theirs).abs().max())
    if is_exact and not largest == 0:
        raise _failed(f"logits differ by up to {largest:.3g}, and nothing was rounded")
    return {
        "status": "passed",
        "by": "ternlm",
        "matrices": len(before),
        "tokens": tokens.numel(),
        "largest_logit_difference": largest,
        "largest_logit": float(ours.abs().max()),
    }


def compare_transformers(loaded: Loaded, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load a folder with transformers and compare model and tokenizer with their source.

    Args:
        loaded: The source, on the CPU.
        folder: What was written.
        dtype: Type of the file's embeddings, norms and head.

    Returns:
        What was found; its ``status`` is ``skipped`` where transformers or accelerate is not installed.

    Raises:
        TernlmError: transformers refuses the folder, or computes something else.
    """
    if find_spec("transformers") is None or find_spec("accelerate") is None:
        reason = "transformers and accelerate are not installed: pip install 'ternlm[hub]' accelerate"
        return {"status": "skipped", "by": "transformers", "reason": reason}
    other_codes = _codes_found_otherwise(loaded.model, folder)
    tokens = _probe(loaded.model)
    with torch.compiler.set_stance("force_eager"), _quiet(), torch.inference_mode():
        theirs = _load(folder)
        as_trained = _logits(theirs, tokens)
        with _activations_unrounded():
            mapped = _logits(theirs, tokens)
        _compare_tokenizers(loaded, folder)
    ours, unrounded = _our_logits(loaded.model, tokens)
    distance = float((mapped - unrounded).double().norm() / unrounded.double().norm())
    limit = _LIMIT_WITH_OTHER_CODES if other_codes else _LIMITS[dtype]
    if not distance <= limit:
        raise _failed(
            f"transformers computes other logits: they are {distance:.2g} apart (L2), at most {limit:g} is right"
        )
    import transformers

    return {
        "status": "passed",
        "by": f"transformers {transformers.__version__}",
        "tokens": tokens.numel(),
        "relative_l2_unrounded": distance,
        "limit": limit,
        "codes_found_otherwise": other_codes,
        "largest_logit_difference": float((as_trained - ours).abs().max()),
        "largest_logit": float(ours.abs().max()),
    }


def _probe(model: LanguageModel) -> Tensor:
    """Two rows of random tokens, the same ones every time."""
    settings = model.settings
    assert settings.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, settings.vocab_size, (2, min(32, settings.max_position_embeddings)), generator=generator)


def _our_logits(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """In float32: as the model computes, and with activations that are not rounded."""
    layers = list(model.bit_linears().values())
    modes, dtype = [layer.mode for layer in layers], model.compute_dtype
    try:
        model.compute_dtype = torch.float32
        with torch.no_grad():
            ours = model(tokens).logits
            for layer, mode in zip(layers, modes, strict=True):
                layer.mode = mode.model_copy(update={"activations": "none"})
            return ours, model(tokens).logits
    finally:
        model.compute_dtype = dtype
        for layer, mode in zip(layers, modes, strict=True):
            layer.mode = mode


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    try:
        model, report = factory.from_pretrained(folder, dtype="auto", local_files_only=True, output_loading_info=True)
    except Exception as error:  # whatever a foreign program says of the folder is its verdict
        raise _failed(f"transformers cannot load it ({_first_line(error)})") from error
    wrong = {name: sorted(map(str, found)) for name, found in _as_mapping(report).items() if found}
    if wrong:
        name, found = next(iter(wrong.items()))
        raise _failed(f"transformers reports {name.replace('_', ' ')}: {', '.join(found[:3])}")
    return nn.Module.float(model).eval()  # its own `float` refuses what is quantized


def _as_mapping(report: Any) -> Mapping[str, Any]:
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return {name: report.get(name) if isinstance(report, Mapping) else getattr(report, name, None) for name in names}


def _logits(model: Any, tokens: Tensor) -> Tensor:
    try:
        logits: Tensor = model(tokens).logits
    except Exception as error:
        raise _failed(f"transformers cannot run it ({_first_line(error)})") from error
    return logits.float()


def _compare_tokenizers(loaded: Loaded, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoded = [theirs.encode(text, add_special_tokens=False) for text in _PROBE_TEXTS]
    except Exception as error:
        raise _failed(f"transformers cannot load its tokenizer ({_first_line(error)})") from error
    for text, ids in zip(_PROBE_TEXTS, encoded, strict=True):
        if ids != loaded.tokenizer.encode(text):
            raise _failed(f"transformers gives the text {text!a} other tokens")


def _codes_found_otherwise(model: LanguageModel, folder: Path) -> int:
    """Of latent weights, how many codes transformers finds that the model does not have, by one last bit of 1 / g."""
    from ternlm.files import from_json

    quantization = from_json((folder / "config.json").read_bytes()).get("quantization_config") or {}
    if quantization.get("quantization_mode") != "online":
        return 0
    tensors, wrong = model.tensors(), 0
    for name, (codes, _) in ternary_matrices(model).items():
        weight = tensors[f"{name}.weight"]
        inverse = 1.0 / weight.abs().mean().clamp(min=1e-5)
        wrong += int(((weight * inverse).round().clamp(-1, 1) != codes).sum())
    return wrong


@contextmanager
def _activations_unrounded() -> Iterator[None]:
    """Let the ternary layers of transformers read activations as they are."""
    from transformers.integrations import bitnet

    class Unrounded:
        apply = staticmethod(lambda activation: activation)

    names: dict[str, Any] = vars(bitnet)
    rounding = names["ActQuant"]
    try:
        names["ActQuant"] = Unrounded
        yield
    finally:
        names["ActQuant"] = rounding


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers tells about this machine off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _failed(what: str) -> TernlmError:
    return TernlmError(f"the export is not the model it came from: {what}. Nothing was kept; use another --to.")
