"""Durable writing: a file is new and complete or the old one is untouched, also when the system refuses half-way."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ternlm import files


def test_a_written_file_holds_exactly_the_content(tmp_path: Path) -> None:
    content = bytes(range(256)) * 37
    files.write_durably(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == content


def test_writing_never_replaces_or_follows_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("kept", "link"):
        with pytest.raises(FileExistsError):
            files.write_durably(tmp_path / name, b"new")
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert not (tmp_path / "elsewhere").exists()


def test_l11_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: real(descriptor, bytes(view)[:5]))
    files.write_durably(tmp_path / "a", b"0123456789abc")
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"


def test_content_reaches_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        order.append("replace")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    files.replace_durably(tmp_path / "a", b"x")
    assert order == ["fsync", "replace", "fsync"]  # content, name, folder


def failing(code: int) -> Callable[..., None]:
    def fail(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("operation", ["open", "write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_l11_a_failed_replacement_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    files.replace_durably(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing(code))
        with pytest.raises(OSError, match=os.strerror(code)):
            files.replace_durably(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    files.replace_durably(tmp_path / "a", b"newer")
    assert (tmp_path / "a").read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "nothing is left over after the next success"


def test_no_descriptor_leaks_when_a_write_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    before = len(list(descriptors.iterdir()))
    for n in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.EIO))
            with pytest.raises(OSError):
                files.write_durably(tmp_path / str(n), b"x")
            with pytest.raises(OSError):
                files.synchronize_folder(tmp_path)
    assert len(list(descriptors.iterdir())) == before


def test_json_is_strict_sorted_and_ends_with_a_newline() -> None:
    text = files.to_json({"b": "é", "a": [1, None, True]})
    assert text.endswith(b"}\n")
    assert text.index(b'"a"') < text.index(b'"b"')
    assert json.loads(text) == {"b": "é", "a": [1, None, True]}
    assert "é".encode() in text
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            files.to_json({"a": value})


def test_an_append_file_holds_what_was_appended_and_hashes_all_of_it(tmp_path: Path) -> None:
    file = files.AppendFile(tmp_path / "a")
    file.append(b"first")
    assert (tmp_path / "a").read_bytes() == b"", "small pieces are collected"
    file.write_out()
    assert (tmp_path / "a").read_bytes() == b"first"
    file.append(b" second")
    file.synchronize()
    file.append(b" dropped")
    file.close()
    file.close()
    assert (tmp_path / "a").read_bytes() == b"first second"
    again = files.AppendFile(tmp_path / "a", 5)
    again.append(b"!")
    again.synchronize()
    assert (tmp_path / "a").read_bytes() == b"first!"
    assert again.digest.hexdigest() == hashlib.sha256(b"first!").hexdigest()


def test_an_append_file_continues_short_writes_and_writes_much_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = os.write, []

    def write(descriptor: int, view: bytes) -> int:
        sizes.append(len(view))
        return real(descriptor, bytes(view)[: 2**19])

    monkeypatch.setattr(os, "write", write)
    file = files.AppendFile(tmp_path / "a")
    for _ in range(2**12):
        file.append(bytes(2**8))
    assert sizes == [2**20, 2**19]
    assert (tmp_path / "a").stat().st_size == 2**20


def test_an_append_file_that_is_forgotten_leaks_no_descriptor(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        files.AppendFile(tmp_path / "a").append(b"x")
    assert len(list(descriptors.iterdir())) == before
