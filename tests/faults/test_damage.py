"""Files that changed after they were written: every flipped bit and every cut is noticed, and the file is named."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
from harness import Row
from scenes import SCENES, contents, files_of, is_intact, place

from ternlm import checkpoint
from ternlm.data.corpus import load_corpus
from ternlm.errors import CheckpointError, DataError

pytestmark = pytest.mark.faults

FLIPS, CUTS, SEED = 3000, 500, 4


@pytest.fixture
def root(folder: Path) -> Path:
    """Checkpoints of steps 7 and 8; the newer one is to be damaged."""
    for step in (7, 8):
        checkpoint.save(folder / "checkpoints", step, contents(step))
    return folder / "checkpoints"


@pytest.fixture
def corpus(folder: Path) -> Path:
    """A prepared corpus."""
    place(folder)
    SCENES["prepare"].act(folder)
    return folder / "corpus"


def test_damage_to_a_checkpoint(root: Path, row: Row) -> None:
    """Each is refused by name, and the checkpoint before is used instead."""

    def is_noticed(name: str) -> bool:
        said: list[str] = []
        with pytest.raises(CheckpointError):
            checkpoint.verify(root / "step_000008")
        found = checkpoint.newest_valid(root, said.append)
        return found.name == "step_000007" and len(said) == 1 and name in said[0] and "\n" not in said[0]

    damage_everything(row, root / "step_000008", is_noticed)
    assert is_intact(root, 7)
    assert is_intact(root, 8)
    silent = sum(map(loads_without_a_checksum, flips_of(root / "step_000008" / "model.safetensors", 200)))
    assert silent > 100, "without a checksum most flips go unnoticed; if not, this test shows nothing"
    row.controls = f"1 of 1 (safetensors alone takes {silent} of 200)"


def test_damage_to_a_prepared_corpus(corpus: Path, row: Row) -> None:
    """Each is refused by `load_corpus(verify=True)`."""

    def is_noticed(name: str) -> bool:
        with pytest.raises(DataError) as caught:
            load_corpus(corpus, verify=True)
        return name in str(caught.value) and "\n" not in str(caught.value)

    damage_everything(row, corpus, is_noticed)
    load_corpus(corpus, verify=True)
    name, silent = corpus / "train" / "shard-00000.bin", 0
    whole = name.read_bytes()
    for content in flips_of(name, 50):
        name.write_bytes(content)
        silent += load_corpus(corpus).split("train") is not None
    name.write_bytes(whole)
    assert silent == 50
    row.controls = f"1 of 1 (sizes alone take {silent} of 50)"


def damage_everything(row: Row, folder: Path, is_noticed: Callable[[str], bool]) -> None:
    """Flip bits and cut lengths all over a folder, one at a time, and count what is noticed."""
    draw, names = random.Random(SEED), [name for name in files_of(folder) if (folder / name).stat().st_size]
    sizes = [(folder / name).stat().st_size for name in names]
    for trial in range(FLIPS + CUTS):
        # half of the trials by size, half by file, so that small files have their share
        name = draw.choices(names, sizes)[0] if trial % 2 else draw.choice(names)
        whole = (folder / name).read_bytes()
        damaged = flipped(whole, draw) if trial < FLIPS else whole[: draw.randrange(len(whole))]
        (folder / name).write_bytes(damaged)
        assert is_noticed(Path(name).name), f"seed {SEED}, trial {trial}: damage to {name} was not noticed"
        (folder / name).write_bytes(whole)
    row.trials, row.injected = FLIPS + CUTS, f"{FLIPS} flipped bits, {CUTS} cuts, in {len(names)} files"
    row.result = f"{FLIPS + CUTS} of {FLIPS + CUTS} noticed and named"


def flipped(content: bytes, draw: random.Random) -> bytes:
    """The content with one bit inverted."""
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flips_of(file: Path, count: int) -> list[bytes]:
    draw, whole = random.Random(SEED), file.read_bytes()
    return [flipped(whole, draw) for _ in range(count)]


def loads_without_a_checksum(content: bytes) -> bool:
    try:
        return safetensors.torch.load(content).keys() == contents(8).model.keys()
    except safetensors.SafetensorError:
        return False
