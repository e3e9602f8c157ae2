"""Compiling is optional: it shows its time, and where it fails training goes on without."""

import pytest
import torch

from builders import random_tokens, tiny_bitnet
from ternlm.training.compilation import compile_blocks


def test_a_compiler_that_fails_leaves_an_eager_model_and_one_sentence() -> None:
    model = tiny_bitnet()
    tokens = random_tokens(2, 5)
    expected = model(tokens).logits
    said: list[str] = []

    def fail() -> None:
        raise RuntimeError("no compiler found\nand many more lines")

    assert not compile_blocks(model, fail, said.append)
    assert said[-1] == "compiling failed (no compiler found); going on without."
    assert torch.equal(model(tokens).logits, expected)


def test_compiling_says_how_long_it_took_and_keeps_parameter_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bitnet()
    names = list(model.tensors())
    compiled: list[bool] = []

    def note(fullgraph: bool) -> None:
        compiled.append(fullgraph)

    for block in model.blocks():
        monkeypatch.setattr(block, "compile", note)
    said: list[str] = []
    assert compile_blocks(model, lambda: None, said.append)
    assert compiled == [True] * len(list(model.blocks()))
    assert "not counted in tokens/s" in said[-1]
    assert list(model.tensors()) == names
