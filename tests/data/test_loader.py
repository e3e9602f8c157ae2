from pathlib import Path

import numpy as np
import pytest
import torch

from ternlm.data import DataSettings, TokenStream, prepare, shards
from ternlm.data.batch import Batch
from ternlm.data.loader import Loader, evaluation_batches
from ternlm.data.windows import CausalWindows
from ternlm.errors import DataError
from ternlm.tokenizers import ByteTokenizer

BYTE = ByteTokenizer()
T = 13


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenStream:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 333)
    texts = [f"document {i} \x00 " + "ab" * (i % 7) for i in range(120)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    data = DataSettings(source=str(tmp_path / "a.txt"), validation_fraction=0, test_fraction=0)
    return prepare(data, BYTE, tmp_path / "out").split("train")


def loader(stream: TokenStream, sequence_length: int = T, seed: int = 3) -> Loader:
    return Loader(stream, 5, CausalWindows(sequence_length, BYTE.bos_id), seed)


def test_targets_are_the_next_tokens_and_bos_is_never_one(stream: TokenStream) -> None:
    everything = stream.read(0, len(stream)).astype(np.int64)
    made = loader(stream)
    for counter in range(0, 200, 5):
        batch = made.batch(counter)
        assert batch.tokens.shape == batch.targets.shape == (5, T)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        for row, start in enumerate(made.starts(counter)):
            following = everything[start + 1 : start + T + 1].copy()
            following[following == BYTE.bos_id] = -100
            assert np.array_equal(batch.tokens[row].numpy(), everything[start : start + T])
            assert np.array_equal(batch.targets[row].numpy(), following)
        assert batch.num_targets == int((batch.targets != -100).sum())
        assert not (batch.targets == BYTE.bos_id).any()


def test_an_epoch_scores_each_target_at_most_once_and_nearly_all(stream: TokenStream) -> None:
    made = loader(stream)
    for epoch in (0, 1, 2):
        first = epoch * made.windows_per_epoch
        starts = np.array(made.starts(first, made.windows_per_epoch))
        covered = (starts[:, None] + np.arange(1, T + 1)).ravel()
        assert len(set(covered.tolist())) == len(covered) == made.windows_per_epoch * T
        assert len(covered) > len(stream) - 1 - 2 * T


def test_any_counter_gives_the_same_batch_after_a_restart(stream: TokenStream, tmp_path: Path) -> None:
    whole = loader(stream)
    size = whole.windows_per_epoch * 3
    order = whole.starts(0, size)
    for counter in (
        0,
        1,
        7,
        whole.windows_per_epoch - 2,
        whole.windows_per_epoch,
        2 * whole.windows_per_epoch - 1,
    ):
        again = loader(stream)
        assert again.starts(counter) == order[counter : counter + 5]
        assert torch.equal(again.batch(counter).tokens, whole.batch(counter).tokens)


def test_the_order_of_samples_does_not_depend_on_batch_size_or_ranks(stream: TokenStream) -> None:
    made = loader(stream)
    together = made.batch(40, 12)
    split = [made.batch(40 + rank * 4, 4) for rank in range(3)]
    assert torch.equal(together.tokens, torch.cat([batch.tokens for batch in split]))
    assert torch.equal(together.targets, torch.cat([batch.targets for batch in split]))


def test_another_seed_is_another_order(stream: TokenStream) -> None:
    assert loader(stream).starts(0, 50) != loader(stream, seed=4).starts(0, 50)


@pytest.mark.parametrize(("batch_size", "length"), [(1, 7), (3, 13), (4, 64), (2, 100_000)])
def test_evaluation_scores_every_token_once_in_order(stream: TokenStream, batch_size: int, length: int) -> None:
    everything = stream.read(0, len(stream)).astype(np.int64)
    scored = []
    for batch in evaluation_batches(stream, batch_size, CausalWindows(length, BYTE.bos_id)):
        keep = batch.targets != -100
        scored.append(batch.targets[keep].numpy())
        assert batch.tokens.shape[1] == length and len(batch.tokens) <= batch_size
    expected = everything[1:][everything[1:] != BYTE.bos_id]
    assert np.array_equal(np.concatenate(scored), expected)
    assert (expected == BYTE.eos_id).sum() == stream.documents


def test_evaluation_inputs_are_the_tokens_before_their_targets(stream: TokenStream) -> None:
    everything = stream.read(0, len(stream)).astype(np.int64)
    first = next(evaluation_batches(stream, 2, CausalWindows(8, None)))
    assert np.array_equal(first.tokens.reshape(-1).numpy(), everything[:16])
    assert np.array_equal(first.targets.reshape(-1).numpy(), everything[1:17])


def test_nul_bytes_of_the_text_are_scored_and_padding_is_not(stream: TokenStream) -> None:
    batches = list(evaluation_batches(stream, 3, CausalWindows(64, BYTE.bos_id)))
    scored = sum(int((batch.targets == 0).sum()) for batch in batches)
    assert scored == stream.documents
    assert (batches[-1].targets.reshape(-1)[-1] == -100) and batches[-1].tokens.reshape(-1)[-1] == 0


@pytest.mark.parametrize("limit", [1, 12, 13, 14, 100])
def test_max_tokens_limits_the_scored_positions(stream: TokenStream, limit: int) -> None:
    batches = list(evaluation_batches(stream, 2, CausalWindows(T, None), max_tokens=limit))
    assert sum(batch.num_targets for batch in batches) == limit


def test_a_corpus_smaller_than_one_window_says_what_to_lower(stream: TokenStream) -> None:
    with pytest.raises(DataError, match=r"sequence_length=100000 needs 100,001.*lower data\.sequence_length"):
        loader(stream, sequence_length=100_000)


def test_the_largest_window_that_fits_works(stream: TokenStream) -> None:
    made = loader(stream, sequence_length=len(stream) - 1)
    assert made.windows_per_epoch == 1
    assert made.starts(0, 3) == [0, 0, 0]


def test_description_counts_an_epoch(stream: TokenStream) -> None:
    made = loader(stream)
    described = made.describe()
    assert described["tokens_per_epoch"] == described["windows_per_epoch"] * T
    assert described["batches_per_epoch"] == -(-described["windows_per_epoch"] // 5)
    assert made.epoch(made.windows_per_epoch * 3 // 2) == pytest.approx(1.5, abs=0.01)


def test_a_batch_counts_its_targets_and_keeps_the_count_when_moved() -> None:
    batch = Batch.from_windows(torch.tensor([[254, 7, 255, 254, 9]]), bos_id=254)
    assert batch.tokens.tolist() == [[254, 7, 255, 254]]
    assert batch.targets.tolist() == [[7, 255, -100, 9]]
    assert batch.num_targets == batch.to("cpu").num_targets == 3
    assert batch.to("meta").num_targets == 3
