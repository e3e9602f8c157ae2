"""The masked loss of encoders on a corpus small enough to be scored by hand, and the numbers beside it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders import TRAIN, VALIDATION, tiny_bitnet, tiny_corpus
from encoders import MASK, PIECES, SPECIAL, UNK, TableEncoder, printed_under_two_hash_seeds, table, wordpiece
from ternlm.data.batch import IGNORED
from ternlm.data.masking import MaskingSettings
from ternlm.data.preparation import Prepared
from ternlm.data.windows import MaskedWindows
from ternlm.errors import DataError, SettingsError, TokenizerError
from ternlm.evaluation.baselines import token_counts
from ternlm.evaluation.evaluate import evaluate
from ternlm.evaluation.masked import masked_baselines, masking_of, pseudo_likelihood
from ternlm.evaluation.samples import sample_modes
from ternlm.evaluation.settings import EvaluationSettings
from ternlm.tokenizers import TokenizerSettings

MASKING = MaskingSettings(mask_fraction=0.3, mask_share=0.6, random_share=0.2)
DOCUMENTS = [*VALIDATION, *(f"{text} Then they slept, jumping and walking." for text in TRAIN[:20])]
V = len(PIECES)
Score = Callable[..., Any]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    wordpiece(tmp_path / "tokenizer")
    settings = TokenizerSettings(name=str(tmp_path / "tokenizer"))
    return tiny_corpus(tmp_path, validation=DOCUMENTS, tokenizer=settings)


@pytest.fixture
def score(prepared: Prepared) -> Score:
    def run(model: Any, length: int = 16, batch_size: int = 4, masking: Any = MASKING, **options: Any) -> Any:
        stream = prepared.corpus.split("validation")
        return evaluate(model, stream, prepared.tokenizer, length, batch_size, masking=masking, **options)

    return run


def by_hand(prepared: Prepared, length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(read, targets, kinds) of every window of the validation split, cut and masked one at a time."""
    stream = prepared.corpus.split("validation")
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype(np.int64))
    windows = MaskedWindows(length, prepared.tokenizer, MASKING, stream.eval_id)
    rows = []
    for index, span in enumerate(tokens.split(length - 2)):
        batch = windows.batch(span[None], [(0, index)])
        assert batch.kinds is not None
        rows.append((batch.tokens[0].tolist(), batch.targets[0].tolist(), batch.kinds[0].tolist()))
    return rows


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens_computed_by_hand(prepared: Prepared, score: Score) -> None:
    log_p, nats, right = table().double().log_softmax(dim=-1), [], {1: [], 2: [], 3: []}  # type: ignore[var-annotated]
    ranks = []
    for read, targets, kinds in by_hand(prepared, 16):
        for token, target, kind in zip(read, targets, kinds, strict=True):
            if target != IGNORED:
                nats.append(-log_p[token, target].item())
                ranks.append(int((log_p[token] > log_p[token, target]).sum()))
                right[kind].append(ranks[-1] == 0)
    result = score(TableEncoder(table()))
    assert result.n_targets == len(nats) > 20
    assert result.loss == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.loss)) and result.perplexity_unit == "masked token"
    for k, value in ((1, result.accuracy), (5, result.top5_accuracy), (10, result.top10_accuracy)):
        assert value == pytest.approx(sum(rank < k for rank in ranks) / len(ranks))
    for kind, name in ((1, "mask"), (2, "random"), (3, "kept")):
        assert right[kind] and getattr(result, f"{name}_accuracy") == pytest.approx(np.mean(right[kind]))


def test_bits_per_byte_are_none_and_the_protocol_says_why_numbers_do_not_compare(score: Score) -> None:
    result = score(TableEncoder(table()))
    assert (result.bpb, result.bpb_all, result.n_bytes, result.protocol) == (None, None, None, "masked")
    assert {"mask_id", "mask_accuracy", "random_accuracy", "kept_accuracy"} <= set(result.as_dict())


def test_a_causal_result_has_no_mask_keys(prepared: Prepared) -> None:
    model, stream = tiny_bitnet(vocab_size=V), prepared.corpus.split("validation")
    result = evaluate(model, stream, prepared.tokenizer, 16)
    assert result.mask_id is None and not [name for name in result.as_dict() if "mask" in name or "kept" in name]


def test_a_uniform_model_is_at_the_logarithm_of_the_vocabulary(prepared: Prepared, score: Score) -> None:
    result = score(TableEncoder(torch.zeros(V, V)))
    assert result.loss == pytest.approx(math.log(V), abs=1e-6)
    beside = masked_baselines(prepared.corpus.split("validation"), None, prepared.tokenizer, 16, MASKING)
    assert beside["uniform_loss"] == pytest.approx(math.log(V)) and beside["unigram_loss"] is None


def test_e01_the_batch_size_does_not_change_the_result(score: Score) -> None:
    results = [score(TableEncoder(table(), context=0.7), 9, batch_size) for batch_size in (1, 2, 3, 100)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, abs=1e-7)
        assert result.accuracy == results[0].accuracy and result.n_targets == results[0].n_targets
        assert (result.eval_id, result.mask_id) == (results[0].eval_id, results[0].mask_id)


def test_no_window_holds_padding_and_logits_are_asked_for_only_where_scored(prepared: Prepared, score: Score) -> None:
    model = TableEncoder(table())
    result = score(model, 16, batch_size=4)
    tokens = len(prepared.corpus.split("validation"))
    assert tokens % 14
    assert sum(rows * (length - 2) for (rows, length), _, _ in model.passes) == tokens
    assert model.passes[-1][0] == (1, tokens % 14 + 2)
    assert sum(scored for _, scored, _ in model.passes) == result.n_targets
    assert not any(training for _, _, training in model.passes)


def test_m16_the_mask_is_the_same_for_every_model_and_differs_by_text_window_and_shares(score: Score) -> None:
    first = score(TableEncoder(table())).mask_id
    assert score(TableEncoder(table(seed=1))).mask_id == first
    others = [
        score(TableEncoder(table()), 15).mask_id,
        score(TableEncoder(table()), max_tokens=30).mask_id,
        score(TableEncoder(table()), masking=MASKING.model_copy(update={"whole_word": True})).mask_id,
        score(TableEncoder(table()), masking=MASKING.model_copy(update={"mask_share": 0.7})).mask_id,
    ]
    assert len({first, *others}) == 5


def test_m16_masks_are_equal_in_two_processes(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import random, torch, test_masked as t\nfrom pathlib import Path\n"
        "random.seed(); torch.seed()\n"
        "folder = Path(sys.argv[2]); t.wordpiece(folder / 'tokenizer')\n"
        "p = t.tiny_corpus(folder, tokenizer=t.TokenizerSettings(name=str(folder / 'tokenizer')))\n"
        "r = t.evaluate(t.TableEncoder(t.table()), p.corpus.split('validation'), p.tokenizer, 16, masking=t.MASKING)\n"
        "print(r.mask_id, r.loss, r.eval_id)\n"
    )
    assert len(printed_under_two_hash_seeds(code, str(Path(__file__).parent), str(tmp_path))) == 1


def test_an_encoder_without_masking_and_a_causal_model_with_it_are_mistakes_of_the_caller(score: Score) -> None:
    with pytest.raises(ValueError, match="hidden tokens"):
        score(TableEncoder(table()), masking=None)
    with pytest.raises(ValueError, match="hidden tokens"):
        score(tiny_bitnet(vocab_size=V))


def test_the_mode_is_put_back_and_a_foreign_tokenizer_refused(score: Score) -> None:
    model = TableEncoder(table()).train()
    score(model)
    assert model.training
    with pytest.raises(TokenizerError, match=f"has {V} ids, the model knows 50"):
        score(TableEncoder(table(50)))


def test_text_of_unknown_tokens_alone_is_refused(tmp_path: Path) -> None:
    wordpiece(tmp_path / "t")
    made = tiny_corpus(tmp_path, validation=["🙂 🙂"], tokenizer=TokenizerSettings(name=str(tmp_path / "t")))
    with pytest.raises(DataError, match="only special tokens"):
        evaluate(TableEncoder(table()), made.corpus.split("validation"), made.tokenizer, 16, masking=MASKING)  # type: ignore[arg-type]


def test_the_unigram_baseline_is_that_of_counts_on_the_same_hidden_tokens(prepared: Prepared) -> None:
    stream, train = prepared.corpus.split("validation"), prepared.corpus.split("train")
    counts = token_counts(train, V)
    smoothed = [0.0] * len(SPECIAL) + [count + 1.0 for count in counts.tolist()[len(SPECIAL) :]]
    likeliest = smoothed.index(max(smoothed))
    targets = [t for _, row, _ in by_hand(prepared, 16) for t in row if t != IGNORED]
    nats = [-math.log(smoothed[target] / sum(smoothed)) for target in targets]
    beside = masked_baselines(stream, counts, prepared.tokenizer, 16, MASKING)
    assert beside["unigram_loss"] == pytest.approx(sum(nats) / len(nats))
    assert beside["unigram_accuracy"] == pytest.approx(targets.count(likeliest) / len(targets))
    assert beside["uniform_accuracy"] == pytest.approx(1 / V)


def test_a_model_of_token_frequencies_scores_as_the_unigram_baseline(prepared: Prepared, score: Score) -> None:
    counts = token_counts(prepared.corpus.split("train"), V)
    logits = torch.from_numpy(np.log(counts + 1.0)).float()
    logits[: len(SPECIAL)] = -1e4
    result = score(TableEncoder(logits.repeat(V, 1)))
    beside = masked_baselines(prepared.corpus.split("validation"), counts, prepared.tokenizer, 16, MASKING)
    assert result.loss == pytest.approx(beside["unigram_loss"], rel=1e-5)
    assert result.accuracy == beside["unigram_accuracy"]


def test_pseudo_likelihood_masks_every_token_once_in_its_document(prepared: Prepared) -> None:
    model, stream = TableEncoder(table()), prepared.corpus.split("validation")
    encoded = [prepared.tokenizer.encode(text) for text in DOCUMENTS]
    log_p = table().double().log_softmax(dim=-1)[MASK]
    for count in (1, 3, 999):
        targets = [index for ids in encoded[:count] for index in ids if index != UNK]
        found = pseudo_likelihood(model, stream, prepared.tokenizer, 16, count, batch_size=5)  # type: ignore[arg-type]
        assert (found.pll_tokens, found.pll_documents) == (len(targets), min(count, len(DOCUMENTS)))
        assert found.pll == pytest.approx(-sum(log_p[t].item() for t in targets) / len(targets), rel=1e-6)
    raw = len(VALIDATION[0].encode())
    first = pseudo_likelihood(model, stream, prepared.tokenizer, 16, 1)  # type: ignore[arg-type]
    assert first.pll_per_byte == pytest.approx(first.pll * first.pll_tokens / (math.log(2) * raw))
    assert pseudo_likelihood(model, stream, prepared.tokenizer, 16, 3).pll_per_byte is None  # type: ignore[arg-type]


def test_pseudo_likelihood_cuts_long_documents_and_hides_one_token_at_a_time(prepared: Prepared) -> None:
    class Watching(TableEncoder):
        def forward(self, tokens: torch.Tensor, scored: torch.Tensor | None = None) -> Any:
            assert tokens.shape[1] <= 9 and ((tokens == MASK).sum(dim=1) == 1).all()
            assert scored is not None and torch.equal(scored, tokens == MASK)
            return super().forward(tokens, scored)

    found = pseudo_likelihood(Watching(table()), prepared.corpus.split("validation"), prepared.tokenizer, 9, 3)  # type: ignore[arg-type]
    assert found.pll_tokens > 30


def test_masking_is_that_of_training() -> None:
    encoder: Any = TableEncoder(table())
    config = {"objective": {"name": "mlm", "mask_fraction": 0.4, "z_loss": 0.0}}
    assert masking_of(encoder, config) == MaskingSettings(mask_fraction=0.4)
    assert masking_of(encoder, {}) == MaskingSettings()
    assert masking_of(tiny_bitnet(), config) is None
    with pytest.raises(SettingsError, match=r"objective\.mask_fraction"):
        masking_of(encoder, {"objective": {"mask_fraction": 2}})


def test_samples_of_an_encoder_are_filled_gaps(prepared: Prepared) -> None:
    settings = EvaluationSettings(prompts=("The [MASK] fox <mask>.", "no gap"), sample_modes=("greedy", "typical"))
    rows = sample_modes(TableEncoder(table()), prepared.tokenizer, settings, seed=1)  # type: ignore[arg-type]
    assert [(row["mode"], row["prompt"]) for row in rows] == [("fill", "The [MASK] fox <mask>.")]
    assert "[MASK]" not in rows[0]["generated_text"] and rows[0]["generated_text"].startswith("The")
    assert [len(mask) for mask in rows[0]["top5"]] == [5, 5] and rows[0]["mean_entropy"] > 0
