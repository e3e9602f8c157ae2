"""Texts that have broken tokenizers before."""

import pytest

MULTILINGUAL = [
    "The quick brown fox jumps over the lazy dog.",
    "Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย",
    "中文的句子。日本語の文。한국어 문장.",
    "emoji 🙂 👩‍👩‍👧‍👦 🇩🇪, math 𝛼²∑, e\u0301 vs é",
    "  leading, trailing and   inner spaces  ",
    "tabs\tand\r\nline\n\n\nends\u2028\u00a0",
    "\x00\x01\x7f control characters and \ufffd",
    "def f(x):\n    return {'a': [1, 2.5e-3]}\n",
    "don't can't I'LL we've 12345678 3.14",
]
SPECIAL_SPELLINGS = [
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|bos|>", "<|eos|>", "[CLS] a [SEP] [MASK] [PAD]",
    "a<s>b</s>", "<|bos|><|eos|><|pad|>", "<0x41>",
]  # fmt: skip


@pytest.fixture(params=[*MULTILINGUAL, *SPECIAL_SPELLINGS, ""])
def any_text(request: pytest.FixtureRequest) -> str:
    """Each difficult text in turn."""
    return str(request.param)


@pytest.fixture
def multilingual() -> list[str]:
    """Texts of many scripts."""
    return MULTILINGUAL


@pytest.fixture
def special_spellings() -> list[str]:
    """Texts that spell special tokens."""
    return SPECIAL_SPELLINGS
