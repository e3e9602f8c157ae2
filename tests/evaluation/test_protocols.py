"""How a text is read when it is scored: in windows, and with the memory carried through each document."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import EchoModel, MemoryStream

from builders import VALIDATION, tiny_bitnet, tiny_corpus, tiny_model
from ternlm.data.batch import IGNORED
from ternlm.errors import SettingsError
from ternlm.evaluation.evaluate import evaluate
from ternlm.evaluation.protocols import readings
from ternlm.models import MODELS, QuantizationMode
from ternlm.tokenizers import ByteTokenizer, TokenizerSettings

BOS, EOS = 254, 255
LN2 = math.log(2)
DOCUMENTS = [*VALIDATION, "A", "The end of it all, with words. " * 5]
EXACT = QuantizationMode(activations="none")


class WithoutMarkers(ByteTokenizer):
    """Bytes with only an end marker, as GPT-2 has, or with none."""

    bos_id = None

    def __init__(self, eos_id: int | None = EOS) -> None:
        self.eos_id = eos_id  # type: ignore[assignment]


def score(model: Any, stream: Any, length: int = 7, batch_size: int = 3, **options: Any) -> Any:
    tokenizer = options.pop("tokenizer", ByteTokenizer())
    return evaluate(model, stream, tokenizer, length, batch_size, protocol=options.pop("protocol", "stream"), **options)


@torch.no_grad()
def by_hand(model: Any, documents: list[str], context: tuple[int, ...] = (BOS,)) -> list[list[float]]:
    """Nats of every target of every document, each read on its own in one pass; the last one is EOS."""
    nats = []
    for text in documents:
        ids = torch.tensor([[*context, *text.encode(), EOS]])
        log_p = model(ids[:, :-1]).logits.double().log_softmax(dim=-1)
        nats.append((-log_p.gather(2, ids[:, 1:, None])).flatten().tolist())
    return nats


@pytest.mark.parametrize("length", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_stream_scores_each_document_as_if_read_whole_and_alone(length: int, batch_size: int) -> None:
    model = EchoModel()
    expected = by_hand(model, DOCUMENTS)
    result = score(model, MemoryStream(DOCUMENTS), length, batch_size)
    assert result.n_targets == sum(map(len, expected)) == sum(len(text.encode()) + 1 for text in DOCUMENTS)
    assert result.loss == pytest.approx(sum(map(sum, expected)) / result.n_targets, rel=1e-6)
    text = [sum(row[:-1]) for row in expected]
    assert result.documents.nats == pytest.approx(text, rel=1e-5)
    assert result.bpb == pytest.approx(sum(text) / (LN2 * result.n_bytes), rel=1e-6)
    assert result.protocol == "stream"


def test_the_memory_matters_to_the_model_that_tests_it() -> None:
    model = EchoModel()
    whole, cut = (score(model, MemoryStream(DOCUMENTS), 3, protocol=name).loss for name in ("stream", "block"))
    assert abs(whole - cut) > 0.05


def test_every_target_is_scored_exactly_once_in_both_protocols() -> None:
    stream = MemoryStream(DOCUMENTS)
    expected = sorted((number, byte) for number, text in enumerate(DOCUMENTS) for byte in [*text.encode(), EOS])
    for protocol in ("block", "stream"):
        found = []
        for reading in readings(stream, ByteTokenizer(), 5, 2, len(stream), protocol):  # type: ignore[arg-type]
            scored = reading.batch.targets != IGNORED
            assert reading.documents is not None
            found += zip(reading.documents[scored].tolist(), reading.batch.targets[scored].tolist(), strict=True)
            if reading.lengths is not None:
                outside = torch.arange(scored.shape[1]) >= reading.lengths[:, None]
                assert not scored[outside].any()
        assert sorted(found) == expected


def test_a_context_free_model_scores_the_same_in_both_protocols() -> None:
    class Forgetful(EchoModel):
        def forward(self, tokens: torch.Tensor, state: Any = None, lengths: Any = None) -> Any:
            output = super().forward(tokens.reshape(-1, 1))
            return output._replace(logits=output.logits.view(*tokens.shape, -1), state=state)

    model, stream = Forgetful(), MemoryStream(DOCUMENTS)
    block, streamed = (score(model, stream, 7, protocol=name) for name in ("block", "stream"))
    assert streamed.loss == pytest.approx(block.loss, abs=1e-9)
    assert (streamed.n_targets, streamed.n_bytes) == (block.n_targets, block.n_bytes)
    assert streamed.documents.nats == pytest.approx(block.documents.nats, abs=1e-6)
    assert streamed.accuracy == block.accuracy


def test_a_limit_scores_whole_documents_of_a_stream() -> None:
    model = EchoModel()
    result = score(model, MemoryStream(DOCUMENTS), max_tokens=46)
    expected = by_hand(model, DOCUMENTS[:2])
    assert result.loss == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-6)
    assert len(result.documents.nats) == 2


def test_documents_side_by_side_are_of_similar_length() -> None:
    model, short = EchoModel(), ["ab"] * 10
    score(model, MemoryStream([*short, "x" * 700]), length=10, batch_size=4)
    long = [width for width in model.widths if width == (1, 10)]
    assert len(long) == 70  # nothing waits in rows beside it
    assert [width for width in model.widths if width[0] > 1] == [(4, 3), (4, 3), (2, 3)]


def test_without_a_begin_marker_each_document_starts_after_an_end_marker() -> None:
    model, tokenizer = EchoModel(), WithoutMarkers()
    stream = MemoryStream(DOCUMENTS, bos_id=None)
    expected = by_hand(model, DOCUMENTS, context=(EOS,))
    result = score(model, stream, tokenizer=tokenizer)
    assert result.loss == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-6)
    assert result.n_bytes == stream.bytes
    assert score(model, stream, tokenizer=tokenizer, protocol="block").n_targets == result.n_targets - 1


def test_d11_whole_documents_are_counted_where_tokens_do_not_tell_their_bytes() -> None:
    tokenizer = WithoutMarkers()
    tokenizer.lossless = False
    stream = MemoryStream(DOCUMENTS, bos_id=None)
    counted = {
        name: score(EchoModel(), stream, tokenizer=tokenizer, protocol=name).n_bytes for name in ("block", "stream")
    }
    assert counted == {"block": stream.bytes - 1, "stream": stream.bytes}  # a block gives the first token as context


def test_without_any_marker_a_stream_is_refused() -> None:
    with pytest.raises(SettingsError, match="neither BOS nor EOS"):
        score(EchoModel(), MemoryStream(DOCUMENTS, None, None), tokenizer=WithoutMarkers(None))


def test_attention_streams_documents_that_it_can_hold_and_refuses_others(tmp_path: Path) -> None:
    model = tiny_bitnet(vocab_size=256, mode=EXACT, max_position_embeddings=48, initializer_range=0.3)
    stream = tiny_corpus(tmp_path / "a").corpus.split("validation")
    expected = by_hand(model, VALIDATION)
    for length in (5, 16, 48):
        result = score(model, stream, length)
        assert result.loss == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-5)
    longer = tiny_corpus(tmp_path / "b", validation=["A", "a" * 48]).corpus.split("validation")
    with pytest.raises(SettingsError, match=r"the longest has 49 tokens and a 'bitnet' model of .*=48"):
        score(model, longer, 5)
    assert score(model, longer, 5, max_tokens=4).n_targets == 2


@pytest.mark.parametrize("family", [name for name, family in MODELS.items() if family.model.is_recurrent])
@pytest.mark.parametrize("length", [3, 16])
def test_h11_a_recurrent_family_streams_as_it_reads_whole_documents(tmp_path: Path, length: int, family: str) -> None:
    model = tiny_model(family, vocab_size=256, mode=EXACT)
    stream = tiny_corpus(tmp_path, validation=DOCUMENTS).corpus.split("validation")
    expected = by_hand(model.eval(), DOCUMENTS)
    result = score(model, stream, length, batch_size=4)
    assert result.documents.nats == pytest.approx([sum(row[:-1]) for row in expected], rel=1e-4)
    assert result.loss == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-5)


def test_an_encoder_has_no_memory_to_stream_with(tmp_path: Path) -> None:
    from ternlm.data.masking import MaskingSettings

    model = tiny_model("qdyt", vocab_size=256)
    stream = tiny_corpus(tmp_path).corpus.split("validation")
    with pytest.raises(SettingsError, match="an encoder \\('qdyt'\\) has none"):
        score(model, stream, masking=MaskingSettings())


def test_scores_of_documents_sum_to_the_whole_and_name_the_same_text_for_every_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    results = []
    for name, settings in (("byte", {}), ("bpe", {"name": "train", "vocab_size": 300})):
        prepared = tiny_corpus(tmp_path / name, tokenizer=TokenizerSettings(**settings))  # type: ignore[arg-type]
        model: Any = EchoModel(prepared.tokenizer.vocab_size)
        results.append(evaluate(model, prepared.corpus.split("validation"), prepared.tokenizer, 6))
    for result in results:
        assert result.documents is not None
        assert result.bpb is not None
        assert result.documents.nats.sum() == pytest.approx(result.bpb * LN2 * (result.n_bytes or 0))
        assert result.documents.bytes.tolist() == [len(text.encode()) for text in VALIDATION]
        assert "documents" not in result.as_dict()
    first, second = (result.documents.text_id for result in results if result.documents is not None)
    assert first == second
    assert results[0].eval_id != results[1].eval_id


def test_pairs_of_windows_belong_to_the_document_of_their_target() -> None:
    stream = MemoryStream(DOCUMENTS)
    owners = [reading.documents for reading in readings(stream, ByteTokenizer(), 4, 3, len(stream))]  # type: ignore[arg-type]
    places = torch.cat([each.flatten() for each in owners if each is not None])[: len(stream) - 1]
    expected = [number for number, text in enumerate(DOCUMENTS) for _ in range(len(text.encode()) + 2)]
    assert places.tolist() == expected[1:]
    assert all(later >= earlier for earlier, later in pairwise(places.tolist()))
