"""`train_bpe`: a byte-level BPE learned from documents with the `tokenizers` library."""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ternlm.errors import TokenizerError
from ternlm.tokenizers.interface import library_errors, readable
from ternlm.tokenizers.library import LibraryTokenizer

SPECIAL_TOKENS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_bpe(
    texts: Iterable[str], vocab_size: int, sample_bytes: int = 200_000_000, mask_token: bool = False
) -> LibraryTokenizer:
    """Learn a byte-level BPE: lossless on every text, and the same for the same texts.

    Words are split by GPT-2's pattern before merging. Ids 0, 1, 2 are BOS, EOS and PAD; 3 is the mask token, if wanted.

    Args:
        texts: Training documents; reading stops after `sample_bytes`, which also bounds memory.
        vocab_size: Ids wanted, special tokens included; a small text may yield fewer, see `vocab_size`
            of the result.
        sample_bytes: Most UTF-8 bytes to learn from.
        mask_token: Add a mask token, ``<|mask|>``, for masked language models.

    Raises:
        TokenizerError: The vocabulary is too small for all bytes, or there is no text.

    Source:
        Sennrich et al. 2016 (arXiv 1508.07909); Radford et al. 2019 for bytes and the pattern.
    """
    special = SPECIAL_TOKENS | ({"mask": "<|mask|>"} if mask_token else {})
    if vocab_size < 256 + len(special):
        raise TokenizerError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and {len(special)} special tokens. "
            f"Use at least {256 + len(special)}, or the tokenizer 'byte'."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = _Sample(texts, sample_bytes)
    with library_errors("training the tokenizer"):
        inner.train_from_iterator(iter(sample), trainer)
    if not sample.bytes_read:
        raise TokenizerError("there is no text to train a tokenizer on. Check data.source.")
    return LibraryTokenizer(inner, "bpe", dict(special))


class _Sample:
    """The first documents of an iterable, up to a number of bytes."""

    def __init__(self, texts: Iterable[str], limit: int):
        self.texts = texts
        self.limit = limit
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            raw = readable(text).encode()[: self.limit - self.bytes_read]
            self.bytes_read += len(raw)
            if raw:
                yield raw.decode(errors="ignore")
            if self.bytes_read >= self.limit:
                return
