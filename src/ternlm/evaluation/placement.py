"""Where a module stands in a model: the block that holds it, and its name within that block."""

from typing import NamedTuple

from torch import nn

from ternlm.models import LanguageModel


class Place(NamedTuple):
    """A module, or one matrix of a merged layer, as people find it.

    Attributes:
        name: Path in the model, without the prefix ``model.``.
        block: Number of its block from the input side; None outside the blocks.
        part: Path within the block, the same in every block; outside the blocks, the name.
    """

    name: str
    block: int | None
    part: str

    def matrix(self, matrix: str) -> "Place":
        """The place of a matrix that stands beside its layer in files."""
        return Place(_beside(self.name, matrix), self.block, _beside(self.part, matrix))

    def as_dict(self) -> dict[str, str | int | None]:
        """The place as the first columns of a row."""
        return self._asdict()


def places(model: LanguageModel) -> dict[nn.Module, Place]:
    """The place of every module of a model."""
    numbers = {block: number for number, block in enumerate(model.blocks())}
    prefixes = {name: numbers[module] for name, module in model.named_modules() if module in numbers}
    found = {}
    for name, module in model.named_modules():
        short = name.removeprefix("model.")
        inside = [prefix for prefix in prefixes if name == prefix or name.startswith(f"{prefix}.")]
        if inside:
            prefix = max(inside, key=len)
            found[module] = Place(short, prefixes[prefix], name[len(prefix) + 1 :])
        else:
            found[module] = Place(short, None, short)
    return found


def _beside(path: str, matrix: str) -> str:
    parent = path.rpartition(".")[0]
    return f"{parent}.{matrix}" if parent else matrix
