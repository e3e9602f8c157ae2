"""Checkpoint folders made to do harm, and damage of one bit: a typed error that names the file, and never a wait.

The manifests of hostile folders fit their files and carry a fitting sha256, as those of an attacker would.
"""

import json
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from builders import tiny_bitnet
from ternlm import checkpoint
from ternlm.checkpoint.manifest import seal
from ternlm.errors import CheckpointError
from test_checkpoint import FILES, contents, describe, replace, write_manifest

MANIFEST, MODEL, STATE = "manifest.json", "model.safetensors", "trainer_state.json"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    for step in (3, 7):
        model = tiny_bitnet(vocab_size=256, num_hidden_layers=1, hidden_size=8, intermediate_size=8)
        checkpoint.save(root, step, contents(model=model, state={"run_id": "demo-1", "seed": step}))
    return root


@pytest.fixture
def root(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair, tmp_path / "checkpoints"))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for something is ended after half a minute."""

    def give_up(number: int, frame: Any) -> None:
        pytest.fail("it hangs")  # no Exception, so nothing takes it for an error of the disk

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_thousand_flipped_bits_are_noticed_with_the_file_and_the_previous_checkpoint_is_used(root: Path) -> None:
    newest, draw = root / "step_000007", random.Random(8)
    whole = {name: (newest / name).read_bytes() for name in [*FILES, MANIFEST]}
    by_size = draw.choices(list(whole), [len(content) for content in whole.values()], k=500)
    evenly = [name for name in whole for _ in range(-(-500 // len(whole)))]
    for name in by_size + evenly:
        damaged = bytearray(whole[name])
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(damaged)
        said: list[str] = []
        assert checkpoint.newest_valid(root, said.append).name == "step_000003"
        assert len(said) == 1
        assert name in said[0]
        (newest / name).write_bytes(whole[name])
    assert len(by_size + evenly) >= 1000
    assert checkpoint.newest_valid(root) == newest


def test_every_single_bit_of_a_manifest_counts(root: Path) -> None:
    path = root / "step_000007"
    whole = (path / MANIFEST).read_bytes()
    for place in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (path / MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoint.verify(path)


# Hostile folders

Make = Callable[[Path], Any]


def manifest_bytes(content: bytes) -> Make:
    return lambda path: (path / MANIFEST).write_bytes(content)


def manifest_text(old: str, new: str) -> Make:
    """Edit the text of the manifest, whose sha256 fits what a lenient reader would make of it."""

    def make(path: Path) -> None:
        text = (path / MANIFEST).read_text()
        assert old in text
        text = text.replace(old, new, 1)
        with suppress(ValueError):
            lenient = json.loads(text)
            text = text.replace(lenient["sha256"], seal(lenient))
        (path / MANIFEST).write_text(text)

    return make


def manifest_with(**fields: Any) -> Make:
    return lambda path: write_manifest(path, json.loads((path / MANIFEST).read_bytes()) | fields)


def listed(name: str, **entry: Any) -> Make:
    """One more file in the manifest."""

    def make(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_bytes())
        manifest["files"][name] = describe() | entry
        write_manifest(path, manifest)

    return make


def content_of(name: str, content: bytes | Callable[[bytes], bytes]) -> Make:
    """Another content for a file, with a fitting entry in the manifest."""
    return lambda path: replace(path, name, content((path / name).read_bytes()) if callable(content) else content)


def instead_of(name: str, make: Make) -> Make:
    """Something that is no ordinary file where the manifest promises one."""

    def swap(path: Path) -> None:
        (path / name).rename(path.parent / "elsewhere")
        make(path / name)

    return swap


def listening_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def sparse_and_promised(name: str, size: int) -> Make:
    def make(path: Path) -> None:
        sparse(path / name, size)
        listed(name, bytes=size)(path)

    return make


def tensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NOT_ORDINARY: dict[str, Make] = {
    "fifo": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "socket": listening_socket,
    "link": lambda path: path.symlink_to(path.parent.parent / "elsewhere"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}

HOSTILE: dict[str, Make] = {
    **{f"manifest is a {name}": instead_of(MANIFEST, make) for name, make in NOT_ORDINARY.items()},
    **{f"model is a {name}": instead_of(MODEL, make) for name, make in NOT_ORDINARY.items()},
    **{f"tokenizer is a {name}": instead_of("tokenizer.json", make) for name, make in NOT_ORDINARY.items()},
    # JSON
    "manifest is empty": manifest_bytes(b""),
    "manifest is null": manifest_bytes(b"null"),
    "manifest is a list": manifest_bytes(b"[1, 2]"),
    "manifest is binary": manifest_bytes(b"\x80\x04\x95pickle"),
    "manifest is not UTF-8": manifest_bytes(b'{"schema": 1, "files": {}, "writer": "\xff\xfe"}'),
    "manifest is UTF-16": lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text(), encoding="utf-16"),
    "manifest has a byte order mark": lambda path: (path / MANIFEST).write_bytes(
        b"\xef\xbb\xbf" + (path / MANIFEST).read_bytes()
    ),
    "manifest has two values": lambda path: (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes() * 2),
    "manifest is nested 100,000 deep": manifest_bytes(b"[" * 100_000),
    "manifest has 5,000 digits": manifest_text('"step": 7', '"step": ' + "7" * 5000),
    "manifest has 4,000 digits": manifest_text('"step": 7', '"step": ' + "7" * 4000),
    "manifest has a key twice": manifest_text('"step": 7', '"step": 3, "step": 7'),
    "manifest has a file twice": manifest_text('"files": {', '"files": {"config.json": {}, '),
    "manifest has NaN": manifest_text('"rollbacks": 0', '"rollbacks": NaN'),
    "manifest has Infinity": manifest_text('"rollbacks": 0', '"rollbacks": -Infinity'),
    "manifest has 1e999": manifest_text('"rollbacks": 0', '"rollbacks": 1e999'),
    "manifest has a lone surrogate": manifest_text('"run_id": "demo-1"', '"run_id": "\\ud800"'),
    "manifest has 65 MiB": lambda path: sparse(path / MANIFEST, 65 * 2**20),
    "manifest has 1 TB": lambda path: sparse(path / MANIFEST, 10**12),
    # Types
    "schema is text": manifest_with(schema="1"),
    "schema is true": manifest_with(schema=True),
    "schema is 1.0": manifest_with(schema=1.0),
    "schema is negative": manifest_with(schema=-1),
    "schema is newer": manifest_with(schema=2),
    "schema is beyond 64 bits": manifest_with(schema=2**64),
    "files is a list": manifest_with(files=[]),
    "files is empty": manifest_with(files={}),
    "an entry is text": manifest_with(files={"a": "b"}),
    "size is true": listed("a.json", bytes=True),
    "size is negative": listed("a.json", bytes=-1),
    "size is a fraction": listed("a.json", bytes=0.0),
    "sha256 is missing": listed("a.json", sha256=None),
    "sha256 is short": listed("a.json", sha256="ab"),
    "sha256 is in capitals": listed("a.json", sha256=describe()["sha256"].upper()),
    "run id is a number": manifest_with(run_id=7),
    "rollbacks is text": manifest_with(rollbacks="7"),
    "env is a list": manifest_with(env=[]),
    # Names
    **{
        f"name is {name!a}": listed(name)
        for name in ("", "..", "../a", "/etc/passwd", "a/b", "a\\b", "a\0b", ".hidden", "-rf", "a b", "a\n", "a" * 129,
                     "mod\u0435l.safetensors", "\uff4dodel.safetensors", "\ud800")
    },
    "two names differ in case": lambda path: ((path / "Model.safetensors").touch(), listed("Model.safetensors")(path)),
    "a fifo is listed as an empty file": lambda path: (os.mkfifo(path / "a.json"), listed("a.json")(path)),
    "the manifest lists itself": listed(MANIFEST),
    "a listed file is missing": listed("extra.json"),
    # Sizes
    "model has 1 TB": lambda path: sparse(path / MODEL, 10**12),
    "model has 1 TB and is said to": sparse_and_promised(MODEL, 10**12),
    "state has 65 MiB and is said to": sparse_and_promised(STATE, 65 * 2**20),
    # The trainer's state
    "state is empty": content_of(STATE, b""),
    "state is a list": content_of(STATE, b"[]"),
    "state is UTF-16": content_of(STATE, '{"step": 7}'.encode("utf-16")),
    "state has a key twice": content_of(STATE, b'{"step": 7, "step": 8}'),
    "state has a nested key twice": content_of(STATE, b'{"progress": {"step": 7, "step": 8}}'),
    "state has NaN": content_of(STATE, b'{"step": 7, "progress": {"best_loss": NaN}}'),
    "state has -1e999": content_of(STATE, b'{"step": 7, "progress": {"best_loss": -1e999}}'),
    "state is nested 100,000 deep": content_of(STATE, b'{"a":' * 100_000),
    "state has 5,000 digits": content_of(STATE, b'{"step": ' + b"9" * 5000 + b"}"),
    # Tensors
    "model is empty": content_of(MODEL, b""),
    "model is a pickle": content_of(MODEL, b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
    "model is a zip": content_of(MODEL, b"PK\x03\x04" + b"\0" * 60),
    "model is a zip behind its tensors": content_of(MODEL, lambda whole: whole + b"PK\x05\x06" + b"\0" * 18),
    "model ends early": content_of(MODEL, lambda whole: whole[:-1]),
    "header of 2^63 bytes": content_of(MODEL, tensors(b"{}", length=2**63)),
    "header longer than the file": content_of(MODEL, tensors(b"{}", length=10**6)),
    "header is no JSON": content_of(MODEL, tensors(b"{'a': 1}")),
    "header is a list": content_of(MODEL, tensors(b"[]")),
    "header is nested": content_of(MODEL, tensors(b"[" * 100_000)),
    "header has a tensor twice": content_of(
        MODEL, tensors(b'{"a":%s,"a":%s}' % ((json.dumps(one([1], 0, 4)).encode(),) * 2), b"\0" * 4)
    ),
    "header does not cover the data": content_of(MODEL, tensors({"a": one([1], 0, 4)}, b"\0" * 8)),
    "tensors overlap": content_of(MODEL, tensors({"a": one([2], 0, 8), "b": one([1], 4, 8)}, b"\0" * 8)),
    "tensors leave a gap": content_of(MODEL, tensors({"a": one([1], 0, 4), "b": one([1], 8, 12)}, b"\0" * 12)),
    "offsets leave the file": content_of(MODEL, tensors({"a": one([2**20], 0, 2**22)}, b"\0" * 4)),
    "offsets run backwards": content_of(MODEL, tensors({"a": one([1], 4, 0)}, b"\0" * 4)),
    "offsets are negative": content_of(MODEL, tensors({"a": one([1], -4, 0)}, b"\0" * 4)),
    "shape and offsets differ": content_of(MODEL, tensors({"a": one([3], 0, 4)}, b"\0" * 4)),
    "shape overflows": content_of(MODEL, tensors({"a": one([2**40, 2**40], 0, 4)}, b"\0" * 4)),
    "shape of nothing overflows": content_of(MODEL, tensors({"a": one([2**63, 2**63, 0], 0, 0)})),
    "shape of 2^40 x 0": content_of(MODEL, tensors({"a": one([2**40, 0], 0, 0)})),
    "type is unknown": content_of(MODEL, tensors({"a": one([1], 0, 4, "F33")}, b"\0" * 4)),
    "type is of another library": content_of(MODEL, tensors({"a": one([4], 0, 2, "F4")}, b"\0" * 2)),
    "20,000 tensors": content_of(MODEL, tensors({f"t{i}": one([0], 0, 0) for i in range(20_000)})),
    "tensors of another model": content_of(MODEL, tensors({"a\nb": one([1], 0, 4)}, b"\0" * 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_l02_a_hostile_folder_is_one_sentence_and_the_previous_checkpoint_loads(root: Path, case: str) -> None:
    path = root / "step_000007"
    HOSTILE[case](path)
    for read in (checkpoint.load, restore):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        message = str(caught.value)
        message.encode()
        assert "\n" not in message
        assert len(message) < 1000
    assert str(path) in message
    opened = checkpoint.open_newest(root, lambda said: None)
    assert opened.path == path or opened.state["seed"] == 3


def restore(path: Path) -> None:
    """What a resumed run does with a checkpoint."""
    opened = checkpoint.open_checkpoint(path)
    model = tiny_bitnet(vocab_size=256, num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    checkpoint.load_tensors(model, opened.model, path)


def test_the_table_of_hostile_folders_fails_for_what_is_in_them(root: Path) -> None:
    restore(root / "step_000007")
    assert checkpoint.load(root / "step_000007").state["seed"] == 7
    for harmless in (manifest_text('"step": 7', '"step": 8'), content_of(STATE, lambda whole: whole), manifest_with()):
        harmless(root / "step_000007")
        restore(root / "step_000007")


@pytest.mark.parametrize(("name", "size"), [(MODEL, 10**12), (STATE, 65 * 2**20)])
def test_files_beyond_every_measure_are_refused_before_they_are_opened(root: Path, name: str, size: int) -> None:
    sparse_and_promised(name, size)(root / "step_000007")
    with pytest.raises(CheckpointError, match=rf"manifest\.json.*'{name}' is said to have more than"):
        checkpoint.verify(root / "step_000007")


@pytest.mark.skipif(not hasattr(os, "mknod"), reason="no device files here")
def test_a_device_file_is_refused(root: Path) -> None:
    path = root / "step_000007"
    (path / MODEL).unlink()
    try:
        os.mknod(path / MODEL, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("device files need root")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.verify(path)


@pytest.mark.parametrize("name", ["best", "final"])
@pytest.mark.parametrize("kind", NOT_ORDINARY)
def test_a_pointer_that_is_no_ordinary_file_points_nowhere(root: Path, tmp_path: Path, name: str, kind: str) -> None:
    run = tmp_path / "runs" / "demo-1"
    (run / "meta").mkdir(parents=True)
    root.rename(run / "checkpoints")
    NOT_ORDINARY[kind](run / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=f"no '{name}' checkpoint"):
        checkpoint.resolve(f"demo-1@{name}", tmp_path / "runs")


def test_fuzzed_tensor_files_with_right_hashes_raise_typed_errors_only(root: Path) -> None:
    path, draw = root / "step_000007", random.Random(4)
    whole = (path / MODEL).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(8 + length)] = draw.choice([0, 9, 34, 44, 48, 57, 58, 91, 125, draw.randrange(256)])
        replace(path, MODEL, bytes(damaged))
        try:
            restore(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300
