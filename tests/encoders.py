"""What the tests of masked language models share: a small WordPiece tokenizer, and models that read both sides."""

import string
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from builders import tiny_bitnet
from ternlm.models import Output
from ternlm.tokenizers import Tokenizer, load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["story", "the", "red", "blue", "fox", "met", "hens", "and", "ran", "old", "slept", "seven"]
PIECES = [*SPECIAL, *WORDS, *".:,!", *string.ascii_lowercase, *string.digits,
          *(f"##{character}" for character in string.ascii_lowercase + string.digits), "##ing", "##ed"]  # fmt: skip
PAD, UNK, CLS, SEP, MASK = range(5)


def wordpiece(folder: Path) -> Tokenizer:
    """BERT's kind of tokenizer with about a hundred ids, from a `vocab.txt` written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


class TableEncoder(nn.Module):
    """Logits that depend on the token that is read alone, or also on the mean of its window.

    Args:
        table: (vocab_size, vocab_size), by the token read.
        context: How much the mean of all rows of the window's tokens counts.
    """

    compute_dtype = torch.float32
    is_causal = False
    is_recurrent = False

    def __init__(self, table: Tensor, context: float = 0.0) -> None:
        super().__init__()
        self.table, self.context = nn.Parameter(table), context
        settings = tiny_bitnet(vocab_size=table.shape[0]).settings
        self.settings = settings.model_copy(update={"family": "table", "max_position_embeddings": 24})
        self.passes: list[tuple[tuple[int, ...], int, bool]] = []

    def forward(self, tokens: Tensor, scored: Tensor | None = None) -> Output:
        assert scored is not None, "logits are asked for only where they are scored"
        self.passes.append((tuple(tokens.shape), int(scored.sum()), self.training or torch.is_grad_enabled()))
        rows = self.table[tokens]
        return Output((rows + self.context * rows.mean(dim=1, keepdim=True).roll(1, dims=-1))[scored], None, {})

    def bit_linears(self) -> dict[str, nn.Module]:
        return {}


def table(size: int = len(PIECES), seed: int = 0) -> Tensor:
    """Seeded logits, (size, size)."""
    return 2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def printed_under_two_hash_seeds(code: str, *arguments: str) -> set[str]:
    """What a program prints in two processes whose hashes of strings differ."""
    printed = set()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    return printed
