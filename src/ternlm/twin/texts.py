"""Held-out texts beside the validation split: how they are read, and that nothing in them was trained on."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ternlm.data import DataSettings, open_corpus
from ternlm.data.catalog import document_hash, is_local
from ternlm.data.corpus import Corpus, TokenStream
from ternlm.data.documents import find_files
from ternlm.errors import DataError
from ternlm.twin.definition import Text


def text_settings(text: Text, data: Mapping[str, Any]) -> DataSettings:
    """The `data` section with which a text is read: all of a local one is one split.

    Args:
        text: The text.
        data: The section of the arms, whose way of decoding and whose cache it shares.
    """
    kept = {name: data[name] for name in ("text_column", "encoding_errors", "cache")}
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0} if is_local(text.source) else {}
    return DataSettings.from_mapping({**kept, **whole, "source": text.source}, "data")


def split_of(corpus: Corpus, text: Text) -> TokenStream:
    """All of a local text; of a corpus its test split, or that for validation where it has none."""
    if is_local(text.source):
        return corpus.split("train")
    return corpus.split("test" if "test" in corpus.splits else "validation")


def require_held_out(texts: tuple[Text, ...], data: DataSettings, train: TokenStream | None) -> None:
    """Read local texts once, and refuse one of which a document was trained on.

    Args:
        texts: The texts.
        data: The `data` section of the arms.
        train: What they train on; None where that is only known while they do.

    Raises:
        DataError: A text cannot be read, or is no held-out text: it lies among the training files, or a document of
            it was trained on.
    """
    trained_on = {file.resolve() for file in find_files(data.source)} if is_local(data.source) else set()
    for text in texts:
        if not is_local(text.source):
            continue
        twice = next((file for file in find_files(text.source) if file.resolve() in trained_on), None)
        if twice is not None:
            raise DataError(f"text '{text.name}' is not held out: '{twice}' is training data. Give another text.")
        documents = open_corpus(text_settings(text, data.model_dump()), "train")
        hashes = np.array([document_hash(document.encode()) for document in documents], dtype=np.uint64)
        shared = 0 if train is None else len(np.intersect1d(train.document_hashes, hashes))
        if shared:
            raise DataError(
                f"text '{text.name}' is not held out: {shared:,} of its {len(hashes):,} documents are in the training "
                "data. Give another text."
            )
