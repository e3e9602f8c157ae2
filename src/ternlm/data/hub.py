"""Documents of Hugging Face datasets, streamed; needs the extra ``hub``.

Only data files are read (Parquet, JSON, text); no code of a dataset is ever run. A local folder in the
layout of a dataset opens the same way.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ternlm.data.documents import text_of
from ternlm.errors import DataError, missing_extra

_SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:[:@]([\w.+-]+))?")
_ARTICLE = re.compile(r" = [^=].*[^=] = \n?")


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


def hub_splits(name: str, config: str | None) -> dict[str, str]:
    """The dataset's own name for each of train, validation and test that it has.

    Raises:
        DataError: The dataset cannot be reached or has no training split.
    """
    datasets = _import_datasets(name)
    try:
        found = datasets.get_dataset_split_names(name, config)
    except Exception as error:  # noqa: BLE001 (errors of many network and file layers come through)
        raise _unreachable(name, config, error) from None
    names = {
        split: next(known for known in choices if known in found)
        for split, choices in _SPLIT_NAMES.items()
        if any(known in found for known in choices)
    }
    if "train" not in names:
        raise DataError(
            f"the dataset '{name}' has the splits {', '.join(found)} but no 'train'. Choose another dataset."
        )
    return names


def hub_documents(
    name: str, config: str | None, split: str, text_column: str, encoding_errors: str = "strict"
) -> Iterator[str]:
    """Documents of one split, in the dataset's order, empty ones dropped; arguments as for `hub_rows`."""
    for text in hub_rows(name, config, split, text_column, encoding_errors):
        if text and not text.isspace():
            yield text


def hub_rows(
    name: str, config: str | None, split: str, text_column: str, encoding_errors: str = "strict"
) -> Iterator[str]:
    """The text of every row of one split, in the dataset's order.

    Args:
        name: ``owner/name``, or a local folder.
        config: Configuration, or None for the dataset's default.
        split: The dataset's own name of the split.
        text_column: Column that holds the text.
        encoding_errors: What to do with lone surrogates, ``strict`` or ``replace``.

    Raises:
        DataError: The dataset cannot be reached, breaks off, or lacks the column.
    """
    datasets = _import_datasets(name)
    try:
        for number, row in enumerate(datasets.load_dataset(name, config, split=split, streaming=True)):
            yield text_of(row, text_column, f"{name}, row {number}", encoding_errors)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 (as above)
        raise _unreachable(name, config, error) from None


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join the lines that WikiText stores as rows into articles, one per top-level heading ``= Title =``.

    The dataset stores blank lines as empty rows; they become blank lines again, so the articles of a split,
    joined, are its raw file byte for byte.
    """
    article: list[str] = []
    empty = True
    for row in rows:
        if _ARTICLE.fullmatch(row) and not empty:
            yield "".join(article)
            article, empty = [], True
        article.append(row or "\n")
        empty = empty and not row.strip()
    if not empty:
        yield "".join(article)


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "hub", f"reading the dataset '{name}'") from None
    return datasets


def _unreachable(name: str, config: str | None, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    wanted = f"'{name}'" + (f" ({config})" if config else "")
    return DataError(
        f"the dataset {wanted} cannot be read: {reason}. Check the name and the connection (HF_TOKEN for "
        "private ones), or download it and give the local folder as data.source."
    )
