"""What the tests of streams share: a small dataset in files, and its training tokens worked out from the documents."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ternlm.data import DataSettings
from ternlm.data.stream import StreamedCorpus, open_stream
from ternlm.data.stream_loader import StreamLoader
from ternlm.data.windows import CausalWindows
from ternlm.tokenizers import ByteTokenizer, Tokenizer

T = 16
BUFFER = 4096
BYTE = ByteTokenizer()
BLOCK = (BUFFER // 8 - 1) // T * T + 1  # tokens, at one byte each


def some_files(seed: int = 3) -> list[list[str | None]]:
    """Rows of three files: texts of many lengths, empty ones and nulls among them."""
    draw = random.Random(seed)
    words = ["the", "red", "fox", "met", "seven", "hens", "naïve", "🙂", "and", "ran", "away"]
    files: list[list[str | None]] = []
    for file, rows in enumerate((40, 25, 33)):
        files.append([f"{file}.{row} " + " ".join(draw.choices(words, k=draw.randint(1, 30))) for row in range(rows)])
        files[-1][7], files[-1][11], files[-1][12] = None, "", " \n"
    return files


def write_dataset(folder: Path, files: Sequence[Sequence[str | None]], kind: str = "parquet") -> str:
    """Write a dataset of several files and return what `data.source` says for it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        name = folder / f"train-{number:05d}.{kind}"
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            ids = list(range(len(rows)))
            pyarrow.parquet.write_table(pyarrow.table({"id": ids, "text": list(rows)}), name, row_group_size=9)
        else:
            name.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in rows))
    return f"hf:{folder}"


def position_in_unit_interval(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def training_tokens(
    files: Sequence[Sequence[str | None]], tokenizer: Tokenizer, count: int, held_out: float = 0.1
) -> np.ndarray:
    """The first tokens of the stream: documents in order, the held-out share left out, pass after pass."""
    one_pass: list[int] = []
    for text in (text for rows in files for text in rows if text and text.strip()):
        if position_in_unit_interval(text) >= held_out:
            marks = [[] if mark is None else [mark] for mark in (tokenizer.bos_id, tokenizer.eos_id)]
            one_pass += [*marks[0], *tokenizer.encode(text), *marks[1]]
    return np.resize(np.array(one_pass, dtype=np.int64), count)


def stream_settings(source: str, **values: Any) -> DataSettings:
    given = {"source": source, "stream": True, "sequence_length": T, "stream_buffer": BUFFER}
    return DataSettings.from_mapping({**given, "stream_validation_tokens": 300, **values}, "data")


_OPENED: list[StreamedCorpus] = []


def opened(data: DataSettings, folder: Path, tokenizer: Tokenizer = BYTE, **options: Any) -> StreamedCorpus:
    """A stream that `close_all` closes."""
    _OPENED.append(open_stream(data, tokenizer, folder, **options))
    return _OPENED[-1]


def close_all() -> None:
    while _OPENED:
        _OPENED.pop().close()


def loader_of(corpus: StreamedCorpus, seed: int = 5, batch_size: int = 6) -> StreamLoader:
    return corpus.loader(batch_size, CausalWindows(T, None), seed)


def windows(loader: StreamLoader, first: int, last: int) -> torch.Tensor:
    """Samples [first, last) with their last target, (last - first, T + 1), in batches of odd sizes."""
    parts, size = [], 0
    while first < last:
        size = min(size % 11 + 1, last - first)
        batch = loader.batch(first, size)
        parts.append(torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1))
        first += size
    return torch.cat(parts)
