from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternlm.errors import SettingsError, TokenizerError
from ternlm.tokenizers import TokenizerSettings, load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat, the cat sat again. " * 5, "naïve café, naïve café! " * 4]
BPE = train_bpe(TEXTS, 300)


def test_trained_bpe_is_lossless_and_its_byte_lengths_sum_to_the_text(any_text: str) -> None:
    ids = BPE.encode(any_text)
    assert BPE.lossless
    assert BPE.decode(ids) == any_text
    assert sum(BPE.token_bytes()[ids]) == BPE.text_bytes(ids) == len(any_text.encode())
    assert not BPE.special_ids() & set(ids)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_text_round_trips_and_streams(text: str) -> None:
    ids = BPE.encode(text)
    stream = BPE.stream()
    assert BPE.decode(ids) == text
    assert "".join([*map(stream.feed, ids), stream.finish()]) == text


def test_training_merges_frequent_words_and_keeps_the_three_specials_first() -> None:
    assert (BPE.bos_id, BPE.eos_id, BPE.pad_id) == (0, 1, 2)
    assert 259 < BPE.vocab_size <= 300
    assert len(BPE.encode(" the cat")) <= 4 < len(BPE.encode(" zzz qqq"))


def test_training_twice_gives_the_same_tokenizer_and_other_text_another() -> None:
    assert train_bpe(TEXTS, 300).fingerprint == BPE.fingerprint
    assert train_bpe(["something else entirely, " * 20], 300).fingerprint != BPE.fingerprint


def test_only_the_sample_is_read() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "a bounded sample of an unbounded stream. "

    first = train_bpe(endless(), 280, sample_bytes=1000)
    assert first.fingerprint == train_bpe(["a bounded sample of an unbounded stream. "] * 30, 280, 1000).fingerprint


def test_saved_folder_loads_with_an_equal_fingerprint_and_equal_ids(tmp_path: Path, multilingual: list[str]) -> None:
    BPE.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == BPE.fingerprint
    assert (loaded.name, loaded.bos_id, loaded.eos_id, loaded.pad_id) == ("bpe", 0, 1, 2)
    assert loaded.encode_batch(multilingual) == BPE.encode_batch(multilingual)


def test_a_folder_changed_after_saving_is_refused(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    train_bpe(TEXTS, 280).save(tmp_path / "other")
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(TokenizerError, match="fingerprint"):
        load_tokenizer(tmp_path)


def test_too_small_a_vocabulary_and_empty_text_are_refused() -> None:
    with pytest.raises(TokenizerError, match="259"):
        train_bpe(TEXTS, 258)
    with pytest.raises(TokenizerError, match="no text"):
        train_bpe([], 300)


def test_settings_take_human_numbers_and_refuse_small_vocabularies() -> None:
    assert TokenizerSettings.from_mapping({"name": "train", "vocab_size": "32k"}).vocab_size == 32000
    with pytest.raises(SettingsError, match="259"):
        TokenizerSettings.from_mapping({"vocab_size": 100}, "tokenizer")
