"""The folder of token blocks: whatever operation of the file system fails, the next opening goes on from there."""

from pathlib import Path

import numpy as np
import pytest

from builders import Fault
from ternlm.data.blocks import Block, BlockStore, digest
from ternlm.data.reader import Position
from ternlm.errors import DataError

SIZE = 37
DTYPE = np.dtype("<u2")


def tokens_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 60_000, SIZE).astype(DTYPE)


def block_of(number: int) -> Block:
    return Block(Position(0, 1, number), Position(0, 1, number + 1, 4), 3, 20, 55, digest(tokens_of(number)))


def fill(folder: Path, count: int) -> None:
    """Go on until there are `count` blocks, all on disk."""
    store = BlockStore(folder, SIZE, DTYPE)
    try:
        for number in range(count):
            if number == len(store.made):
                store.add(tokens_of(number), block_of(number))
            elif number not in store.present:
                store.restore(number, tokens_of(number))
    finally:
        store.close()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("sticks", [False, True])
def test_a_failure_of_any_file_operation_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sticks: bool
) -> None:
    fill(tmp_path / "whole", 3)
    n, met = 0, True
    while met:
        n += 1
        folder = tmp_path / str(n)
        with monkeypatch.context() as patch:
            fault = Fault(patch.setattr, n, sticks)
            try:
                fill(folder, 3)
            except OSError:
                assert fault.met
        met = fault.met
        fill(folder, 3)
        assert files(folder) == files(tmp_path / "whole")
    assert n > 15


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_a_torn_index_loses_only_the_torn_lines(tmp_path: Path, cut: int) -> None:
    fill(tmp_path, 4)
    whole = files(tmp_path)
    index = tmp_path / "index.jsonl"
    index.write_bytes(whole["index.jsonl"][:-cut])
    kept = index.read_bytes().count(b"\n")
    store = BlockStore(tmp_path, SIZE, DTYPE)
    assert [block.start.row for block in store.made] == list(range(kept))
    assert store.present == set(range(kept))
    store.close()
    fill(tmp_path, 4)
    assert files(tmp_path) == whole


def test_a_changed_number_in_the_index_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    index = tmp_path / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    for change in (
        ("[0, 1, 3, 4]", "[0, 1, 2, 4]"),
        ('"documents": 3', '"documents": 4'),
        ('"block": 2', '"block": 3'),
    ):
        assert change[0] in lines[2]
        index.write_text("".join([*lines[:2], lines[2].replace(*change), lines[3]]))
        store = BlockStore(tmp_path, SIZE, DTYPE)
        assert len(store.made) == 2
        store.close()


def test_a_block_made_again_must_be_what_it_was(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    store = BlockStore(tmp_path, SIZE, DTYPE)
    store.remove(1)
    assert store.present == {0} and store.read(1) is None
    with pytest.raises(DataError, match=r"block 1 .* differs from what it was"):
        store.restore(1, tokens_of(7))
    assert store.present == {0} and not (tmp_path / "block-000001.bin").exists()
    store.restore(1, tokens_of(1))
    found = store.read(1)
    assert found is not None and found.tolist() == tokens_of(1).tolist()
    store.close()


def test_leftovers_and_blocks_of_another_size_are_cleared_away(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "block-000009.bin").write_bytes(b"x" * SIZE * 2)
    (tmp_path / "block-000002.bin.part").write_bytes(b"x")
    (tmp_path / "block-000001.bin").write_bytes(b"x")
    store = BlockStore(tmp_path, SIZE, DTYPE)
    assert store.present == {0}
    assert sorted(files(tmp_path)) == ["block-000000.bin", "index.jsonl"]
    store.close()
