"""Loss, bits per byte and accuracies on a corpus small enough to be scored by hand."""

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import VALIDATION, tiny_bitnet, tiny_corpus
from ternlm.data.preparation import Prepared
from ternlm.errors import Interrupted, TokenizerError
from ternlm.evaluation.baselines import token_counts, unigram_bpb
from ternlm.evaluation.evaluate import evaluate
from ternlm.models import FULL_PRECISION, LanguageModel, Output, QuantizationMode
from ternlm.tokenizers import ByteTokenizer, TokenizerSettings

BOS, EOS = 254, 255
LN2 = math.log(2)


class TableModel(torch.nn.Module):
    """Logits that depend on the last token alone, so that windows and batches cannot matter."""

    compute_dtype = torch.float32
    is_causal = True
    is_recurrent = False

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.settings = tiny_bitnet(vocab_size=table.shape[0]).settings
        self.passes: list[tuple[int, bool]] = []

    def forward(self, tokens: torch.Tensor) -> Output:
        self.passes.append((len(tokens), self.training or torch.is_grad_enabled()))
        return Output(self.table[tokens], None, {})

    def bit_linears(self) -> dict[str, Any]:
        return {}


def table(seed: int = 0) -> torch.Tensor:
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return tiny_corpus(tmp_path)


@pytest.fixture
def score(prepared: Prepared) -> Callable[..., Any]:
    def run(model: Any, length: int = 16, batch_size: int = 4, **options: Any) -> Any:
        return evaluate(model, prepared.corpus.split("validation"), prepared.tokenizer, length, batch_size, **options)

    return run


def pairs(documents: list[str]) -> list[tuple[int, int]]:
    """(previous token, target) of every scored target: text and EOS, never BOS."""
    ids = [index for text in documents for index in (BOS, *text.encode(), EOS)]
    return [(a, b) for a, b in pairwise(ids) if b != BOS]


def test_e03_three_documents_scored_by_hand(score: Callable[..., Any]) -> None:
    log_p = table().double().log_softmax(dim=-1)
    scored = pairs(VALIDATION)
    nats = [-log_p[a, b].item() for a, b in scored]
    text = [nat for nat, (_, b) in zip(nats, scored, strict=True) if b != EOS]
    raw = sum(len(document.encode()) for document in VALIDATION)
    assert raw > sum(map(len, VALIDATION))  # there are characters of several bytes
    result = score(TableModel(table()))
    assert result.n_targets == len(scored) == raw + 3 and result.n_bytes == raw == len(text)
    assert result.loss == pytest.approx(sum(nats) / (raw + 3), rel=1e-6)
    assert result.bpb == pytest.approx(sum(text) / (LN2 * raw), rel=1e-6)
    assert result.bpb_all == pytest.approx(sum(nats) / (LN2 * raw), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss)) and result.perplexity_unit == "byte"


def test_a_uniform_model_gives_eight_bits_per_byte(score: Callable[..., Any]) -> None:
    result = score(TableModel(torch.zeros(256, 256)))
    assert result.bpb == pytest.approx(8.0, abs=1e-6)
    assert result.loss == pytest.approx(math.log(256), abs=1e-6)
    assert result.perplexity == pytest.approx(256, abs=1e-4)


def test_a_context_free_model_scores_the_same_in_every_window_length(score: Callable[..., Any]) -> None:
    results = [score(TableModel(table()), length) for length in (1, 5, 16, 37, 1000)]
    assert all(result.loss == pytest.approx(results[0].loss, abs=1e-9) for result in results)
    assert {result.n_targets for result in results} == {results[0].n_targets}


def test_e01_the_batch_size_does_not_change_the_result(score: Callable[..., Any]) -> None:
    results = [score(TableModel(table()), 7, batch_size) for batch_size in (1, 2, 3, 5, 100)]
    for result in results[1:]:
        assert abs(result.loss - results[0].loss) < 1e-9 and abs(result.bpb - results[0].bpb) < 1e-9
        assert result.accuracy == results[0].accuracy and result.n_targets == results[0].n_targets
        assert result.eval_id == results[0].eval_id


def test_e01_nor_does_it_for_a_real_model_beyond_the_order_of_float_sums(score: Callable[..., Any]) -> None:
    model = tiny_bitnet(mode=QuantizationMode(activations="none"), vocab_size=256, initializer_range=0.3)
    losses = [score(model, 7, batch_size).loss for batch_size in (1, 3, 100)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_e05_evaluating_twice_gives_the_same_bits_and_changes_nothing(score: Callable[..., Any]) -> None:
    model = tiny_bitnet(vocab_size=256)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = score(model), score(model)
    assert (first.loss, first.bpb, first.accuracy) == (second.loss, second.bpb, second.accuracy)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    score(model.eval())
    assert not model.training


def test_e05_every_pass_is_in_evaluation_mode_without_gradients(score: Callable[..., Any]) -> None:
    model = TableModel(table())
    score(model, 16, batch_size=4)  # 94 targets in 6 windows
    assert model.passes == [(4, False), (2, False)]


def test_e05_the_codes_are_evaluated_not_the_latents(score: Callable[..., Any]) -> None:
    def losses(model: LanguageModel) -> tuple[float, float]:
        before = score(model).loss
        with torch.no_grad():
            for layer in model.bit_linears().values():
                for part in layer.weight.split(layer.sizes):
                    sure = (part > 0.6 * part.abs().mean()).nonzero(as_tuple=True)
                    part[sure] = part[sure].flip(0)  # the same values elsewhere: equal codes, equal scale
        return before, score(model).loss

    quantized, twin = (
        losses(tiny_bitnet(vocab_size=256, initializer_range=0.5, mode=mode))
        for mode in (QuantizationMode(), FULL_PRECISION)
    )
    assert quantized[0] == quantized[1]
    assert twin[0] != twin[1]


def test_the_result_says_which_weights_and_text_were_scored(score: Callable[..., Any], prepared: Prepared) -> None:
    result = score(tiny_bitnet(vocab_size=256))
    assert (result.weights, result.dtype, result.split, result.protocol) == (
        "quantized",
        "float32",
        "validation",
        "block",
    )
    assert result.sequence_length == 16
    assert score(tiny_bitnet(vocab_size=256, mode=FULL_PRECISION)).weights == "full"
    stream = prepared.corpus.split("validation")
    assert result.eval_id == hashlib.sha256(f"{stream.eval_id}|{len(stream)}".encode()).hexdigest()[:16]
    assert score(tiny_bitnet(vocab_size=256), max_tokens=30).eval_id != result.eval_id
    assert set(result.as_dict()) >= {"loss", "bpb", "bpb_all", "n_targets", "n_bytes", "eval_id"}


def test_accuracies_are_those_of_sorted_logits(score: Callable[..., Any]) -> None:
    made = table()
    ranks = [int((made[a] > made[a, b]).sum()) for a, b in pairs(VALIDATION)]
    result = score(TableModel(made))
    for k, value in ((1, result.accuracy), (5, result.top5_accuracy), (10, result.top10_accuracy)):
        assert value == pytest.approx(sum(rank < k for rank in ranks) / len(ranks))


def test_ties_count_for_the_lowest_ids(score: Callable[..., Any]) -> None:
    """All 256 logits equal: only ids 0 to k - 1 are among the k largest."""
    made = torch.zeros(256, 256)
    assert score(TableModel(made)).top10_accuracy == 0
    targets = [b for _, b in pairs(VALIDATION)]
    made[:, : ord("a")] = -1.0  # now "a" is the first of the equals
    result = score(TableModel(made))
    assert result.accuracy == pytest.approx(targets.count(ord("a")) / len(targets))
    among = [sum(ord("a") <= b < ord("a") + k for b in targets) for k in (5, 10)]
    assert result.top5_accuracy == pytest.approx(among[0] / len(targets))
    assert result.top10_accuracy == pytest.approx(among[1] / len(targets))


@pytest.mark.parametrize("tokens,documents", [(1, 1), (20, 1), (21, 1), (46, 2), (47, 2), (10_000, 3)])
def test_a_limit_scores_whole_documents(score: Callable[..., Any], tokens: int, documents: int) -> None:
    lengths = np.cumsum([len(text.encode()) + 2 for text in VALIDATION])
    assert lengths.tolist() == [20, 46, 95]
    result = score(TableModel(table()), max_tokens=tokens)
    expected = pairs(VALIDATION[:documents])
    log_p = table().double().log_softmax(dim=-1)
    assert result.n_targets == len(expected)
    assert result.loss == pytest.approx(-sum(log_p[a, b].item() for a, b in expected) / len(expected), rel=1e-6)
    assert result.n_bytes == sum(len(text.encode()) for text in VALIDATION[:documents])


def test_documents_scored_apart_sum_to_the_whole(tmp_path: Path) -> None:
    whole = tiny_corpus(tmp_path / "all")
    parts = [tiny_corpus(tmp_path / str(i), validation=[document]) for i, document in enumerate(VALIDATION)]
    results = [evaluate(TableModel(table()), p.corpus.split("validation"), p.tokenizer, 16) for p in (whole, *parts)]  # type: ignore[arg-type]
    assert sum(r.n_bytes or 0 for r in results[1:]) == results[0].n_bytes
    assert sum(r.n_targets for r in results[1:]) == results[0].n_targets
    assert sum(r.bpb * r.n_bytes for r in results[1:]) == pytest.approx(results[0].bpb * results[0].n_bytes, rel=1e-9)


def test_a_trained_tokenizer_is_scored_per_raw_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepared = tiny_corpus(tmp_path, tokenizer=TokenizerSettings(name="train", vocab_size=300))
    size = prepared.tokenizer.vocab_size
    result = evaluate(TableModel(torch.zeros(size, size)), prepared.corpus.split("validation"), prepared.tokenizer, 16)  # type: ignore[arg-type]
    encoded = [prepared.tokenizer.encode(text) for text in VALIDATION]
    raw = sum(len(text.encode()) for text in VALIDATION)
    unscored = 0 if prepared.tokenizer.bos_id is not None else len(prepared.tokenizer.piece(encoded[0][0]))
    assert result.n_bytes == raw - unscored and result.perplexity_unit == "token"
    targets = sum(map(len, encoded)) - (prepared.tokenizer.bos_id is None)
    assert targets < raw and result.loss == pytest.approx(math.log(size), abs=1e-6)
    assert result.bpb == pytest.approx(targets * math.log(size) / (LN2 * (raw - unscored)), rel=1e-6)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(score: Callable[..., Any]) -> None:
    with pytest.raises(TokenizerError, match="has 256 ids, the model knows 61"):
        score(tiny_bitnet())


def test_a_stop_ends_the_evaluation_and_restores_the_mode(score: Callable[..., Any]) -> None:
    def stop() -> None:
        raise Interrupted("stop")

    model = tiny_bitnet(vocab_size=256)
    with pytest.raises(Interrupted):
        score(model, check=stop)
    assert model.training


def test_the_unigram_baseline_is_the_cross_entropy_of_counts(prepared: Prepared) -> None:
    stream, train = prepared.corpus.split("validation"), prepared.corpus.split("train")
    counts = token_counts(train, 256)
    assert np.array_equal(counts, token_counts(train, 256, chunk=7)) and counts.sum() == len(train)
    assert counts[BOS] == counts[EOS] == train.documents
    smoothed = np.array([count + 1 if index < BOS else 0 for index, count in enumerate(counts)], dtype=float)
    raw = b"".join(text.encode() for text in VALIDATION)
    expected = -sum(math.log2(smoothed[byte] / smoothed.sum()) for byte in raw) / len(raw)
    assert unigram_bpb(stream, counts, ByteTokenizer()) == pytest.approx(expected, rel=1e-9)
    assert unigram_bpb(stream, np.zeros(256, dtype=np.int64), ByteTokenizer()) == pytest.approx(math.log2(254))
