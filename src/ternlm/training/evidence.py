"""Evidence of an anomaly: everything needed to look at the step again, and to compute it again.

anomalies/step_000812_loss_spike/
|- event.json          what was decided and why, on which numbers, by which versions, and what was left out
|- batch.json          tokens, targets, text and loss of every row, and which windows of the data they are
|- layers.json         norms and non-finite elements of every parameter and its gradient
|- top20.json          the targets with the highest loss
|- codes.safetensors   packed codes and scales of every ternary matrix
`- rng.json            the seed, and the state of all global generators

Nothing here changes training, and no failure to write reaches it.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import ternlm
from ternlm.data.batch import IGNORED, Batch
from ternlm.data.loader import Loader
from ternlm.data.stream_loader import StreamLoader
from ternlm.errors import EnvironmentFault
from ternlm.files import from_json, read_regular, synchronize_folder, write_durably
from ternlm.models import LanguageModel
from ternlm.models.prediction import predict
from ternlm.nn.linear import BitLinear
from ternlm.ops.packing import BLOCK, pack_2bit
from ternlm.tokenizers import Tokenizer
from ternlm.training.anomaly_books import Event

MOST_BYTES = 50_000_000
"""Largest folder of evidence."""

_ROOM = MOST_BYTES - 1_000_000  # the rest is for event.json and the header of the codes
_TOP = 20
_NOT_SCORED = -1.0


@dataclass(frozen=True)
class Situation:
    """A step whose gradients have been computed and whose update has not been made.

    Attributes:
        model: With gradients, unclipped.
        tokenizer: To show text.
        batch: What the gradients come from.
        loader: Where the batch comes from.
        counter: Samples drawn before the batch.
        micro_batch_size: Rows per forward pass that fit in memory.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    batch: Batch
    loader: Loader | StreamLoader
    counter: int
    micro_batch_size: int


class Evidence(NamedTuple):
    """What a step that is computed again is compared with.

    Attributes:
        event: All of `event.json`.
        step: Index of the update.
        counter: Samples drawn before the batch.
        loss, grad_norm: As measured; they may be non-finite.
        gradient_norms: By parameter; NaN where elements are not finite.
        codes_sha256: `codes_sha256` of the model.
        tokens: Token ids by row; rows are empty if they were left out.
    """

    event: dict[str, Any]
    step: int
    counter: int
    loss: float
    grad_norm: float
    gradient_norms: dict[str, float]
    codes_sha256: str
    tokens: list[list[int]]


def dump(anomalies: Path, event: Event, situation: Situation, warn: Callable[[str], None]) -> Path | None:
    """Write the evidence of one event, before the gradients are gone.

    Evidence of the same event at the same step, from before a roll-back or a crash, is replaced. What
    does not fit in 50 MB is left out: first the codes, then the text, then the tokens, which follow from
    the windows.

    Args:
        anomalies: `RunDirectory.anomalies`; made if missing.
        event: What happened.
        situation: The step.
        warn: Called with one sentence if the evidence cannot be written.

    Returns:
        The folder, or None.
    """
    target = anomalies / f"step_{event.step:06d}_{event.name}"
    temporary, replaced = anomalies / f".tmp-{target.name}", anomalies / f".del-{target.name}"
    try:
        for unfinished in (*anomalies.glob(".tmp-*"), *anomalies.glob(".del-*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in _contents(event, situation).items():
            write_durably(temporary / name, content)
        synchronize_folder(temporary)
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
        synchronize_folder(anomalies)
        shutil.rmtree(replaced, ignore_errors=True)
        return target
    except Exception as error:  # noqa: BLE001 (evidence is of use only to a run that goes on)
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        warn(f"evidence of {event.name} at step {event.step} cannot be written to '{target}': {reason}. Going on.")
        return None


def read_evidence(folder: Path) -> Evidence:
    """What `dump` wrote, as far as a repetition of the step is compared with it.

    Raises:
        EnvironmentFault: A file is missing or malformed.
    """
    try:
        files = ("event.json", "batch.json", "layers.json")
        event, batch, layers = (from_json(read_regular(folder / name, MOST_BYTES)) for name in files)
        return Evidence(
            event,
            int(event["step"]),
            int(batch["counter"]),
            float(event["values"]["loss"]),
            float(event["values"]["grad_norm"]),
            {name: float(layer["gradient_norm"]) for name, layer in layers.items()},
            str(event["codes_sha256"]),
            [[int(token) for token in row.get("tokens", ())] for row in batch["rows"]],
        )
    except OSError as error:
        raise EnvironmentFault(
            f"'{folder}' holds no complete evidence: {error.strerror}. Give a folder below RUN/anomalies."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnvironmentFault(f"the evidence in '{folder}' is malformed. Use another folder.") from None


def gradient_norms(model: LanguageModel) -> dict[str, float]:
    """Norm of the gradient of every parameter that has one, accumulated in float64; NaN or inf stay visible."""
    return {
        name: float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def codes_sha256(model: LanguageModel) -> str:
    """sha256 (hex) of the names, packed codes and scales of all ternary matrices, in order."""
    digest = hashlib.sha256()
    for name, _, packed, scale in _packed_codes(model):
        for part in (name.encode(), packed.numpy().tobytes(), scale.numpy().tobytes()):
            digest.update(part)
    return digest.hexdigest()


def _contents(event: Event, situation: Situation) -> dict[str, bytes]:
    """All files by name, within the limit."""
    model, rows = situation.model, _rows(situation)
    batch = {
        "counter": situation.counter,
        "windows": situation.loader.samples(situation.counter, len(situation.batch.tokens)),
        "rows": rows,
    }
    files = {"rng.json": _json(_generators(situation.loader.seed)), "layers.json": _json(_layers(model))}
    left_out = []
    try:
        nll = _losses(situation)
        files["top20.json"] = _json(_highest(situation, nll))
        for row, values in zip(rows, nll, strict=True):
            row["loss"] = float(values[values != _NOT_SCORED].double().mean())
    except (RuntimeError, MemoryError, IndexError) as error:
        left_out.append(f"losses of single targets ({type(error).__name__})")
    files["batch.json"] = _json(batch)
    if sum(map(len, files.values())) + _codes_bytes(model) > _ROOM:
        left_out.append("codes")
    elif _ternary_layers(model):
        files["codes.safetensors"] = _codes(model)
    for names in (("text",), ("tokens", "targets")):
        if sum(map(len, files.values())) > _ROOM:
            left_out += names
            batch["rows"] = rows = [{key: row[key] for key in row if key not in names} for row in rows]
            files["batch.json"] = _json(batch)
    about = {
        **event.row(), "schema": 1, "step": event.step, "values": event.values, "left_out": left_out,
        "codes_sha256": codes_sha256(model), "family": model.settings.family,
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."), "device": str(situation.batch.tokens.device),
        "micro_batch_size": situation.micro_batch_size, "ternlm": ternlm.__version__, "torch": torch.__version__,
    }  # fmt: skip
    return {**files, "event.json": _json(about)}


def _losses(situation: Situation) -> Tensor:
    """Nats of every target, (rows, time) float32 on the CPU, from one more forward pass without gradients."""
    model, batch, size = situation.model, situation.batch, situation.micro_batch_size
    parts = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for tokens, targets in zip(batch.tokens.split(size), batch.targets.split(size), strict=True):
                logits, scored = predict(model, tokens, targets).logits.float(), targets != IGNORED
                if logits.dim() == 3:
                    logits = logits[scored]
                nll = torch.full(targets.shape, _NOT_SCORED, device=targets.device)
                nll[scored] = F.cross_entropy(logits, targets[scored], reduction="none")
                parts.append(nll.cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts)


def _highest(situation: Situation, nll: Tensor) -> list[dict[str, Any]]:
    """The scored targets with the highest loss; NaN counts as higher than anything."""
    targets = situation.batch.targets.flatten().tolist()
    highest = nll.flatten().topk(min(_TOP, situation.batch.num_targets))
    found = []
    for value, index in zip(highest.values.tolist(), highest.indices.tolist(), strict=True):
        row, position = divmod(index, nll.shape[1])
        token = targets[index]
        text = _text(situation.tokenizer, [token])
        found.append({"row": row, "position": position, "token": token, "text": text, "nll": value})
    return found


def _rows(situation: Situation) -> list[dict[str, Any]]:
    rows = zip(situation.batch.tokens.tolist(), situation.batch.targets.tolist(), strict=True)
    return [
        {"tokens": tokens, "targets": targets, "text": _text(situation.tokenizer, tokens)} for tokens, targets in rows
    ]


def _layers(model: LanguageModel) -> dict[str, dict[str, Any]]:
    norms, layers = gradient_norms(model), {}
    for name, parameter in model.named_parameters():
        gradient, weight = parameter.grad, parameter.detach()
        layers[name] = {
            "gradient_norm": norms.get(name, 0.0),
            "non_finite_gradients": 0 if gradient is None else int((~torch.isfinite(gradient)).sum()),
            "weight_norm": float(torch.linalg.vector_norm(weight, dtype=torch.float64)),
            "non_finite_weights": int((~torch.isfinite(weight)).sum()),
        }
    return layers


def _ternary_layers(model: LanguageModel) -> dict[str, BitLinear]:
    return {name: layer for name, layer in model.bit_linears().items() if layer.mode.weights == "ternary"}


def _packed_codes(model: LanguageModel) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(name in files, columns, packed codes, scale) of every ternary matrix, on the CPU."""
    for layer_name, layer in _ternary_layers(model).items():
        parent = layer_name.rpartition(".")[0]
        for matrix, (codes, scale) in layer.matrices().items():
            yield f"{parent}.{matrix}", layer.in_features, pack_2bit(codes).cpu(), scale.cpu().contiguous()


def _codes_bytes(model: LanguageModel) -> int:
    """Size of the packed codes, without packing them."""
    shapes = (layer.weight.shape for layer in _ternary_layers(model).values())
    return sum(rows * BLOCK // 4 * -(-columns // BLOCK) for rows, columns in shapes)


def _codes(model: LanguageModel) -> bytes:
    tensors, columns = {}, {}
    for name, width, packed, scale in _packed_codes(model):
        tensors[f"{name}.codes"], tensors[f"{name}.scale"], columns[name] = packed, scale, width
    return safetensors.torch.save(tensors, metadata={"columns": json.dumps(columns)})


def _generators(seed: int) -> dict[str, Any]:
    """The seed of the run, and the state of the global generators as hex."""
    python = random.getstate()[1]
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "seed": seed,
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": np.array(python, dtype="<u4").tobytes().hex(),
        "numpy": {
            "generator": name, "words": np.asarray(words, dtype="<u4").tobytes().hex(), "position": position,
            "has_gauss": has_gauss, "gauss": gauss,
        },
        "cuda": [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()
        else [],
    }  # fmt: skip


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    known = [index for index in ids if 0 <= index < tokenizer.vocab_size]
    return tokenizer.decode(known)


def _json(value: Any) -> bytes:
    """Strict JSON; what is not finite becomes the text that `float` reads: "nan", "inf", "-inf"."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return json.dumps(_spelled(value), allow_nan=False, ensure_ascii=False).encode()


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
