"""The papers behind the parts that a run uses, decided by its settings."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ternlm.report.tail import mapping, number

Settings = Mapping[str, Any]


class Paper(NamedTuple):
    """A source.

    Attributes:
        part: What of the run it describes.
        title: Authors, year and title.
        number: On arXiv.
        is_used: Whether a run with these settings has the part.
    """

    part: str
    title: str
    number: str
    is_used: Callable[[Settings], bool]


def papers(config: Settings) -> list[dict[str, str]]:
    """`part`, `title` and `address` of each paper whose part a run uses.

    Args:
        config: Its settings as `meta/config.json` has them; what is missing is taken as not used.
    """
    if not config:
        return []
    return [
        {"part": paper.part, "title": paper.title, "address": f"https://arxiv.org/abs/{paper.number}"}
        for paper in _PAPERS
        if paper.is_used(config)
    ]


def _value(config: Settings, name: str) -> Any:
    section, _, key = name.partition(".")
    return mapping(config.get(section)).get(key)


def _is(name: str, *values: Any) -> Callable[[Settings], bool]:
    return lambda config: _value(config, name) in values


def _is_above_zero(name: str) -> Callable[[Settings], bool]:
    return lambda config: (number(_value(config, name)) or 0.0) > 0


def _both(*conditions: Callable[[Settings], bool]) -> Callable[[Settings], bool]:
    return lambda config: all(condition(config) for condition in conditions)


def _any(*conditions: Callable[[Settings], bool]) -> Callable[[Settings], bool]:
    return lambda config: any(condition(config) for condition in conditions)


def _has_fewer_heads(config: Settings) -> bool:
    keys, heads = (_value(config, f"model.num_{kind}_heads") for kind in ("key_value", "attention"))
    return isinstance(keys, int) and isinstance(heads, int) and keys < heads


def _is_set(name: str) -> Callable[[Settings], bool]:
    return lambda config: _value(config, name) is not None


_BITNET = _is("model.family", "bitnet")
_RECURRENT = _is("model.family", "hgrn", "hnet")
_TERNARY = _is("quantization.weights", "ternary")
_ENCODER = _is("objective.name", "mlm")

_PAPERS = (
    Paper("ternary weights, one mean magnitude as scale", "Ma et al. 2024, The Era of 1-bit LLMs: All Large Language "
          "Models are in 1.58 Bits", "2402.17764", _both(_TERNARY, _is("quantization.quantizer", "absmean"))),
    Paper("integer activations with a scale per token", "Wang et al. 2023, BitNet: Scaling 1-bit Transformers for "
          "Large Language Models", "2310.11453",
          _both(_is("quantization.weights", "ternary", "int8", "int6", "int4"),
                _is("quantization.activations", "int8", "int6", "int4"), _any(_BITNET, _RECURRENT))),
    Paper("block and names of tensors", "Ma et al. 2025, BitNet b1.58 2B4T Technical Report", "2504.12285", _BITNET),
    Paper("norm before output projections", "Wang et al. 2022, Foundation Transformers", "2210.06423",
          _both(_BITNET, _is("model.norm_layout", "subln", "double"))),
    Paper("weight decay off late, rates of small ternary models", "Kaushal et al. 2024, Spectra: A Comprehensive "
          "Study of Ternary, Quantized, and FP16 Language Models", "2407.12327", _TERNARY),
    Paper("scale of kept weights (quantizer twn)", "Li et al. 2016, Ternary Weight Networks", "1605.04711",
          _both(_TERNARY, _is("quantization.quantizer", "twn"))),
    Paper("learned scales and thresholds (quantizer ttq)", "Zhu et al. 2016, Trained Ternary Quantization",
          "1612.01064", _both(_TERNARY, _is("quantization.quantizer", "ttq"))),
    Paper("learned step (quantizer lsq)", "Esser et al. 2019, Learned Step Size Quantization", "1902.08153",
          _both(_TERNARY, _is("quantization.quantizer", "lsq"))),
    Paper("quantizers bypassed at random", "Wei et al. 2022, QDrop: Randomly Dropping Quantization for Extremely "
          "Low-bit Post-Training Quantization", "2203.05740", _is_above_zero("quantization.qdrop")),
    Paper("noise on codes", "Fan et al. 2020, Training with Quantization Noise for Extreme Model Compression",
          "2004.07320", _any(_is_above_zero("quantization.dither"), _is_above_zero("quantization.ternary_dropout"))),
    Paper("full precision first, ternary after", "Nielsen et al. 2025, Continual Quantization-Aware Pre-Training",
          "2502.11895", _both(_TERNARY, _is_above_zero("quantization.full_precision_until"))),
    Paper("rotation before activations are rounded", "Wang et al. 2025, BitNet v2: Native 4-bit Activations with "
          "Hadamard Transformation for 1-bit LLMs", "2504.18415",
          _both(_is("model.family", "qdyt"), _is("model.mixers", True))),
    Paper("norm without statistics", "Zhu et al. 2025, Transformers without Normalization", "2503.10622",
          _any(_is("model.norm_type", "dyt", "qdyt"), _is("model.final_norm", "qdyt"))),
    Paper("activations clipped at an observed or learned bound", "Choi et al. 2018, PACT: Parameterized Clipping "
          "Activation for Quantized Neural Networks", "1805.06085", _is("model.family", "qdyt")),
    Paper("root-mean-square norm", "Zhang and Sennrich 2019, Root Mean Square Layer Normalization", "1910.07467",
          _any(_BITNET, _RECURRENT)),
    Paper("rotary positions", "Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding",
          "2104.09864", _BITNET),
    Paper("fewer heads for keys and values", "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer "
          "Models from Multi-Head Checkpoints", "2305.13245", _both(_BITNET, _has_fewer_heads)),
    Paper("gated feed-forward network", "Shazeer 2020, GLU Variants Improve Transformer", "2002.05202",
          _any(_BITNET, _RECURRENT)),
    Paper("squared ReLU", "So et al. 2021, Primer: Searching for Efficient Transformers for Language Modeling",
          "2109.08668", _both(_BITNET, _is("model.hidden_act", "relu2"))),
    Paper("gated recurrence", "Qin et al. 2023, Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
          "2311.04823", _RECURRENT),
    Paper("ternary recurrence without matrix products", "Zhu et al. 2024, Scalable MatMul-free Language Modeling",
          "2406.02528", _RECURRENT),
    Paper("learned chunks", "Hwang et al. 2025, Dynamic Chunking for End-to-End Hierarchical Sequence Modeling",
          "2507.07955", _is("model.family", "hnet")),
    Paper("masked tokens as the task", "Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers for "
          "Language Understanding", "1810.04805", _ENCODER),
    Paper("masks drawn anew for each pass", "Liu et al. 2019, RoBERTa: A Robustly Optimized BERT Pretraining Approach",
          "1907.11692", _ENCODER),
    Paper("learning from a teacher", "Hinton et al. 2015, Distilling the Knowledge in a Neural Network", "1503.02531",
          _is_set("distillation.teacher")),
    Paper("optimizer AdamW", "Loshchilov and Hutter 2017, Decoupled Weight Decay Regularization", "1711.05101",
          _is("optimizer.name", "adamw", "muon")),
    Paper("optimizer Muon", "Liu et al. 2025, Muon is Scalable for LLM Training", "2502.16982",
          _is("optimizer.name", "muon")),
    Paper("tokens of several bytes", "Sennrich et al. 2015, Neural Machine Translation of Rare Words with Subword "
          "Units", "1508.07909", _is("tokenizer.name", "train")),
)  # fmt: skip
