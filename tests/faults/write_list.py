"""A disk that loses power, as a model: which trees a list of file-system calls may leave behind.

`recorded` writes down what happens below a folder while it happens, and a `Disk` replays it: data are safe once the
file was synchronized, a name once its folder was. Of everything else, at the moment of the cut, each sector of 512
bytes has arrived, is missing or is garbage; the length may have changed before the data; and of the changed names any
first part has arrived (an ordered journal), or any selection. Bytes that were safe stay so while others are appended to
their sector, as databases assume of disks too, unless the disk `tears` it.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SECTOR = 512
ROOT = 0

Tree = dict[str, bytes | None]
"""Files by path below the root, with their content; None for folders."""


class Event(NamedTuple):
    """One change of the disk.

    Attributes:
        kind: ``name``: `entries` of folder `inode` change. ``write`` and ``truncate``: data of file `inode` change.
            ``sync``: file or folder `inode` is synchronized. ``mark``: the program has said `text`.
        entries: Names and the inodes they get; None takes a name away.
    """

    kind: str
    inode: int = -1
    entries: tuple[tuple[str, int | None], ...] = ()
    offset: int = 0
    content: bytes = b""
    text: str = ""


@dataclass
class WriteList:
    """The disk before, and what happened to it.

    Attributes:
        folders: Names of each folder before.
        files: Content of each file before.
        events: What happened, in order.
    """

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, bytes] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    made: set[int] = field(default_factory=set)

    def mark(self, text: str) -> None:
        """Note what the program told its user at this point."""
        self.events.append(Event("mark", text=text))

    def is_folder(self, inode: int) -> bool:
        """Whether an inode is a folder, now or before."""
        return inode in self.folders or inode in self.made


class _Recorder:
    """Follows the calls of `os`, so that every change is known by inode and not by path."""

    def __init__(self, root: Path, log: WriteList) -> None:
        self.root, self.log = str(root), log
        self.names: dict[int, dict[str, int]] = {ROOT: {}}
        self.sizes: dict[int, int] = {}
        self.descriptors: dict[int, tuple[int, bool]] = {}
        self.positions: dict[int, int] = {}
        self.next_inode = 1
        self._read(root, ROOT)

    def find(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """Folder inode and last name of a path below the root; None for what lies elsewhere."""
        if dir_fd is not None:
            return (self.descriptors[dir_fd][0], os.fspath(path)) if dir_fd in self.descriptors else None
        text = str(Path(path).absolute())
        if text == self.root:
            return ROOT, ""
        if not text.startswith(self.root + "/"):
            return None
        *parents, name = text[len(self.root) + 1 :].split("/")
        inode = ROOT
        for parent in parents:
            inode = self.names[inode][parent]
        return inode, name

    def inode(self, where: tuple[int, str]) -> int | None:
        """The inode that a name has now."""
        folder, name = where
        return folder if not name else self.names[folder].get(name)

    def opened(self, path: Any, flags: int, descriptor: int, dir_fd: int | None) -> None:
        where = self.find(path, dir_fd)
        if where is None:
            return
        inode = self.inode(where)
        if inode is None:
            inode = self._new()
            self.sizes[inode] = 0
            self._rename(where[0], ((where[1], inode),))
        elif flags & os.O_TRUNC:
            self.truncated(inode, 0)
        self.descriptors[descriptor] = (inode, bool(flags & os.O_APPEND))
        self.positions[descriptor] = 0

    def written(self, descriptor: int, content: bytes) -> None:
        if descriptor not in self.descriptors:
            return
        inode, appends = self.descriptors[descriptor]
        offset = self.sizes[inode] if appends else self.positions[descriptor]
        self.log.events.append(Event("write", inode, offset=offset, content=content))
        self.positions[descriptor] = offset + len(content)
        self.sizes[inode] = max(self.sizes[inode], offset + len(content))

    def truncated(self, inode: int, size: int) -> None:
        self.log.events.append(Event("truncate", inode, offset=size))
        self.sizes[inode] = size

    def synchronized(self, descriptor: int) -> None:
        if descriptor in self.descriptors:
            self.log.events.append(Event("sync", self.descriptors[descriptor][0]))

    def renamed(self, old: Any, new: Any) -> None:
        source, target = self.find(old), self.find(new)
        if source is None and target is None:
            return
        assert source and target and source[0] == target[0], f"the model knows renames inside one folder only: {new}"
        self._rename(source[0], ((source[1], None), (target[1], self.names[source[0]][source[1]])))

    def made_folder(self, path: Any) -> None:
        where = self.find(path)
        if where is not None:
            inode = self._new()
            self.names[inode] = {}
            self.log.made.add(inode)
            self._rename(where[0], ((where[1], inode),))

    def removed(self, path: Any, dir_fd: int | None) -> None:
        where = self.find(path, dir_fd)
        if where is not None:
            self._rename(where[0], ((where[1], None),))

    def _rename(self, folder: int, entries: tuple[tuple[str, int | None], ...]) -> None:
        self.log.events.append(Event("name", folder, entries))
        _apply(self.names[folder], entries)

    def _new(self) -> int:
        self.next_inode += 1
        return self.next_inode

    def _read(self, folder: Path, inode: int) -> None:
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            child = self._new()
            self.names[inode][path.name] = child
            if path.is_dir():
                self.names[child] = {}
                self._read(path, child)
            else:
                self.log.files[child] = path.read_bytes()
                self.sizes[child] = len(self.log.files[child])
        self.log.folders[inode] = dict(self.names[inode])


@contextmanager
def recorded(root: Path) -> Iterator[WriteList]:
    """Write down everything that this process changes below a folder that exists."""
    log = WriteList()
    follow = _Recorder(root.absolute(), log)
    real: dict[str, Callable[..., Any]] = {}

    def replace(name: str, after: Callable[..., None]) -> None:
        real[name] = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = real[name](*arguments, **options)
            after(result, *arguments, **options)
            return result

        setattr(os, name, call)

    replace("open", lambda fd, path, flags, mode=0, *, dir_fd=None: follow.opened(path, flags, fd, dir_fd))
    replace("write", lambda count, fd, content: follow.written(fd, bytes(content)[:count]))
    replace("ftruncate", lambda _, fd, size: follow.truncated(follow.descriptors[fd][0], size))
    replace("fsync", lambda _, fd: follow.synchronized(fd))
    replace("rename", lambda _, old, new: follow.renamed(old, new))
    replace("replace", lambda _, old, new: follow.renamed(old, new))
    replace("mkdir", lambda _, path, mode=0: follow.made_folder(path))
    replace("unlink", lambda _, path, *, dir_fd=None: follow.removed(path, dir_fd))
    replace("rmdir", lambda _, path, *, dir_fd=None: follow.removed(path, dir_fd))
    replace("close", lambda _, fd: follow.descriptors.pop(fd, None))
    try:
        yield log
    finally:
        for name, function in real.items():
            setattr(os, name, function)


class Disk:
    """The disk while a list of events is replayed: what is safe, and what is on its way.

    Args:
        log: What happened.
        fsync_lies: Nothing is ever synchronized.
        tears: A sector that is being written to may lose what was safe in it.
    """

    def __init__(self, log: WriteList, fsync_lies: bool = False, tears: bool = True) -> None:
        self.log, self.fsync_lies, self.tears = log, fsync_lies, tears
        self.said: set[str] = set()
        self._folders = {inode: dict(names) for inode, names in log.folders.items()} | {n: {} for n in log.made}
        self._files = dict(log.files)
        self._names: list[Event] = []
        self._data: dict[int, list[Event]] = {}

    def take(self, event: Event) -> None:
        """One more event."""
        if event.kind == "mark":
            self.said = self.said | {event.text}
        elif event.kind == "name":
            self._names.append(event)
        elif event.kind in ("write", "truncate"):
            self._data.setdefault(event.inode, []).append(event)
        elif not self.fsync_lies and event.inode in self._folders:
            for change in self._names:
                if change.inode == event.inode:
                    _apply(self._folders[event.inode], change.entries)
            self._names = [change for change in self._names if change.inode != event.inode]
        elif not self.fsync_lies:
            self._files[event.inode] = _content(self._files.get(event.inode, b""), self._data.pop(event.inode, []))

    def cut(self, draw: random.Random, is_ordered: bool) -> Tree:
        """A tree that is found if the power fails now.

        Args:
            draw: Decides what of the rest arrived.
            is_ordered: Names arrive in order; otherwise any selection of them.
        """
        folders, files = {inode: dict(names) for inode, names in self._folders.items()}, dict(self._files)
        reached, share = draw.randint(0, len(self._names)), draw.choice([0.2, 0.5, 0.8])
        for number, change in enumerate(self._names):
            if number < reached if is_ordered else draw.random() < share:
                _apply(folders[change.inode], change.entries)
        for inode, changes in self._data.items():
            before = files.get(inode, b"")
            safe = 0 if self.tears else min(len(before), *(change.offset for change in changes))
            files[inode] = before[:safe] + _disturbed(before, changes, draw)[safe:]
        return _tree(ROOT, "", folders, files)


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a tree on disk, in a folder that does not exist."""
    folder.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def _apply(names: dict[str, int], entries: Sequence[tuple[str, int | None]]) -> None:
    for name, inode in entries:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _content(before: bytes, changes: list[Event]) -> bytes:
    content = bytearray(before)
    for change in changes:
        if change.kind == "truncate":
            del content[change.offset :]
            content.extend(bytes(change.offset - len(content)))
        else:
            content.extend(bytes(max(change.offset - len(content), 0)))
            content[change.offset : change.offset + len(change.content)] = change.content
    return bytes(content)


def _disturbed(before: bytes, changes: list[Event], draw: random.Random) -> bytes:
    """A file that was being changed: all, nothing, or a mixture by sectors, with the length of any moment."""
    after = _content(before, changes)
    how = draw.choice(["all", "nothing", "mixture", "mixture", "length only"])
    if how in ("all", "nothing"):
        return after if how == "all" else before
    length = len(_content(before, changes[: draw.randint(0, len(changes))]))
    if how == "length only":
        return (before + bytes(max(length - len(before), 0)))[:length]
    content = bytearray(length)
    for start in range(0, length, SECTOR):
        source = draw.choice(["new", "new", "old", "garbage"])
        size = min(SECTOR, length - start)
        piece = (
            draw.randbytes(size)
            if source == "garbage"
            else (after if source == "new" else before)[start : start + size]
        )
        if after[start : start + size] == before[start : start + size]:
            piece = before[start : start + size]  # nothing was written here
        content[start : start + len(piece)] = piece
    return bytes(content)


def _tree(inode: int, prefix: str, folders: dict[int, dict[str, int]], files: dict[int, bytes]) -> Tree:
    tree: Tree = {}
    for name, child in sorted(folders[inode].items()):
        if child in folders:
            tree[prefix + name] = None
            tree |= _tree(child, f"{prefix}{name}/", folders, files)
        else:
            tree[prefix + name] = files.get(child, b"")
    return tree
