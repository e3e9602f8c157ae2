"""What is to be measured, as plain values: a process of its own can build it again."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ternlm import checkpoint
from ternlm.benchmark.foreign import ForeignSubject, build_foreign, read_config
from ternlm.benchmark.peers import PEERS, count_matrices, replace_layers, version_of
from ternlm.benchmark.subject import OwnSubject, Subject, Work, default_dtype
from ternlm.models import FULL_PRECISION, LanguageModel, build_model, model_settings
from ternlm.models.stages import QuantizationSettings, Stages
from ternlm.training.plan import activation_bytes
from ternlm.training.settings import RunSettings

_STATE_BYTES = 16  # float32 weight, gradient, and two moments
_LATE_STEP = 10_000  # behind every warm-up and ramp
_KEPT_PER_LAYER = 34  # bytes by token and channel that a block of a transformer keeps, in 16 bits


@dataclass(frozen=True)
class Candidate:
    """A model that can be built.

    Attributes:
        name: What tables call it.
        kind: ``own``, drawn at random from settings; ``checkpoint`` of a run; ``hugging_face``.
        model: The `model` section with its vocabulary, or the values of a Hugging Face configuration.
        quantization: The `quantization` section, of our own models.
        folder: Of the checkpoint, or of a Hugging Face configuration; empty where `model` says all.
        has_weights: Whether a Hugging Face folder holds them; else they are drawn at random.
        peer: Key in `PEERS` whose layers are put into it.
        tokenizer: What text is tokenized with, as `load_tokenizer` takes it; empty where it is not known.
        epoch_tokens: Training tokens in one pass over the corpus, where it is known.
        notes: What a reader must know about it, a sentence each.
    """

    name: str
    kind: Literal["own", "checkpoint", "hugging_face"]
    model: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    has_weights: bool = False
    peer: str = ""
    tokenizer: str = ""
    epoch_tokens: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether it computes with rounded weights."""
        return bool(self.peer) or (self.kind != "hugging_face" and self.quantization.get("weights") != "none")

    @property
    def is_trained(self) -> bool:
        """Whether its weights have learned anything."""
        return self.kind == "checkpoint" or self.has_weights

    def as_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Candidate":
        """The candidate that `as_dict` described."""
        return cls(**{**values, "notes": tuple(values["notes"])})

    def with_peer(self, peer: str) -> "Candidate":
        """The same network with a peer's layers."""
        return replace(self, name=f"{self.name} / {peer}", kind="own", peer=peer, notes=())

    def build(self, device: torch.device, trains: bool) -> Subject:
        """The model on a device.

        Args:
            device: Where it goes.
            trains: Whether it will be trained: one that will not may be built in a narrow type at once.

        Raises:
            CheckpointError, EnvironmentFault, SettingsError: It cannot be.
        """
        dtype = default_dtype(device)
        if self.kind == "hugging_face":
            config = read_config(Path(self.folder) if self.folder else self.model)
            folder = Path(self.folder) if self.has_weights else None
            subject: Subject = ForeignSubject(
                self.name, build_foreign(config, folder, device, torch.float32 if trains else dtype), dtype
            )
        elif self.kind == "checkpoint":
            loaded = checkpoint.load(Path(self.folder), device)
            subject = OwnSubject(self.name, loaded.model, step=loaded.state["step"])
        else:
            subject = OwnSubject(self.name, self._drawn(device), dtype=dtype, step=_LATE_STEP)
            subject.is_quantized = self.is_quantized
        subject.notes += self.notes
        return subject

    def training_bytes(self, work: Work) -> int:
        """An estimate of what training needs at most: state, and what one micro-batch keeps for its backward pass."""
        if self.kind == "hugging_face":
            return self._foreign_training_bytes(work)
        with torch.device("meta"):
            model = self._blank()
        quantization = FULL_PRECISION.model_dump() if self.peer else self.quantization
        settings = RunSettings.from_mapping({
            "model": self.model, "quantization": {"weights": quantization["weights"]},
            "data": {"sequence_length": work.length}, "training": {"max_steps": 1, "batch_size": work.rows},
            "objective": {"name": "causal" if model.is_causal else "mlm"},
        })  # fmt: skip
        counts = model.parameter_counts()
        rounded = counts.ternary * (6 if self.peer else int(self.is_quantized))
        return _STATE_BYTES * counts.total + rounded + activation_bytes(model, settings, work.rows)

    def inference_bytes(self) -> int:
        """An estimate of what inference needs: all weights, in float32 while they are loaded."""
        if self.kind == "hugging_face":
            return 2 * _parameters(self._foreign_blank())
        with torch.device("meta"):
            return 5 * _parameters(self._blank())

    def _drawn(self, device: torch.device) -> LanguageModel:
        with torch.device(device):
            model = self._blank()
        model.initialize(0)
        if self.peer:
            replace_layers(model, PEERS[self.peer].convert)
        else:
            settings = QuantizationSettings.from_mapping(self.quantization, "quantization")
            Stages(settings, model.settings.total_blocks, _LATE_STEP).apply(model, _LATE_STEP - 1)
        return model

    def _blank(self) -> LanguageModel:
        quantization = QuantizationSettings.from_mapping(self.quantization, "quantization")
        return build_model(model_settings(self.model), FULL_PRECISION if self.peer else quantization.base())

    def _foreign_blank(self) -> Any:
        with torch.device("meta"):
            config = read_config(Path(self.folder) if self.folder else self.model)
            return build_foreign(config, None, torch.device("meta"), torch.float32)

    def _foreign_training_bytes(self, work: Work) -> int:
        """Activations by the count of Korthikanti et al. 2022 (arXiv 2205.05198), with fused attention; autocast keeps
        the weights in 16 bits besides.
        """
        model = self._foreign_blank()
        config, tokens = model.config.get_text_config(), work.rows * work.length
        kept = _KEPT_PER_LAYER * config.num_hidden_layers * config.hidden_size + 10 * config.vocab_size
        return (_STATE_BYTES + 2) * _parameters(model) + tokens * kept


def counts_of(candidate: Candidate, subject: Subject) -> dict[str, int]:
    """Parameters by kind; a peer's matrices are the ternary ones."""
    counts = subject.parameter_counts()
    ternary, other = counts.ternary, counts.other
    if candidate.peer and isinstance(subject, OwnSubject):
        ternary = count_matrices(subject.model)
        other -= ternary
    elif not subject.is_quantized:
        ternary, other = 0, counts.other + counts.ternary
    return {"total": counts.total, "ternary": ternary, "embedding": counts.embedding, "other": other}


def described(candidate: Candidate, subject: Subject) -> dict[str, Any]:
    """Who it is, as JSON values."""
    family = candidate.model.get("family") or candidate.model.get("model_type") or candidate.kind
    peer = PEERS.get(candidate.peer)
    return {
        "name": candidate.name, "kind": candidate.kind, "family": family, "parameters": counts_of(candidate, subject),
        "is_quantized": candidate.is_quantized, "is_trained": candidate.is_trained, "peer": candidate.peer or None,
        "peer_version": None if peer is None or not peer.package else version_of(peer),
        "tokenizer": candidate.tokenizer or None, "epoch_tokens": candidate.epoch_tokens, "notes": subject.notes,
    }  # fmt: skip


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
