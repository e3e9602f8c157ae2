"""How much a model remembers of a text while it reads on."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ternlm.evaluation.untouched import untouched
from ternlm.models import LanguageModel


@torch.no_grad()
def state_bytes(model: LanguageModel, tokens: Tensor) -> int:
    """Bytes of the memory of one text after it was read, as the model holds them.

    A recurrent memory has one size for texts of any length; a cache of keys and values has room for the longest text.

    Args:
        model: A causal model; left as it was.
        tokens: (time,), what is read, within what the model can hold.
    """
    device = next(model.parameters()).device
    with untouched(model):
        state = model(tokens[None].to(device), model.initial_state(1)).state
    held = {id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(state)}
    return sum(held.values())


def _tensors(state: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        yield from (tensor for value in state.values() for tensor in _tensors(value))
    elif isinstance(state, (tuple, list)):
        yield from (tensor for value in state for tensor in _tensors(value))
    elif is_dataclass(state):
        yield from (tensor for each in fields(state) for tensor in _tensors(getattr(state, each.name)))
