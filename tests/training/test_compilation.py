"""Compiling is optional: it shows its time, and where it fails training goes on without."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class Dialled(nn.Module):
    """A block with a setting that a compiler reads as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.dial = 0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.dial


def test_a_block_may_round_in_many_ways_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    block = Dialled()
    compile_block = copy.copy(block.compile)

    def without_code_generation(**options: Any) -> None:
        compile_block(backend="eager", **options)

    monkeypatch.setattr(block, "compile", without_code_generation)
    model = tiny_bitnet()
    monkeypatch.setattr(model, "blocks", lambda: iter([block]))
    assert compile_blocks(model, lambda: None, lambda text: None)
    for dial in range(20):
        block.dial = dial
        assert block(torch.ones(3)).tolist() == [dial] * 3
