"""Windows that overlap: which targets they score, from which context, and against a count by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import EchoModel, MemoryStream

from builders import VALIDATION, tiny_bitnet, tiny_corpus, tiny_model
from ternlm.data.batch import IGNORED
from ternlm.errors import SettingsError
from ternlm.evaluation.evaluate import evaluate
from ternlm.evaluation.sliding import sliding_readings, sliding_windows
from ternlm.models import QuantizationMode
from ternlm.tokenizers import ByteTokenizer

BOS, EOS = 254, 255
DOCUMENTS = [*VALIDATION, "A", "The end of it all, with words. " * 5]
EXACT = QuantizationMode(activations="none")
MARKERS = [(BOS, EOS), (None, EOS), (BOS, None)]


class Marked(ByteTokenizer):
    """Bytes with the markers that a test wants."""

    def __init__(self, bos_id: int | None, eos_id: int | None) -> None:
        self.bos_id, self.eos_id = bos_id, eos_id  # type: ignore[assignment]


def score(model: Any, width: int, stride: int, markers: Any = (BOS, EOS), batch_size: int = 3, **options: Any) -> Any:
    stream: Any = MemoryStream(DOCUMENTS, *markers)
    return evaluate(model, stream, Marked(*markers), width, batch_size, stride=stride, **options)


@torch.no_grad()
def by_hand(model: Any, width: int, stride: int, markers: Any) -> list[list[float]]:
    """Nats of every target of every document, each from a pass of its own; the last one is EOS if there is one."""
    start = markers[1] if markers[0] is None else markers[0]
    nats = []
    for text in DOCUMENTS:
        ids = [start, *text.encode(), *([] if markers[1] is None else [EOS])]
        length, row = len(text.encode()), []
        for place in range(1, len(ids)):
            stop = place
            if place <= length:
                stop = min(width, length)
                while stop < place:
                    stop = min(stop + stride, length)
            first = max(0, stop - width)
            log_p = model(torch.tensor([ids[first:place]])).logits[0, -1].double().log_softmax(dim=-1)
            row.append(-log_p[ids[place]].item())
        nats.append(row)
    return nats


@pytest.mark.parametrize(("length", "width", "stride"), [(1, 7, 3), (7, 7, 3), (8, 7, 3), (20, 7, 7), (23, 7, 1)])
def test_windows_score_every_target_once_and_end_with_the_text(length: int, width: int, stride: int) -> None:
    windows = list(sliding_windows(length, width, stride))
    scored = [place for window in windows for place in range(window.stop - window.scored, window.stop)]
    assert scored == list(range(length))
    assert windows[0].start == 0 and windows[0].scored == min(width, length)
    assert windows[-1].stop == length
    assert all(window.stop - window.start == width for window in windows[1:])
    assert all(window.scored == stride for window in windows[1:-1])


def test_a_text_of_nothing_has_no_windows() -> None:
    assert list(sliding_windows(0, 7, 3)) == []


@pytest.mark.parametrize("markers", MARKERS)
@pytest.mark.parametrize(("width", "stride"), [(1, 1), (7, 1), (7, 3), (16, 16), (1000, 5)])
def test_each_target_is_predicted_from_the_context_that_its_window_gives(width: int, stride: int, markers: Any) -> None:
    model = EchoModel()
    expected = by_hand(model, width, stride, markers)
    result = score(model, width, stride, markers)
    assert result.n_targets == sum(map(len, expected))
    assert result.loss == pytest.approx(sum(map(sum, expected)) / result.n_targets, rel=1e-6)
    text = [sum(row[: len(text.encode())]) for row, text in zip(expected, DOCUMENTS, strict=True)]
    assert result.documents.nats == pytest.approx(text, rel=1e-5)
    assert result.bpb == pytest.approx(sum(text) / (math.log(2) * result.n_bytes), rel=1e-6)
    assert result.n_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert result.protocol == f"sliding:{stride}" and result.sequence_length == width


@pytest.mark.parametrize("family", ["bitnet", "hgrn", "hnet"])
def test_real_models_agree_with_a_pass_per_target(family: str) -> None:
    model = tiny_model(family, vocab_size=256, mode=EXACT).eval()
    expected = by_hand(model, 11, 4, (BOS, EOS))
    result = score(model, 11, 4)
    assert result.loss == pytest.approx(sum(map(sum, expected)) / sum(map(len, expected)), rel=1e-5)


def test_the_end_marker_does_not_move_the_windows_of_the_text() -> None:
    with_end, without = (score(EchoModel(), 16, 16, markers) for markers in ((BOS, EOS), (BOS, None)))
    assert with_end.documents.nats == pytest.approx(without.documents.nats, rel=1e-7)
    assert with_end.n_targets == without.n_targets + len(DOCUMENTS)


def test_every_target_is_read_once_and_belongs_to_its_document() -> None:
    stream: Any = MemoryStream(DOCUMENTS)
    found = []
    for reading in sliding_readings(stream, ByteTokenizer(), 5, 2, len(stream), 3):
        scored = reading.batch.targets != IGNORED
        assert reading.documents is not None
        found += zip(reading.documents[scored].tolist(), reading.batch.targets[scored].tolist(), strict=True)
    expected = [(number, byte) for number, text in enumerate(DOCUMENTS) for byte in [*text.encode(), EOS]]
    assert sorted(found) == sorted(expected)


def test_e01_the_batch_size_changes_nothing_but_the_order_of_float_sums() -> None:
    results = [score(EchoModel(), 7, 3, batch_size=size) for size in (1, 4, 100)]
    assert all(result.loss == pytest.approx(results[0].loss, abs=1e-7) for result in results)
    assert len({result.accuracy for result in results}) == 1


def test_documents_that_fit_into_a_window_cost_what_a_stream_says() -> None:
    model = EchoModel()
    stream: Any = MemoryStream(DOCUMENTS)
    streamed = evaluate(model, stream, ByteTokenizer(), 9, protocol="stream")
    assert score(model, 500, 77).loss == pytest.approx(streamed.loss, rel=1e-6)
    assert abs(score(model, 3, 3).loss - streamed.loss) > 0.01  # the context matters to this model


def test_a_limit_scores_whole_documents() -> None:
    result = score(EchoModel(), 7, 3, max_tokens=46)
    assert len(result.documents.nats) == 2
    assert result.documents.nats == pytest.approx(score(EchoModel(), 7, 3).documents.nats[:2], rel=1e-6)


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path: Path) -> None:
    from ternlm.data.masking import MaskingSettings

    with pytest.raises(SettingsError, match=r"a stride of 8 does not fit windows of 7 tokens.*Give 1 to 7"):
        score(EchoModel(), 7, 8)
    with pytest.raises(SettingsError, match="Leave one of them out"):
        score(EchoModel(), 7, 3, protocol="stream")
    with pytest.raises(SettingsError, match="neither BOS nor EOS"):
        score(EchoModel(), 7, 3, (None, None))
    stream = tiny_corpus(tmp_path).corpus.split("validation")
    with pytest.raises(SettingsError, match=r"an encoder \('qdyt'\).*Leave --stride out"):
        evaluate(tiny_model("qdyt", vocab_size=256), stream, ByteTokenizer(), 7, masking=MaskingSettings(), stride=3)


def test_e05_the_model_is_left_as_it_was() -> None:
    model = tiny_bitnet(vocab_size=256)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, 11, 5)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
