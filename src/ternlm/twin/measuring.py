"""What is measured of the finished arms: texts scored with the weights of the last update, with the first, and rounded.

Every score is kept in the twin's folder with the nats of every document, so that the result can be traced to it, and
nothing is scored twice.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ternlm import checkpoint
from ternlm.checkpoint import Loaded
from ternlm.data import DataSettings, load_corpus
from ternlm.data.corpus import Corpus, TokenStream
from ternlm.data.preparation import Prepared
from ternlm.device import choose_device, set_up
from ternlm.evaluation.comparison import record_of
from ternlm.evaluation.evaluate import DocumentScores, EvaluationResult, evaluate
from ternlm.evaluation.masked import masking_of
from ternlm.files import from_json, read_regular, replace_durably, to_json
from ternlm.models import QuantizationMode
from ternlm.models.stages import QuantizationSettings
from ternlm.run_directory import RunDirectory
from ternlm.tokenizers import TokenizerSettings
from ternlm.twin.definition import VALIDATION, Text
from ternlm.twin.record import TwinDirectory
from ternlm.twin.texts import split_of, text_settings

if TYPE_CHECKING:
    from ternlm.twin.stages import Prepare

Weights = Literal["after", "before", "rounded"]
_LARGEST = 256 * 2**20
_BATCH_ROWS = 16


class Measurer:
    """Scores finished runs on the texts of a twin.

    Args:
        folder: Where scores are kept.
        texts: Held-out texts besides the validation split.
        prepare: Makes tokens of a text with the tokenizer of a checkpoint.
        say: Called with a sentence before something slow begins.
        check: Called before every batch; may raise to stop.
    """

    def __init__(
        self,
        folder: TwinDirectory,
        texts: tuple[Text, ...],
        prepare: "Prepare",
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self.folder, self.texts = folder, texts
        self._prepare, self._say, self.check = prepare, say, check
        self._streams: dict[tuple[str, str], TokenStream] = {}

    def facts(self, run: RunDirectory) -> dict[str, Any]:
        """Parameters and sizes of a run's model, in bytes."""
        loaded = self._load(run)
        counts = loaded.model.parameter_counts()
        is_rounded = any(layer.mode.weights != "none" for layer in loaded.model.bit_linears().values())
        return {
            "family": loaded.model.settings.family,
            "is_causal": loaded.model.is_causal,
            "checkpoint": str(loaded.path),
            "step": loaded.state["step"],
            "tokenizer_fingerprint": loaded.tokenizer.fingerprint,
            "parameters": {"total": counts.total, **counts._asdict()},
            "bytes": {
                "packed": checkpoint.packed_bytes(loaded.model) if is_rounded else None,
                "bf16": 2 * counts.total,
                "fp32": 4 * counts.total,
            },
        }

    def scores(
        self, run: RunDirectory, weights: Weights = "after", rounding: Mapping[str, Any] | None = None
    ) -> dict[str, dict[str, Any]]:
        """A run's score on every text, by the name of the text.

        Args:
            run: A finished run.
            weights: Those of the last update, as they were drawn before the first, or the last ones ``rounded``.
            rounding: The `quantization` section that says how, for ``rounded``.
        """
        loaded: Loaded | None = None
        found = {}
        for text in (Text(VALIDATION, ""), *self.texts):
            file = self.folder.scores(f"{run.id}-{weights}" if weights != "after" else run.id, text.name)
            loaded = loaded or self._load(run)
            stream = self._stream(loaded, run, text)
            mark = {"checkpoint": loaded.path.name, "eval_id": stream.eval_id, "n_tokens": len(stream),
                    "rounding": None if rounding is None else _mode(rounding).model_dump(mode="json")}  # fmt: skip
            kept = _kept(file, mark)
            if kept is None:
                self._say(f"scoring {_said(run, weights)} on '{text.name}' ({len(stream):,} tokens)")
                placed = _placed(loaded, weights, rounding)
                kept = mark | self._score(placed, stream)
                file.parent.mkdir(exist_ok=True)
                replace_durably(file, to_json(kept))
                loaded = loaded if weights == "after" else None  # its weights are no longer those of the checkpoint
            found[text.name] = kept
        return found

    def sample(self, run: RunDirectory, tokens: int) -> np.ndarray:
        """The first tokens of the validation split, as the run's model reads them."""
        stream = self._stream(self._load(run), run, Text(VALIDATION, ""))
        return stream.read(0, min(tokens, len(stream)))

    def load(self, run: RunDirectory) -> Loaded:
        """The run's final checkpoint, on its device."""
        return self._load(run)

    def _load(self, run: RunDirectory) -> Loaded:
        path = checkpoint.resolve(f"{run.path}@final", run.path.parent)
        loaded = checkpoint.load(path)
        training = loaded.config["training"]
        device = choose_device(training["device"])
        set_up(device, training["threads"])
        return loaded._replace(model=loaded.model.to(device))

    def _stream(self, loaded: Loaded, run: RunDirectory, text: Text) -> TokenStream:
        key = (text.name, loaded.tokenizer.fingerprint)
        if key not in self._streams:
            self._streams[key] = (
                self._validation(loaded, run) if text.name == VALIDATION else self._held_out(loaded, text)
            )
        return self._streams[key]

    def _validation(self, loaded: Loaded, run: RunDirectory) -> TokenStream:
        data = loaded.config["data"]
        if data.get("stream"):
            return load_corpus(run.stream / "validation").split("validation")
        return _corpus(self._prepare(DataSettings.from_mapping(data, "data"), _own_tokenizer(loaded))).split(
            "validation"
        )

    def _held_out(self, loaded: Loaded, text: Text) -> TokenStream:
        settings = text_settings(text, loaded.config["data"])
        return split_of(_corpus(self._prepare(settings, _own_tokenizer(loaded))), text)

    def _score(self, loaded: Loaded, stream: TokenStream) -> dict[str, Any]:
        length, masking = loaded.config["data"]["sequence_length"], masking_of(loaded.model, loaded.config)
        result = evaluate(
            loaded.model, stream, loaded.tokenizer, length, _BATCH_ROWS, check=self.check, masking=masking
        )  # fmt: skip
        return {"result": record_of(result), "by_document": _by_document(result)}


def _corpus(prepared: Prepared) -> Corpus:
    assert isinstance(prepared.corpus, Corpus), "only training reads a stream"
    return prepared.corpus


def _own_tokenizer(loaded: Loaded) -> TokenizerSettings:
    return TokenizerSettings(name=str(loaded.path))


def _mode(rounding: Mapping[str, Any]) -> QuantizationMode:
    return QuantizationSettings.from_mapping(rounding, "quantization").base()


def _placed(loaded: Loaded, weights: Weights, rounding: Mapping[str, Any] | None) -> Loaded:
    """The checkpoint with the weights that are asked for; it is not to be used for others afterwards."""
    if weights == "before":
        loaded.model.initialize(int(loaded.config["training"]["seed"]))
    elif weights == "rounded":
        assert rounding is not None
        loaded.model.set_mode(_mode(rounding))
    return loaded


def _said(run: RunDirectory, weights: Weights) -> str:
    return {"after": run.id, "before": f"{run.id} before training", "rounded": f"{run.id} with rounded weights"}[
        weights
    ]


def _by_document(result: EvaluationResult) -> dict[str, Any] | None:
    """What single documents cost, as JSON values; None of an encoder."""
    scores: DocumentScores | None = result.documents
    if scores is None or scores.all_nats is None or scores.targets is None:
        return None
    return {
        "text_id": scores.text_id,
        "text_nats": scores.nats.tolist(),
        "bytes": scores.bytes.tolist(),
        "nats": scores.all_nats.tolist(),
        "targets": scores.targets.tolist(),
    }


def _kept(file: Path, mark: Mapping[str, Any]) -> dict[str, Any] | None:
    """A score that was kept, if it is of the same weights and the same text."""
    try:
        found = from_json(read_regular(file, _LARGEST))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in mark.items()):
        return None
    return found if "result" in found and "by_document" in found else None
