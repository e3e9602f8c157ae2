"""Models of Hugging Face transformers under test: trained and run as that library does it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.benchmark.subject import GRAD_CLIP, LEARNING_RATE, Subject, Work
from ternlm.data.batch import Batch
from ternlm.errors import EnvironmentFault, SettingsError
from ternlm.models import ParameterCounts


@final
class ForeignSubject(Subject):
    """A causal model of transformers: float32 parameters under autocast in training, cast once for inference.

    Args:
        name: What tables call it.
        model: On its device.
        dtype: Type of its activations.
    """

    def __init__(self, name: str, model: Any, dtype: torch.dtype) -> None:
        self.name, self.model, self.dtype, self.notes = name, model, dtype, []
        self.device = next(model.parameters()).device
        self._optimizer: torch.optim.AdamW | None = None
        self._batch: Batch | None = None
        self._state: Any = None

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def parameter_counts(self) -> ParameterCounts:
        tables = {id(module.weight): module.weight for module in self._tables()}
        total = sum(parameter.numel() for parameter in self.model.parameters())
        embedding = sum(table.numel() for table in tables.values())
        return ParameterCounts(0, embedding, total - embedding)

    def flops_per_token(self, context: int) -> float:
        """6 (weights of linear layers) + 12 layers * width of all heads * context; a tied head counts as a layer."""
        config = self.model.config.get_text_config()
        layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        linear = sum(layer.weight.numel() for layer in layers)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return 6.0 * (linear + 2 * config.num_hidden_layers * width * context)

    def disk_bytes(self) -> int:
        return 2 * self.parameter_counts().total

    def begin_training(self, work: Work, say: Callable[[str], None]) -> bool:
        self.model.train()
        is_fused = self.device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=is_fused)
        self._batch = Batch.from_windows(self.ids(work.rows, work.length + 1), None).to(self.device)
        if not work.compiled:
            return False
        layers = list(self.model.get_decoder().layers)
        for layer in layers:
            layer.compile()
        try:
            self.training_step()
        except Exception as error:  # noqa: BLE001 - the compiler's failures have no common base class
            say(f"compiling failed ({str(error).strip().partition(chr(10))[0][:200]}); going on without.")
            self._forget_compiled()
            return False
        return True

    def training_step(self) -> float:
        assert self._optimizer is not None and self._batch is not None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(input_ids=self._batch.tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), self._batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def begin_inference(self) -> None:
        self._optimizer = self._batch = None
        self.model.zero_grad(set_to_none=True)
        self._forget_compiled()
        self.model.eval().to(self.dtype)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        return self._read(tokens, None)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return self._read(tokens[:, None], self._state)

    def held(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _read(self, tokens: Tensor, state: Any) -> Tensor:
        output = self.model(input_ids=tokens, past_key_values=state, use_cache=True, logits_to_keep=1)
        self._state = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def _tables(self) -> Iterator[Any]:
        yield from (m for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings()) if m is not None)

    def _forget_compiled(self) -> None:
        for module in self.model.modules():
            module._compiled_call_impl = None


def read_config(source: Path | dict[str, Any]) -> Any:
    """The configuration of a causal model of transformers, from a folder or from values.

    Raises:
        EnvironmentFault: transformers is not installed, or the folder holds no configuration.
        SettingsError: It does not describe a causal model in full precision.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise EnvironmentFault(
            "models of Hugging Face need transformers, which is not installed. Run: pip install 'ternlm[hub]'"
        ) from None
    if isinstance(source, dict):
        values = dict(source)
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(f"'{source}' holds no configuration that transformers reads: {reason[:160]}") from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SettingsError(
            f"'{source}' is a '{config.model_type}', which predicts no next token. Compare a causal language model."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise SettingsError(
            f"'{source}' holds quantized weights, which transformers runs through packages of their own. "
            "Compare the checkpoint in full precision."
        )
    return config


def build_foreign(config: Any, folder: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of transformers with its weights from a folder, or drawn at random, its parameters in a type.

    Raises:
        EnvironmentFault: The weights cannot be loaded.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if folder is None:
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.to(device)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(f"the weights in '{folder}' cannot be loaded: {reason[:160]}") from None
    return model.to(device)
