"""Hidden tokens: how many, which, what is read instead, and that all of it follows from the key of a row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import TRAIN, tiny_corpus
from encoders import CLS, MASK, PIECES, SEP, SPECIAL, UNK, printed_under_two_hash_seeds, wordpiece
from streams import BUFFER, T, close_all, opened, some_files, stream_settings, write_dataset
from ternlm.data.batch import IGNORED, Batch
from ternlm.data.loader import Loader, evaluation_batches
from ternlm.data.masking import MaskingSettings
from ternlm.data.preparation import Prepared
from ternlm.data.sampler import window_start, windows_per_epoch
from ternlm.data.windows import MaskedWindows, build_windows
from ternlm.errors import DataError, SettingsError
from ternlm.tokenizers import ByteTokenizer, Tokenizer, TokenizerSettings, load_tokenizer, train_bpe

V = len(PIECES)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return wordpiece(tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    wordpiece(tmp_path / "tokenizer")
    return tiny_corpus(tmp_path, tokenizer=TokenizerSettings(name=str(tmp_path / "tokenizer")))


def masked(tokenizer: Tokenizer, length: int = 16, seed: int | str = 3, **shares: Any) -> MaskedWindows:
    return MaskedWindows(length, tokenizer, MaskingSettings(**shares), seed)


def content(rows: int, width: int, seed: int = 0, low: int = len(SPECIAL)) -> torch.Tensor:
    return torch.randint(low, V, (rows, width), generator=torch.Generator().manual_seed(seed))


def keys(rows: int, epoch: int = 0, first: int = 0) -> list[tuple[int, int]]:
    return [(epoch, first + row) for row in range(rows)]


def same(first: Batch, second: Batch) -> bool:
    pairs = zip((first.tokens, first.targets, first.kinds), (second.tokens, second.targets, second.kinds), strict=True)
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def test_eighty_ten_ten_within_one_percent(pieces: Tokenizer) -> None:
    spans = content(4000, 126)
    batch = masked(pieces, 128).batch(spans, keys(4000))
    assert batch.kinds is not None
    of_kind = torch.bincount(batch.kinds.flatten().long(), minlength=4).double()
    assert batch.num_targets == 4000 * 18 == of_kind[1:].sum()  # floor(.15 * 126)
    assert torch.allclose(of_kind[1:] / batch.num_targets, torch.tensor([0.8, 0.1, 0.1]).double(), atol=0.01)
    inner = batch.kinds[:, 1:-1]
    assert (batch.tokens[:, 1:-1][inner == 1] == MASK).all()
    assert torch.equal(batch.tokens[:, 1:-1][(inner == 0) | (inner == 3)], spans[(inner == 0) | (inner == 3)])
    drawn = torch.bincount(batch.tokens[:, 1:-1][inner == 2], minlength=V).double()
    assert drawn[: len(SPECIAL)].sum() == 0
    assert drawn[len(SPECIAL) :].min() > 0 and drawn.max() < 2 * drawn.sum() / (V - len(SPECIAL))


def test_targets_are_what_stood_there_and_nothing_else_is_scored(pieces: Tokenizer) -> None:
    spans = content(40, 14)
    batch = masked(pieces).batch(spans, keys(40))
    assert batch.kinds is not None and batch.tokens.shape == batch.targets.shape == batch.kinds.shape == (40, 16)
    assert (batch.tokens[:, 0] == CLS).all() and (batch.tokens[:, -1] == SEP).all()
    assert (batch.targets[:, [0, -1]] == IGNORED).all() and (batch.kinds[:, [0, -1]] == 0).all()
    scored = batch.targets != IGNORED
    assert torch.equal(scored, batch.kinds > 0) and batch.num_targets == int(scored.sum())
    assert torch.equal(batch.targets[:, 1:-1][scored[:, 1:-1]], spans[scored[:, 1:-1]])
    assert batch.num_tokens == 40 * 16


@pytest.mark.parametrize(("width", "fraction", "wanted"), [(1, 0.15, 1), (6, 0.15, 1), (20, 0.15, 3), (100, 0.29, 29),
                                                           (14, 0.99, 13), (10, 1e-6, 1)])  # fmt: skip
def test_the_number_of_hidden_tokens_is_exact(pieces: Tokenizer, width: int, fraction: float, wanted: int) -> None:
    batch = masked(pieces, width + 2, mask_fraction=fraction).batch(content(9, width), keys(9))
    assert ((batch.targets != IGNORED).sum(dim=1) == wanted).all()


def test_specials_are_never_scored_and_do_not_count(pieces: Tokenizer) -> None:
    spans = content(300, 40, low=0)
    spans[:, 7:29] = torch.randint(0, len(SPECIAL), (300, 22), generator=torch.Generator().manual_seed(1))
    spans[5] = UNK
    batch = masked(pieces, 42).batch(spans, keys(300))
    scored = batch.targets != IGNORED
    assert not torch.isin(batch.targets[scored], torch.arange(len(SPECIAL))).any()
    ordinary = (spans >= len(SPECIAL)).sum(dim=1)
    wanted = torch.where(ordinary > 0, (0.15 * ordinary).floor().clamp(min=1), 0.0)
    assert torch.equal(scored.sum(dim=1).double(), wanted.double())
    assert scored[5].sum() == 0


def test_every_position_is_as_likely_as_any_other(pieces: Tokenizer) -> None:
    batch = masked(pieces, 22).batch(content(6000, 20), keys(6000))
    share = (batch.targets != IGNORED).double().mean(dim=0)[1:-1]
    assert (share - 0.15).abs().max() < 5 * (0.15 * 0.85 / 6000) ** 0.5


@pytest.mark.parametrize(("shares", "kind"), [((1, 0), 1), ((0, 1), 2), ((0, 0), 3)])
def test_the_shares_are_those_that_are_asked_for(pieces: Tokenizer, shares: tuple[float, float], kind: int) -> None:
    batch = masked(pieces, mask_share=shares[0], random_share=shares[1]).batch(content(50, 14), keys(50))
    assert batch.kinds is not None and set(batch.kinds.unique().tolist()) == {0, kind}


@pytest.mark.parametrize("values", [{"mask_fraction": 0}, {"mask_fraction": 1}, {"mask_fraction": -0.1},
                                    {"mask_share": 0.95}, {"random_share": -0.1}])  # fmt: skip
def test_shares_that_hide_nothing_or_everything_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=r"hidden and something|must not exceed 1"):
        MaskingSettings.from_mapping(values, "objective")


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_row_is_masked_alike_in_any_batch(pieces: Tokenizer, whole_word: bool) -> None:
    windows, spans = masked(pieces, whole_word=whole_word), content(11, 14)
    together = windows.batch(spans, keys(11, epoch=2, first=5))
    for first, last in ((0, 1), (1, 4), (4, 11)):
        part = windows.batch(spans[first:last], keys(last - first, epoch=2, first=5 + first))
        assert torch.equal(part.tokens, together.tokens[first:last])
        assert torch.equal(part.targets, together.targets[first:last])


def test_epoch_index_and_seed_each_change_the_mask(pieces: Tokenizer) -> None:
    spans = content(1, 14).repeat(9, 1)
    batches = [masked(pieces, seed=seed).batch(spans, keys(9, epoch)) for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    rows = {tuple(row) for batch in batches for row in batch.targets.tolist()}
    assert len(rows) > 20


def test_the_masks_never_change_between_versions(pieces: Tokenizer) -> None:
    batch = masked(pieces).batch(content(1, 14).fill_(7), [(1, 2)])
    assert batch.kinds is not None
    assert [(i, kind) for i, kind in enumerate(batch.kinds[0].tolist()) if kind] == [(5, 1), (14, 1)]


def words_of(tokenizer: Tokenizer, row: list[int]) -> list[list[int]]:
    """Positions of each word, by the text of its pieces."""
    found: list[list[int]] = []
    previous = b""
    for position, token in enumerate(row):
        piece = tokenizer.piece(token)
        if token in tokenizer.special_ids():
            previous = b""
            continue
        if not previous or piece[:1].isspace() or previous[-1:].isspace():
            found.append([])
        found[-1].append(position)
        previous = piece
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_whole_words_are_hidden_whole(pieces: Tokenizer, kind: str) -> None:
    tokenizer = pieces if kind == "wordpiece" else train_bpe(TRAIN, 270, mask_token=True)
    ids = tokenizer.encode(" ".join(f"walking foxes jumped. {text}" for text in TRAIN)[:2000])
    width = 40
    spans = torch.tensor(ids[: len(ids) // width * width]).view(-1, width)
    spans[::3, 11] = tokenizer.eos_id or 0
    batch = masked(tokenizer, width + 2, whole_word=True).batch(spans, keys(len(spans)))
    scored = batch.targets[:, 1:-1] != IGNORED
    longest = 0
    for row, chosen in zip(spans.tolist(), scored, strict=True):
        words = words_of(tokenizer, row)
        hidden = [word for word in words if bool(chosen[word].any())]
        assert all(bool(chosen[word].all()) for word in hidden)
        count, wanted = sum(map(len, hidden)), max(1, int(0.15 * sum(map(len, words))))
        assert count >= wanted and count - max(map(len, hidden)) < wanted
        longest = max(longest, *map(len, hidden))
    assert longest > 2  # words of several pieces were among them


def test_a_piece_that_begins_with_two_hashes_belongs_to_the_word_before_it(pieces: Tokenizer) -> None:
    ids = pieces.encode("walking.")
    assert [PIECES[i] for i in ids] == ["w", "##a", "##l", "##k", "##ing", "."]
    for index in range(30):
        batch = masked(pieces, 8, whole_word=True).batch(torch.tensor([ids]), [(0, index)])
        assert (batch.targets[0] != IGNORED).tolist()[1:-1] in ([True] * 5 + [False], [False] * 5 + [True])


def test_an_epoch_covers_the_stream_and_masks_survive_a_restart(prepared: Prepared) -> None:
    stream = prepared.corpus.split("train")

    def loader() -> Loader:
        return prepared.corpus.loader(5, masked(prepared.tokenizer), 3)  # type: ignore[return-value]

    made = loader()
    assert made.windows_per_epoch == (len(stream) - 13) // 14
    whole = made.batch(0, 3 * made.windows_per_epoch)
    starts = np.array(made.starts(0, made.windows_per_epoch))
    covered = (starts[:, None] + np.arange(14)).ravel()
    assert len(set(covered.tolist())) == len(covered) == 14 * made.windows_per_epoch > len(stream) - 28
    for counter, size in ((0, 1), (3, 5), (made.windows_per_epoch - 2, 5), (2 * made.windows_per_epoch - 1, 3)):
        again = loader().batch(counter, size)
        assert torch.equal(again.tokens, whole.tokens[counter : counter + size])
        assert torch.equal(again.targets, whole.targets[counter : counter + size])


def test_original_text_is_input_and_targets_together(prepared: Prepared) -> None:
    stream = prepared.corpus.split("train")
    made = prepared.corpus.loader(9, masked(prepared.tokenizer), 3)
    batch = made.batch(4)
    restored = torch.where(batch.targets == IGNORED, batch.tokens, batch.targets)[:, 1:-1]
    for row, sample in zip(restored, made.samples(4, 9), strict=True):
        assert row.tolist() == stream.read(sample["start"], sample["start"] + 14).tolist()


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 700), stride=st.integers(1, 60), overlap=st.integers(0, 1), epoch=st.integers(0, 4))
def test_windows_without_overlap_are_disjoint_and_inside_the_stream(
    tokens: int, stride: int, overlap: int, epoch: int
) -> None:
    count = windows_per_epoch(tokens, stride, overlap)
    if tokens < stride + overlap:
        assert count == 0
        return
    starts = np.sort(window_start(5, epoch, np.arange(count), tokens, stride, overlap))
    assert count >= 1 and starts[0] >= 0 and starts[-1] + stride + overlap <= tokens
    assert (np.diff(starts) == stride).all() and tokens - overlap - count * stride < 2 * stride


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("length", [3, 16, 100_000])
def test_evaluation_puts_every_token_into_exactly_one_window(prepared: Prepared, batch_size: int, length: int) -> None:
    stream = prepared.corpus.split("validation")
    batches = list(evaluation_batches(stream, batch_size, masked(prepared.tokenizer, length)))
    restored = [torch.where(b.targets == IGNORED, b.tokens, b.targets)[:, 1:-1].flatten() for b in batches]
    assert torch.cat(restored).tolist() == stream.read(0, len(stream)).tolist()
    left = len(stream) % (length - 2)
    assert batches[-1].tokens.shape == ((1, left + 2) if left else (len(batches[-1].tokens), length))
    assert all(batch.tokens.shape[1] == length for batch in batches[:-1])


def test_m16_evaluation_masks_do_not_depend_on_batches_or_on_how_much_is_scored(prepared: Prepared) -> None:
    stream, windows = prepared.corpus.split("validation"), masked(prepared.tokenizer, 9, seed="id")

    def rows(batch_size: int, limit: int | None = None) -> list[list[int]]:
        return [row for b in evaluation_batches(stream, batch_size, windows, limit) for row in b.tokens.tolist()]

    assert rows(1) == rows(4) == rows(100)
    assert rows(3, 30)[:4] == rows(3)[:4]


def test_a_streams_masks_follow_from_the_absolute_sample(tmp_path: Path) -> None:
    tokenizer = wordpiece(tmp_path / "tokenizer")
    source = write_dataset(tmp_path / "set", some_files())
    data = stream_settings(source, stream_buffer=2 * BUFFER)
    try:
        corpus = opened(data, tmp_path / "run", tokenizer)
        made = corpus.loader(6, masked(tokenizer, T), 5)
        whole = made.batch(0, 90)
        assert made.windows_per_block < 90 and whole.tokens.shape == (90, T)  # several blocks
        cut = [made.batch(first, last - first) for first, last in ((0, 7), (7, 8), (8, 61), (61, 90))]
        assert torch.equal(torch.cat([batch.tokens for batch in cut]), whole.tokens)
        assert torch.equal(torch.cat([batch.targets for batch in cut]), whole.targets)
        restored = torch.where(whole.targets == IGNORED, whole.tokens, whole.targets)[:, 1:-1]
        starts = [sample["start"] for sample in made.samples(0, 90)]
        assert len(set(starts)) == 90
        first = corpus.first_tokens()
        for row, start in zip(restored.tolist(), starts, strict=True):
            if start + T - 2 <= len(first):
                assert row == first[start : start + T - 2]
    finally:
        close_all()


def test_a_tokenizer_without_a_mask_token_is_refused_with_the_way_out() -> None:
    with pytest.raises(SettingsError, match=r"'byte' has no mask token.*bert-base-uncased.*mask_token=true"):
        build_windows(MaskingSettings(), ByteTokenizer(), 16)


def test_a_tokenizer_without_markers_fills_the_window_with_text(tmp_path: Path) -> None:
    class Unmarked(ByteTokenizer):
        bos_id = eos_id = None  # type: ignore[assignment]
        mask_id = 254

    windows = masked(Unmarked(), 9)
    assert (windows.stride, windows.reads) == (9, 9)
    batch = windows.batch(torch.full((2, 9), 65), keys(2))
    assert batch.tokens.shape == (2, 9) and ((batch.targets == 65).sum(dim=1) == 1).all()
    assert [b.tokens.shape[1] for b in windows.consecutive(torch.full((13,), 65), 0)] == [9, 4]


def test_a_window_without_room_for_text_is_refused(pieces: Tokenizer) -> None:
    with pytest.raises(SettingsError, match=r"sequence_length=2 leaves no room.*at least 3"):
        masked(pieces, 2)


def test_a_corpus_smaller_than_one_window_says_what_to_lower(prepared: Prepared) -> None:
    length = len(prepared.corpus.split("train")) + 3
    with pytest.raises(DataError, match=f"sequence_length={length} needs {length - 2:,}.*{length - 1} or less"):
        prepared.corpus.loader(1, masked(prepared.tokenizer, length), 0)
    prepared.corpus.loader(1, masked(prepared.tokenizer, length - 1), 0)


def test_a_trained_tokenizer_gets_a_mask_token_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    plain, marked = (
        tiny_corpus(tmp_path / str(m), tokenizer=TokenizerSettings(name="train", vocab_size=300, mask_token=m))
        for m in (False, True)
    )
    assert plain.tokenizer.mask_id is None and marked.tokenizer.mask_id == 3
    assert marked.tokenizer.encode("<|mask|>") != [3] and marked.tokenizer.lossless
    marked.tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").mask_id == 3
    again = tiny_corpus(tmp_path / "True", tokenizer=TokenizerSettings(name="train", vocab_size=300, mask_token=True))
    assert again.tokenizer.fingerprint == marked.tokenizer.fingerprint


def test_masks_are_equal_in_two_processes(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_masking as t\nfrom pathlib import Path\n"
        "batch = t.masked(t.wordpiece(Path(sys.argv[2])), seed='abc', whole_word=True)"
        ".batch(t.content(7, 14), t.keys(7, 1))\n"
        "print(batch.tokens.tolist(), batch.targets.tolist())\n"
    )
    assert len(printed_under_two_hash_seeds(code, str(Path(__file__).parent), str(tmp_path))) == 1


def test_the_tokenizer_of_bert_hides_whole_words_and_no_specials(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased")
    ids = tokenizer.encode("Antidisestablishmentarianism and hyperparameterization are unforgivably long words. " * 60)
    spans = torch.tensor(ids[:1260]).view(10, 126)
    spans[:, 60:62] = torch.tensor([102, 101])
    plain, whole = (masked(tokenizer, 128, whole_word=w).batch(spans, keys(10)) for w in (False, True))
    assert plain.num_targets == 10 * 18 and plain.tokens.shape == (10, 128)
    assert (plain.tokens[:, 0] == 101).all() and (plain.tokens[:, -1] == 102).all()
    for batch in (plain, whole):
        assert not torch.isin(batch.targets, torch.tensor([0, 100, 101, 102, 103])).any()
    for row, chosen in zip(spans.tolist(), whole.targets[:, 1:-1] != IGNORED, strict=True):
        assert all(int(chosen[word].sum()) in (0, len(word)) for word in words_of(tokenizer, row))
