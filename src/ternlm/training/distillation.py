"""Knowledge distillation: a term of the objective that draws the predictions towards those of another model.

The teacher is a checkpoint. It is looked at before a run begins, it is part of the identity of the run, and it
computes without gradient, in evaluation mode. The loss that is reported never holds this term.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ternlm import checkpoint
from ternlm.checkpoint.manifest import CONFIG, MODEL, STATE, parse_object, read_manifest, read_verified, seal
from ternlm.data.batch import IGNORED
from ternlm.errors import CheckpointError, SettingsError, TernlmError
from ternlm.models import FULL_PRECISION, MODELS, LanguageModel, ModelSettings, model_settings
from ternlm.models.prediction import predict
from ternlm.ops.divergence import divergence
from ternlm.settings import Count, Float, Settings
from ternlm.tokenizers import Tokenizer


class DistillationSettings(Settings):
    """What a run learns from besides its data; nothing, unless a teacher is named.

    Attributes:
        teacher: A checkpoint folder, or a run: path, name, ``RUN@best``, ``RUN@500``. It must have the tokenizer
            of the run; size and family may differ.
        teacher_quantized: Let the teacher round as it was trained to, instead of using its full-precision weights.
        temperature: tau, by which both sides' logits are divided.
        weight: Weight of the term once it is ramped up, w_max.
        ramp_steps: Updates until then, T_w; None takes `ramp_fraction` of the run.
        ramp_fraction: The same as a share of the run.
    """

    teacher: str | None = None
    teacher_quantized: bool = False
    temperature: Float = Field(default=2.0, gt=0)
    weight: Float = Field(default=0.5, ge=0)
    ramp_steps: Count | None = Field(default=None, ge=0)
    ramp_fraction: Float = Field(default=0.1, ge=0, le=1)

    def weight_at(self, k: int, total_steps: int) -> float:
        """w(k) = w_max (1 - cos(pi min(1, k / T_w))) / 2, the weight of the term in update `k`, 0 .. N - 1."""
        ramp = math.floor(self.ramp_fraction * total_steps) if self.ramp_steps is None else self.ramp_steps
        return self.weight * (1 - math.cos(math.pi * (min(1.0, k / ramp) if ramp else 1.0))) / 2


class Distillation:
    """The term that a teacher adds to the objective of a run.

        w(k) tau^2 sum over scored positions of KL(softmax(teacher / tau) || softmax(student / tau))

    It is a sum, as the loss is, and both are divided by the targets of the whole batch of a step; tau^2 keeps its
    gradient comparable with that of the loss whatever the temperature.

    Args:
        teacher: A model with the student's vocabulary, on its device; it is switched to evaluation mode.
        settings: Temperature and weight.
        total_steps: Updates of the run.
        identity: What says which teacher this is, as JSON values.

    Source:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).
    """

    def __init__(
        self, teacher: LanguageModel, settings: DistillationSettings, total_steps: int, identity: Mapping[str, Any]
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.settings, self.total_steps, self.identity = settings, total_steps, dict(identity)

    def term(self, tokens: Tensor, targets: Tensor, logits: Tensor, k: int) -> Tensor:
        """The weighted term of a micro-batch, to be added to its sum of nats; while its weight is 0 it costs nothing.

        Args:
            tokens: (batch, time), what the student has read.
            targets: (batch, time), -100 where nothing is scored; only these marks are looked at.
            logits: The student's, (batch, time, vocab), or (scored positions, vocab) of the scored ones alone.
            k: The update.

        Returns:
            float32, ().
        """
        weight = self.settings.weight_at(k, self.total_steps)
        if not weight:
            return torch.zeros((), device=logits.device)
        with torch.no_grad():
            wanted = predict(self.teacher, tokens, targets).logits
        scored = (targets != IGNORED).flatten() if logits.dim() == 3 else None
        nats = divergence(logits.flatten(0, -2), wanted.flatten(0, -2), scored, self.settings.temperature)
        return weight * self.settings.temperature**2 * nats


def build_distillation(
    settings: DistillationSettings,
    student: LanguageModel,
    length: int,
    tokenizer: Tokenizer,
    runs: Path,
    total_steps: int,
) -> Distillation | None:
    """The term as the settings say, or None without a teacher.

    Args:
        settings: The section.
        student: The model that is trained; the teacher goes to its device and computes in its dtype.
        length: Tokens per sequence.
        tokenizer: The run's.
        runs: The folder in which a teacher that is named as a run is looked for.
        total_steps: Updates of the run.

    Raises:
        CheckpointError, SettingsError: As `require_teacher` raises them.
    """
    if settings.teacher is None:
        return None
    path = require_teacher(settings, student.settings, length, tokenizer, runs)
    device = next(student.parameters()).device
    loaded = checkpoint.load(path, device, None if settings.teacher_quantized else FULL_PRECISION)
    loaded.model.compute_dtype = student.compute_dtype
    return Distillation(loaded.model, settings, total_steps, _identity(path))


def require_teacher(
    settings: DistillationSettings, student: ModelSettings, length: int, tokenizer: Tokenizer, runs: Path
) -> Path:
    """The folder of the teacher, which is known to be intact and to fit when this returns.

    Args:
        settings: The section, with a teacher.
        student: The student's settings, with its vocabulary filled in.
        length: Tokens per sequence.
        tokenizer: The run's.
        runs: The folder in which a teacher that is named as a run is looked for.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
        SettingsError: It has another tokenizer or vocabulary, does not predict the same tokens, or reads less.
    """
    name = str(settings.teacher)
    try:
        path = checkpoint.resolve(name, runs)
        _, files = read_verified(path, only=(CONFIG, STATE))
        config, state = parse_object(path, CONFIG, files), parse_object(path, STATE, files)
        teacher = model_settings(config["model"])
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"distillation.teacher={name} describes no model ({error}). Name another one.") from None
    except TernlmError as error:
        raise CheckpointError(f"distillation.teacher={name} cannot be used: {error}") from None
    problem = _misfit(teacher, state.get("tokenizer_fingerprint"), student, length, tokenizer)
    if problem is not None:
        raise SettingsError(f"distillation.teacher={name} {problem}")
    return path


def require_same_teacher(identity: Mapping[str, Any] | None, state: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with another teacher than a run was trained with until now.

    Args:
        identity: The teacher's of this sitting, or None without one.
        state: Of the checkpoint that is gone on from.
        path: Where that checkpoint lies.

    Raises:
        CheckpointError: It is another one.
    """
    before = state.get("distillation")
    then = before.get("manifest_sha256") if isinstance(before, Mapping) else None
    now = None if identity is None else identity["manifest_sha256"]
    if then == now:
        return
    found = "no teacher" if identity is None else f"another one ('{identity['path']}')"
    if then is None:
        raise CheckpointError(f"'{path}' was trained without a teacher. Resume it with distillation.teacher=none.")
    raise CheckpointError(
        f"'{path}' was trained with the teacher '{before['path'] if before else None}' (sha256 {str(then)[:12]}), and "
        f"this is {found}. Put that checkpoint back, or name its place with distillation.teacher=PATH."
    )


def teacher_bytes(settings: DistillationSettings, runs: Path) -> int:
    """Memory that the teacher's weights take while the run trains; 0 without a teacher.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if settings.teacher is None:
        return 0
    try:
        files = read_manifest(checkpoint.resolve(settings.teacher, runs))["files"]
        return int(files[MODEL]["bytes"])
    except LookupError:
        raise CheckpointError(f"distillation.teacher={settings.teacher} holds no weights. Name another one.") from None
    except TernlmError as error:
        raise CheckpointError(f"distillation.teacher={settings.teacher} cannot be used: {error}") from None


def _misfit(
    teacher: ModelSettings, fingerprint: Any, student: ModelSettings, length: int, tokenizer: Tokenizer
) -> str | None:
    """What keeps a teacher from teaching this student, if anything."""
    kinds = {True: "the next token", False: "masked tokens"}
    teaches_next, wants_next = (MODELS[model.family].model.is_causal for model in (teacher, student))
    if teaches_next != wants_next:
        return f"predicts {kinds[teaches_next]}, the model of the run {kinds[wants_next]}. Name one that does the same."
    if fingerprint != tokenizer.fingerprint:
        return (
            f"was trained with another tokenizer than '{tokenizer.name}'. "
            "Train with the teacher's, tokenizer.name=CHECKPOINT, or name another teacher."
        )
    if teacher.vocab_size != student.vocab_size:
        return (
            f"has a vocabulary of {teacher.vocab_size or 0:,} ids, the model of the run one of "
            f"{student.vocab_size or 0:,}. Set model.vocab_size={teacher.vocab_size}, or name another teacher."
        )
    if not MODELS[teacher.family].model.is_recurrent and teacher.max_position_embeddings < length:
        return (
            f"reads {teacher.max_position_embeddings:,} tokens at most, and data.sequence_length={length:,}. "
            "Lower the latter, or name another teacher."
        )
    return None


def _identity(path: Path) -> dict[str, Any]:
    """Which checkpoint a teacher is: where it lies, and what no other checkpoint shares."""
    manifest = read_manifest(path)
    return {
        "path": str(path),
        "manifest_sha256": manifest.get("sha256") or seal(manifest),
        "run_id": manifest.get("run_id"),
        "step": manifest.get("step"),
    }
