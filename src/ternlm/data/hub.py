"""Datasets of the Hugging Face hub, streamed file by file; needs the extra ``hub``.

Only data files are read (Parquet, JSON, text); no code of a dataset is ever run. A local folder in the
layout of a dataset opens the same way. Waiting and trying again are left to `reader`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ternlm.data.decoding import Decoder
from ternlm.data.documents import text_of
from ternlm.data.reader import Source, Unreadable, unreadable
from ternlm.errors import DataError, EnvironmentFault, missing_extra

ROWS = 256  # asked for at a time

_SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:[:@]([\w.+-]+))?")
_HOPELESS = {
    "DataFilesNotFoundError", "DatasetNotFoundError", "GatedRepoError", "NotImplementedError",
    "OfflineModeIsEnabled", "RepositoryNotFoundError", "RevisionNotFoundError",
}  # fmt: skip
"""Errors, by the names of their classes, that say at a first attempt that there will be no second."""


@dataclass(frozen=True)
class HubDataset:
    """Which dataset.

    Attributes:
        name: ``owner/name``, or a local folder.
        config: Configuration, or None for the dataset's default.
        revision: Branch, tag or commit, or None for the newest.
    """

    name: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return f"the dataset '{self.name}'" + (f" ({self.config})" if self.config else "")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.name).is_dir()


def parse_hub_source(source: str) -> tuple[str, str | None]:
    """Name and configuration of ``hf:owner/name[:config]`` (or ``@config``), or ``hf:`` and a local folder.

    Raises:
        DataError: It is neither.
    """
    rest = source.removeprefix("hf:")
    if rest and Path(rest).is_dir():
        return rest, None
    match = _NAME.fullmatch(rest)
    if match is None:
        raise DataError(f"'{source}' does not name a dataset. Write hf:owner/name or hf:owner/name:config.")
    return match[1], match[2]


def hub_splits(dataset: HubDataset) -> dict[str, str]:
    """The dataset's own name for each of train, validation and test that it has.

    Raises:
        Unreadable: The dataset cannot be reached.
        DataError: It does not exist, or has no training split.
    """
    datasets = _import_datasets(dataset)
    found = _opened(
        dataset,
        lambda: datasets.get_dataset_split_names(dataset.name, dataset.config, revision=dataset.revision),
    )
    names = {
        split: next(known for known in choices if known in found)
        for split, choices in _SPLIT_NAMES.items()
        if any(known in found for known in choices)
    }
    if "train" not in names:
        raise DataError(f"{dataset} has the splits {', '.join(found)} but no 'train'. Choose another dataset.")
    return names


def newest_commit(dataset: HubDataset) -> str | None:
    """The commit that the dataset's revision names now; None for a local folder.

    Raises:
        Unreadable: The hub cannot be reached.
        DataError: The dataset or the revision does not exist.
    """
    if dataset.is_local:
        return None
    try:
        import huggingface_hub
    except ImportError:
        raise missing_extra("huggingface_hub", "hub", f"reading {dataset}") from None
    information = _opened(
        dataset, lambda: huggingface_hub.HfApi().dataset_info(dataset.name, revision=dataset.revision)
    )
    return None if information.sha is None else str(information.sha)


class HubSource(Source):
    """The rows of one split of a dataset.

    Args:
        dataset: Which dataset.
        split: The dataset's own name of the split.
        text_column: Column that holds the text.
        decoder: What happens to lone surrogates; by default they are refused.
        label: The split of ternlm's that a text belongs to.
    """

    def __init__(
        self,
        dataset: HubDataset,
        split: str,
        text_column: str = "text",
        decoder: Decoder | None = None,
        label: Callable[[str], str] = lambda text: "train",
    ) -> None:
        self.name = str(dataset)
        self.dataset = dataset
        self.label = label
        self._split = split
        self._text_column = text_column
        self._decoder = decoder or Decoder()
        self._rows: Any = None
        self._count: int | None = None  # of files, when the dataset was first opened

    def files(self) -> int:
        return int(self._open().num_shards)

    def rows(self, file: int, row: int) -> Iterator[tuple[str, str]]:
        column = self._text_column
        for table in self._tables(file, row):
            known = column in table.column_names
            records = table.select([column]).to_pylist() if known else [dict.fromkeys(table.column_names)]
            for record in records:
                text = text_of(record, column, f"{self.name}, file {file}, row {row}", self._decoder)
                yield (self.label(text) if text else ""), text
                row += 1

    def reset(self) -> None:
        self._rows = None

    def _open(self) -> Any:
        if self._rows is None:
            datasets = _import_datasets(self.dataset)
            name, config, revision = self.dataset.name, self.dataset.config, self.dataset.revision
            rows = _opened(
                self.dataset,
                lambda: datasets.load_dataset(name, config, split=self._split, streaming=True, revision=revision),
                is_first=self._count is None,
            )
            count = int(rows.num_shards)
            if self._count not in (None, count):  # positions count files: with one missing they mean other rows
                raise Unreadable(f"it has {count} files now, {self._count} when it was first opened")
            self._rows, self._count = rows, count
        return self._rows

    def _tables(self, file: int, row: int) -> Iterator[Any]:
        """Arrow tables of the rows from `row` on: a fourth of the time that rows as dictionaries take."""
        rows = self._open()
        try:
            part = rows.shard(num_shards=rows.num_shards, index=file).with_format("arrow")
            for table in part.iter(batch_size=ROWS):
                if row < len(table):
                    yield table.slice(row)
                row = max(0, row - len(table))
        except (EnvironmentFault, MemoryError):
            raise
        except Exception as error:  # errors of many network and file layers come through
            raise Unreadable(_reason(error)) from error


def _opened(dataset: HubDataset, open_it: Callable[[], Any], is_first: bool = True) -> Any:
    """The result of a call that opens something, with its errors told apart.

    Raises:
        DataError: A first attempt says that there is nothing to wait for, such as a wrong name. After that
            the same words only mean that the hub is in trouble.
        Unreadable: Anything else.
    """
    try:
        return open_it()
    except (EnvironmentFault, MemoryError):
        raise
    except Exception as error:  # errors of many network and file layers come through
        if is_first and _is_hopeless(error):
            raise unreadable(str(dataset), _reason(error)) from None
        raise Unreadable(_reason(error)) from error


def _is_hopeless(error: Exception) -> bool:
    # ValueError itself is how the library says that a configuration, split or file type is unknown
    names = {kind.__name__ for kind in type(error).__mro__}
    return type(error) is ValueError or bool(names & _HOPELESS) or "OfflineModeIsEnabled" in str(error)


def _import_datasets(dataset: HubDataset) -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "hub", f"reading {dataset}") from None
    return datasets


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
