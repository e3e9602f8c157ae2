"""The endless sequence of training tokens, entered anywhere, and the thread that cuts it into blocks."""

import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from streams import BYTE, some_files, training_tokens
from ternlm.data.blocks import BlockStore
from ternlm.data.producer import Producer
from ternlm.data.reader import DocumentSource, Patience, Position
from ternlm.data.tape import Tape
from ternlm.errors import DataError

FILES = some_files()
TEXTS = [text for rows in FILES for text in rows if text and text.strip()]


def tape_of(texts: list[str], tokenizer=BYTE) -> Tape:
    source = DocumentSource("the texts", lambda: (("train", text) for text in texts))
    return Tape(source, tokenizer, frozenset(), Patience())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ternlm.data.documents.BATCH_CHARACTERS", 300)


@pytest.mark.parametrize("size", [2, 7, 33])
def test_a_block_entered_anywhere_is_the_block_of_the_whole_sequence(size: int) -> None:
    texts = [text[:9] for text in TEXTS[:20]]
    whole = list(islice(tape_of(texts).blocks(Position(), size), 120))
    flat = np.concatenate([whole[0][0], *(tokens[1:] for tokens, _ in whole[1:])])
    assert flat.tolist() == training_tokens([texts], BYTE, len(flat), held_out=0).tolist()
    ends = np.flatnonzero(flat == BYTE.eos_id)
    for number, (tokens, block) in enumerate(whole):
        again, same = next(tape_of(texts).blocks(block.start, size))
        assert again.tolist() == tokens.tolist() and same == block
        first, last = number * (size - 1), (number + 1) * (size - 1)
        assert block.documents == int(((ends > first) & (ends <= last)).sum())
        if number:
            assert block.start == whole[number - 1][1].end
    assert sum(block.bytes for _, block in whole) == sum(
        block.document_tokens - 2 * block.documents for _, block in whole
    )
    assert whole[-1][1].end.epoch >= 1 or size == 2


def test_documents_of_a_single_token_are_counted_once() -> None:
    class NoMarkers(type(BYTE)):
        bos_id = eos_id = None

    whole = list(islice(tape_of(["a", "b", "cd"], NoMarkers()).blocks(Position(), 2), 8))
    assert "".join(chr(tokens[0]) for tokens, _ in whole) == "abcdabcd"
    assert [block.documents for _, block in whole] == [2, 0, 1, 1, 1, 0, 1, 1]
    for tokens, block in whole:
        assert next(tape_of(["a", "b", "cd"], NoMarkers()).blocks(block.start, 2))[1] == block
        assert len(tokens) == 2


def test_a_sequence_that_lost_the_token_says_so() -> None:
    block = list(islice(tape_of(TEXTS).blocks(Position(), 50), 30))[-1][1]
    with pytest.raises(DataError, match="the texts has changed"):
        next(tape_of(["", *TEXTS[: block.start.row]]).blocks(block.start, 50))
    with pytest.raises(DataError, match="the texts has changed"):
        next(tape_of([text[:1] for text in TEXTS]).blocks(block.start, 50))
    with pytest.raises(DataError, match="no training documents"):
        next(tape_of([]).blocks(Position(), 50))


@pytest.mark.parametrize("capacity", [2, 3, 8])
def test_any_order_of_requests_gets_the_right_blocks_within_the_budget(tmp_path: Path, capacity: int) -> None:
    draw = random.Random(capacity)
    expected = [tokens for tokens, _ in islice(tape_of(TEXTS).blocks(Position(), 40), 60)]
    producer = open_producer(tmp_path, capacity)
    number = 0
    for request in range(150):
        found = producer.block(number, lambda complaint: None)
        assert found.tolist() == expected[number].tolist()
        assert len(list(tmp_path.glob("block-*"))) <= capacity
        if request % 9 == 0:
            producer.release(number)
        if request % 40 == 39:
            producer.close()
            producer = open_producer(tmp_path, capacity)
        number = number + 1 if draw.random() < 0.7 else draw.randrange(60)
        number = min(number, 59)
    producer.close()


def open_producer(folder: Path, capacity: int) -> Producer:
    store, patience = BlockStore(folder, 40, np.dtype("<u1")), Patience()
    source = DocumentSource("the texts", lambda: (("train", text) for text in TEXTS))
    producer = Producer(store, Tape(source, BYTE, frozenset(), patience), capacity, patience)
    producer.start()
    return producer


def test_reading_ahead_fills_the_budget_and_goes_on_after_a_release(tmp_path: Path) -> None:
    producer = open_producer(tmp_path, 5)
    for first in (0, 3):
        producer.block(first, lambda complaint: None)
        producer.release(first)
        while producer.store.present != set(range(first, first + 5)):
            time.sleep(0.005)
    producer.close()


def test_an_error_in_the_thread_reaches_the_reader_after_the_blocks_that_are_there(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield from (("train", text) for text in TEXTS[:30])
        raise ZeroDivisionError

    store, patience = BlockStore(tmp_path, 40, np.dtype("<u1")), Patience()
    made = Producer(store, Tape(DocumentSource("it", broken), BYTE, frozenset(), patience), 50, patience)
    made.start()
    made.block(3, lambda complaint: None)
    with pytest.raises(ZeroDivisionError):
        made.block(49, lambda complaint: None)
    assert made.block(0, lambda complaint: None).tolist() == training_tokens([TEXTS], BYTE, 40, held_out=0).tolist()
    made.close()
