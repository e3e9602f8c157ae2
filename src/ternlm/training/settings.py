"""`RunSettings`: everything that defines a run, in sections, with the names people already use."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from ternlm.data.settings import DataSettings
from ternlm.data.windows import Windows, build_windows
from ternlm.device import Precision
from ternlm.errors import SettingsError
from ternlm.evaluation.settings import EvaluationSettings
from ternlm.models import MODELS, ModelSettings, model_settings
from ternlm.models.stages import QuantizationSettings, Stages
from ternlm.settings import Count, Float, Seconds, Settings
from ternlm.settings.resolve import Layer, Names, Resolved, resolve
from ternlm.tokenizers import Tokenizer, TokenizerSettings
from ternlm.tracking import TrackingSettings
from ternlm.training.anomaly_settings import AnomalySettings
from ternlm.training.distillation import DistillationSettings
from ternlm.training.objective import ObjectiveSettings, require_matching
from ternlm.training.optimizer import OptimizerSettings
from ternlm.training.schedule import Schedule, ScheduleSettings


class TrainingSettings(Settings):
    """How long, how large, how precise, and what is kept.

    Attributes:
        max_steps, max_tokens, max_epochs: The run ends at the smallest of those given; one is required.
        max_time: Stop and save after this long, e.g. ``2h30m``; the schedule does not move.
        batch_size: Sequences per optimizer step.
        micro_batch_size: Sequences per forward pass; ``auto`` starts with the whole batch and halves
            when memory runs out. The mathematics does not depend on it, except that an encoder's activation scales
            and noise follow micro-batches.
        gradient_accumulation_steps: The same, given as a number of micro-batches.
        grad_clip: Largest gradient norm; 0 switches clipping off.
        precision: ``fp32``, ``bf16``, ``fp16`` (with a loss scaler) or ``auto``. Latent weights are
            float32 in all of them.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        threads: CPU threads; None keeps torch's choice.
        compile: Compile each block; falls back to eager with a warning.
        gradient_checkpointing: Recompute blocks in the backward pass to save memory.
        deterministic: Refuse operations whose result depends on scheduling.
        seed: Decides initial weights and the order of the data.
        checkpoint_every_steps: Steps between checkpoints; the end and stage boundaries are always kept.
        keep_last: Newest checkpoints to keep, at least 2.
        keep_every: Also keep every checkpoint whose step is a multiple of this.
    """

    max_steps: Count | None = None
    max_tokens: Count | None = None
    max_epochs: Float | None = None
    max_time: Seconds | None = None
    batch_size: Count = 16
    micro_batch_size: Count | Literal["auto"] = "auto"
    gradient_accumulation_steps: Count | None = None
    grad_clip: Float = Field(default=1.0, ge=0)
    precision: Precision = "auto"
    device: str = "auto"
    threads: Count | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    deterministic: bool = False
    seed: Count = Field(default=0, ge=0)
    checkpoint_every_steps: Count = 500
    keep_last: Count = Field(default=2, ge=2)
    keep_every: Count | None = None

    @field_validator("max_steps", "max_tokens", "max_epochs", "max_time", "batch_size", "micro_batch_size",
                     "gradient_accumulation_steps", "threads", "checkpoint_every_steps", "keep_every")  # fmt: skip
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError("it must be above 0")
        return value

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        if self.gradient_accumulation_steps is not None and self.micro_batch_size != "auto":
            raise ValueError(
                "training.micro_batch_size and training.gradient_accumulation_steps both split the batch; give one"
            )
        return self

    def first_micro_batch_size(self) -> int:
        """Sequences per forward pass before memory has been tried."""
        if self.gradient_accumulation_steps is not None:
            return -(-self.batch_size // self.gradient_accumulation_steps)
        if self.micro_batch_size == "auto":
            return self.batch_size
        return min(self.micro_batch_size, self.batch_size)


class RunSettings(Settings):
    """All sections of a run. `quantization.weights=none` makes the full-precision twin."""

    model: SerializeAsAny[ModelSettings] = Field(default_factory=lambda: model_settings({}))
    data: DataSettings = DataSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    quantization: QuantizationSettings = QuantizationSettings()
    training: TrainingSettings = TrainingSettings()
    tracking: TrackingSettings = TrackingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    anomaly: AnomalySettings = AnomalySettings()
    distillation: DistillationSettings = DistillationSettings()

    @field_validator("model", mode="before")
    @classmethod
    def _family(cls, value: Any) -> Any:
        return model_settings(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        is_limited = not MODELS[self.model.family].model.is_recurrent
        if is_limited and self.data.sequence_length > self.model.max_position_embeddings:
            raise SettingsError(
                f"data.sequence_length={self.data.sequence_length} exceeds "
                f"model.max_position_embeddings={self.model.max_position_embeddings}. "
                "Lower the first or raise the second."
            )
        family = self.model.family
        require_matching(self.objective, family, MODELS[family].model.is_causal)
        if self.data.stream and self.training.max_epochs is not None:
            raise SettingsError(
                "training.max_epochs cannot be counted on a stream, whose length shows only when it ends. "
                "Give training.max_steps or training.max_tokens, or data.stream=false."
            )
        if self.training.precision == "fp16" and getattr(self.model, "hidden_act", "") == "relu2":
            raise SettingsError("model.hidden_act=relu2 overflows in training.precision=fp16. Use bf16 or fp32.")
        if self.training.max_steps is None and self.training.max_tokens is None and self.training.max_epochs is None:
            raise SettingsError(
                "the run has no end. Give training.max_steps, training.max_tokens or training.max_epochs "
                "(--steps, --tokens, --epochs)."
            )
        return self

    def total_steps(self, windows_per_epoch: int | None = None) -> int:
        """Optimizer steps of the run: the smallest of the limits given.

        Args:
            windows_per_epoch: Sequences in one epoch; without it `max_epochs` cannot be counted.

        Raises:
            SettingsError: `max_epochs` is the only limit and the size of the data is unknown.
        """
        training = self.training
        limits = []
        if training.max_steps is not None:
            limits.append(training.max_steps)
        if training.max_tokens is not None:
            limits.append(max(1, training.max_tokens // (training.batch_size * self.data.sequence_length)))
        if training.max_epochs is not None and windows_per_epoch is not None:
            limits.append(max(1, round(training.max_epochs * windows_per_epoch / training.batch_size)))
        if not limits:
            raise SettingsError("training.max_epochs needs the prepared data. Run 'ternlm data prepare' first.")
        return min(limits)

    def windows(self, tokenizer: Tokenizer) -> Windows:
        """How spans of the token stream become batches of this run.

        Raises:
            SettingsError: The tokenizer does not fit the objective.
        """
        return build_windows(self.objective.masking, tokenizer, self.data.sequence_length, self.training.seed)

    def stages(self, total_steps: int) -> Stages:
        """How each block rounds in each update of the run."""
        return Stages(self.quantization, self.model.total_blocks, total_steps)

    def rates(self, total_steps: int) -> Schedule:
        """Learning rate, weight decay and stage of each update of the run."""
        optimizer, stages = self.optimizer, self.stages(total_steps)
        return Schedule(self.schedule, optimizer.learning_rate, optimizer.weight_decay, total_steps, stages)


SECTION_ALIASES = {"optim": "optimizer", "quant": "quantization", "train": "training", "log": "tracking",
                   "eval": "evaluation"}  # fmt: skip

ALIASES = {
    "d_model": "model.hidden_size", "n_embd": "model.hidden_size", "dim": "model.hidden_size",
    "n_layer": "model.num_hidden_layers", "n_layers": "model.num_hidden_layers",
    "num_layers": "model.num_hidden_layers", "depth": "model.num_hidden_layers",
    "n_head": "model.num_attention_heads", "num_heads": "model.num_attention_heads",
    "num_kv_heads": "model.num_key_value_heads",
    "ffn_size": "model.intermediate_size", "ffn_hidden_size": "model.intermediate_size",
    "block_size": "model.max_position_embeddings", "max_seq_length": "model.max_position_embeddings",
    "norm_eps": "model.rms_norm_eps", "embeddings_tied": "model.tie_word_embeddings",
    "norm_placement": "model.norm_layout",
    "weight_bits": "quantization.weights", "activation_bits": "quantization.activations",
    "tokenizer": "tokenizer.name",
    "data": "data.source", "path": "data.source", "data_path": "data.source", "data_dir": "data.source",
    "dataset": "data.source",
    "val_fraction": "data.validation_fraction", "max_samples": "data.max_documents",
    "seq_len": "data.sequence_length", "seq_length": "data.sequence_length", "max_length": "data.sequence_length",
    "per_device_train_batch_size": "training.micro_batch_size",
    "grad_accum_steps": "training.gradient_accumulation_steps",
    "num_steps": "training.max_steps", "max_iters": "training.max_steps", "num_epochs": "training.max_epochs",
    "mixed_precision": "training.precision",
    "max_grad_norm": "training.grad_clip", "grad_clip_norm": "training.grad_clip",
    "mlm_probability": "objective.mask_fraction", "mask_prob": "objective.mask_fraction",
    "whole_word_mask": "objective.whole_word",
    "save_interval": "training.checkpoint_every_steps", "checkpoint_interval": "training.checkpoint_every_steps",
    "save_steps": "training.checkpoint_every_steps", "save_total_limit": "training.keep_last",
    "lr": "optimizer.learning_rate", "peak_lr": "optimizer.learning_rate",
    "scheduler": "schedule.name",
    "eval_interval": "evaluation.every_steps", "sample_interval": "evaluation.sample_every_steps",
    "wandb_mode": "tracking.wandb", "wandb_run_name": "tracking.wandb_name",
    "log_interval": "tracking.every_steps", "logging_steps": "tracking.every_steps",
}  # fmt: skip
"""Other spellings of settings, as users of other trainers write them."""


def setting_names(family: str | None = None) -> Names:
    """Every setting that exists, with the accepted aliases.

    Args:
        family: Key in `MODELS` whose settings the section `model` has; None takes those of all families. What a
            family calls by a name that is an alias elsewhere, such as `d_model`, goes by that name.
    """
    sections = {}
    for name, field in RunSettings.model_fields.items():
        annotation = field.annotation
        assert isinstance(annotation, type) and issubclass(annotation, Settings)
        sections[name] = set(annotation.model_fields)
    for key in MODELS if family is None else (family,):
        sections["model"] |= set(MODELS[key].settings.model_fields)
    own = sections["model"] if family is not None else set()
    return Names(sections, {name: full for name, full in ALIASES.items() if name not in own}, SECTION_ALIASES)


def resolve_settings(layers: Sequence[Layer]) -> Resolved:
    """Merge layers, later ones winning, by the names of the model family that the last of them chooses.

    Raises:
        SettingsError: A name is unknown or ambiguous.
    """
    chosen: Any = "bitnet"
    for layer in layers:
        model = layer.values.get("model")
        inner = model.get("family", chosen) if isinstance(model, Mapping) else chosen
        chosen = layer.values.get("family", layer.values.get("model.family", inner))
    return resolve(layers, setting_names(chosen if isinstance(chosen, str) and chosen in MODELS else None))
