"""Models of any families and tokenizers on the same text, ranked by bits per byte."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ternlm.data.corpus import TokenStream
from ternlm.errors import DataError, SettingsError
from ternlm.evaluation.bootstrap import interval, resampled_bpb
from ternlm.evaluation.evaluate import DocumentScores, EvaluationResult
from ternlm.models import LanguageModel


@dataclass(frozen=True)
class Contender:
    """One model, and how it did.

    Attributes:
        name: Short, and different from the others'.
        checkpoint: Where it lies.
        family: Key in `MODELS`.
        step, tokens_seen: Optimizer steps, and targets it was trained on (None where not recorded).
        parameters, ternary_parameters: All, and those in ternary layers.
        state_bytes: Memory of one text while it is read.
        result: Its evaluation.
    """

    name: str
    checkpoint: str
    family: str
    step: int
    tokens_seen: int | None
    parameters: int
    ternary_parameters: int
    state_bytes: int
    result: EvaluationResult


def compare(contenders: Sequence[Contender]) -> dict[str, Any]:
    """Rank models, the fewest bits per byte first.

    A difference is a model's bits per byte less the best one's; its interval comes from documents drawn again, the same
    ones for all models. Models whose interval holds 0 are not told apart from the best by this text. It speaks of
    the text alone: other seeds of training would move the numbers as well.

    Returns:
        `documents`, `bytes`, `text_id`, `protocol`, and `models`: rows with `rank`, `bpb`, `bpb_ci95`, `difference`,
        `difference_ci95`, `ties_best`, `bytes_per_sec` and the facts of `Contender` and `EvaluationResult`; a model
        without bits per byte (an unknown token hides text) comes last and has no rank.

    Raises:
        DataError: They were not scored on the same documents.
    """
    scores = [_scores(each) for each in contenders]
    _require_same_text(contenders, scores)
    drawn = resampled_bpb(np.stack([each.nats for each in scores]), scores[0].bytes)
    ranked = sorted(
        (number for number, each in enumerate(contenders) if each.result.bpb is not None),
        key=lambda number: contenders[number].result.bpb or 0.0,
    )
    others = [number for number in range(len(contenders)) if number not in ranked]
    rows = []
    for place, number in enumerate(ranked, start=1):
        row = _facts(contenders[number]) | {"rank": place}
        row["difference"] = row["bpb"] - (contenders[ranked[0]].result.bpb or 0.0)
        row["bpb_ci95"] = None if drawn is None else interval(drawn[number])
        apart = None if drawn is None or place == 1 else interval(drawn[number] - drawn[ranked[0]])
        row |= {"difference_ci95": apart, "ties_best": apart is not None and apart[0] <= 0 <= apart[1]}
        rows.append(row)
    nothing = {"rank": None, "difference": None, "bpb_ci95": None, "difference_ci95": None, "ties_best": False}
    rows += [_facts(contenders[number]) | nothing for number in others]
    return {
        "text_id": scores[0].text_id,
        "documents": len(scores[0].bytes),
        "bytes": int(scores[0].bytes.sum()),
        "protocol": contenders[0].result.protocol,
        "models": rows,
    }


def record_of(result: EvaluationResult) -> dict[str, Any]:
    """An evaluation as JSON values; of a causal model with what is worked out of it.

    That is `documents`, how many were read; `bpb_ci95`, how sure the bits per byte are (None for few documents); and
    `bytes_per_sec`, raw bytes.
    """
    if result.documents is None:
        return result.as_dict()
    drawn = None if result.bpb is None else resampled_bpb(result.documents.nats[None], result.documents.bytes)
    return result.as_dict() | {
        "documents": len(result.documents.bytes),
        "bpb_ci95": None if drawn is None else interval(drawn[0]),
        "bytes_per_sec": _bytes_per_sec(result),
    }


def require_comparable(model: LanguageModel, name: str) -> None:
    """Refuse an encoder.

    Raises:
        SettingsError: The model is one.
    """
    if not model.is_causal:
        raise SettingsError(
            f"'{name}' is an encoder ('{model.settings.family}'), whose losses are no code of the text: most tokens "
            "are given. Compare causal models; 'ternlm evaluate' scores an encoder."
        )


def end_within_bytes(stream: TokenStream, max_bytes: int | None) -> int:
    """One past the last token of the documents with so many raw bytes together, of the first if it has more.

    Unlike a number of tokens, it is the same text for every tokenizer.
    """
    if max_bytes is None:
        return len(stream)
    fitting = int(np.searchsorted(np.cumsum(stream.document_bytes), max_bytes, side="right"))
    return int(stream.document_ends[max(fitting, 1) - 1])


def _facts(contender: Contender) -> dict[str, Any]:
    facts = {name: value for name, value in vars(contender).items() if name != "result"}
    return facts | contender.result.as_dict() | {"bytes_per_sec": _bytes_per_sec(contender.result)}


def _bytes_per_sec(result: EvaluationResult) -> float | None:
    return None if result.n_bytes is None else result.n_bytes / max(result.wall_s, 1e-9)


def _scores(contender: Contender) -> DocumentScores:
    assert contender.result.documents is not None, "an encoder has none"
    return contender.result.documents


def _require_same_text(contenders: Sequence[Contender], scores: Sequence[DocumentScores]) -> None:
    for contender, each in zip(contenders, scores, strict=True):
        if each.text_id != scores[0].text_id:
            raise DataError(
                f"'{contender.name}' and '{contenders[0].name}' were scored on different documents, "
                f"{len(each.bytes):,} ({int(each.bytes.sum()):,} bytes) and {len(scores[0].bytes):,} "
                f"({int(scores[0].bytes.sum()):,} bytes). Name one text for all with --data."
            )
