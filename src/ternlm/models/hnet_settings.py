"""Settings of the `hnet` family: widths and depths of stages, how bytes become chunks, and who learns how fast."""

import math
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ternlm.models.hgrn_block import RecurrentSettings
from ternlm.settings import Count, Float

LayerKind = Literal["x", "a"]
"""A block of the innermost stack: ``x`` recurrent, ``a`` attention."""


class HNetSettings(RecurrentSettings):
    """Shape of an `hnet` model: an outer stage for each chunking, and the innermost stack.

    Attributes:
        d_model: Width of each stage, outermost first; none is narrower than the one before.
        num_blocks: Blocks of each stage: ``[encoder, 0, decoder]`` of an outer one, where the 0 stands for the stages
            inside it, and ``[blocks]`` of the innermost.
        chunk_targets: How many positions of each outer stage one chunk should hold on average, outermost first, or one
            number for all; None is 6 for one chunking and 3 for each of several.
        ratio_loss_weight: Weight of the loss that pulls the chunks to that length; without it nothing does.
        lr_multipliers: Learning rate of each stage, outermost first, as a multiple of the optimizer's, which is that
            of the innermost; ``formula`` for those of the paper; None is 1 for the innermost and half more for each
            stage around it.
        max_chunk_fraction: Most chunks of a row in training, as a share of its positions; the surplus joins the last
            chunk. None leaves them alone.
        chunk_layout: ``packed`` computes all rows of a batch one behind the other, so that no chunk is padding;
            ``padded`` keeps a row of chunks for each row of the batch. The same network.
        innermost_use_attention: Let attention blocks take turns with recurrent ones in the innermost stack.
        attention_layers_pattern: Order of the two kinds, ``x`` recurrent and ``a`` attention, repeated to the depth
            of the innermost stack; None is ``xa``.
        attention_num_heads: Attention heads; None makes them 64 channels wide.
        attention_window_size: Chunks that an attention block looks back over, the current one included.

    Source:
        Hwang et al. 2025, H-Net (arXiv 2507.07955).
    """

    family: Literal["hnet"] = "hnet"
    d_model: tuple[Count, ...] = (256, 384)
    num_blocks: tuple[tuple[Count, ...], ...] = ((4, 0, 4), (8,))
    embedding_init_std: Float = Field(default=1.0, gt=0)
    chunk_targets: Float | tuple[Float, ...] | None = None
    ratio_loss_weight: Float = Field(default=0.03, ge=0)
    lr_multipliers: Literal["formula"] | tuple[Float, ...] | None = None
    max_chunk_fraction: Float | None = Field(default=None, gt=0, le=1)
    chunk_layout: Literal["packed", "padded"] = "packed"
    innermost_use_attention: bool = False
    attention_layers_pattern: str | None = None
    attention_num_heads: Count | None = Field(default=None, ge=1)
    attention_window_size: Count = Field(default=64, ge=1)

    @field_validator("d_model")
    @classmethod
    def _widths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not 2 <= len(value) <= 8:
            raise ValueError("it must have 2 to 8 widths; the model without chunks is family hgrn")
        if min(value) < 1 or any(inner < outer for outer, inner in pairwise(value)):
            raise ValueError("widths must be at least 1, and none narrower than the one before")
        return value

    @field_validator("num_blocks")
    @classmethod
    def _depths(cls, value: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for entry in value[:-1]:
            if len(entry) != 3 or entry[1] != 0 or min(entry[0], entry[2]) < 1:
                raise ValueError(
                    f"the entry {list(entry)} of an outer stage must be [encoder blocks, 0, decoder blocks], both at "
                    "least 1; the 0 stands for the stages inside"
                )
        if not value or len(value[-1]) != 1 or value[-1][0] < 1:
            raise ValueError("its last entry, the innermost stage, must be [blocks], at least 1")
        return value

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        stages = len(self.d_model)
        if len(self.num_blocks) != stages:
            raise ValueError(
                f"model.num_blocks has {len(self.num_blocks)} entries and model.d_model {stages} widths; "
                "give one entry for each stage"
            )
        if isinstance(self.chunk_targets, tuple) and len(self.chunk_targets) != stages - 1:
            raise ValueError(
                f"model.chunk_targets={list(self.chunk_targets)} must be one number for each of the {stages - 1} "
                "chunkings, or one number for all"
            )
        if not min(self.targets) > 1:
            raise ValueError(f"model.chunk_targets={_plain(self.chunk_targets)} must lie above 1, as 1 would not chunk")
        if isinstance(self.lr_multipliers, tuple) and (
            len(self.lr_multipliers) != stages or not min(self.lr_multipliers) > 0
        ):
            raise ValueError(
                f"model.lr_multipliers={list(self.lr_multipliers)} must be one number above 0 for each of the "
                f"{stages} stages, or formula"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        pattern, depth = self.attention_layers_pattern, self.num_blocks[-1][0]
        if pattern is not None and (not pattern or set(pattern) - {"x", "a"} or len(pattern) > depth):
            raise ValueError(
                f"model.attention_layers_pattern={pattern!r} must be 1 to {depth} letters, one for each innermost "
                "block: x for a recurrent one, a for attention"
            )
        if self.innermost_use_attention and self.d_model[-1] % (2 * self.attention_heads):
            way_out = "a number whose double divides it" if self.d_model[-1] % 2 == 0 else "an even width"
            raise ValueError(
                f"model.attention_num_heads={self.attention_heads} cannot share the innermost width of "
                f"{self.d_model[-1]}; choose {way_out}"
            )
        return self

    @property
    def num_stages(self) -> int:
        """Stages, one more than chunkings."""
        return len(self.d_model)

    @property
    def total_blocks(self) -> int:
        """How many blocks the model has, in all stages."""
        return sum(sum(entry) for entry in self.num_blocks)

    @property
    def targets(self) -> tuple[float, ...]:
        """Positions per chunk that each chunking should reach, N."""
        chunkings = len(self.d_model) - 1
        if self.chunk_targets is None:
            return (6.0,) if chunkings == 1 else (3.0,) * chunkings
        return self.chunk_targets if isinstance(self.chunk_targets, tuple) else (self.chunk_targets,) * chunkings

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Learning rate of each stage as a multiple of the innermost one's.

        The formula is sqrt(prod(N_i, i >= s) D_S / D_s): tokens per batch fall, and widths grow, from stage to stage.

        Source:
            Hwang et al. 2025, eq. 11 (arXiv 2507.07955).
        """
        if isinstance(self.lr_multipliers, tuple):
            return self.lr_multipliers
        inner = self.num_stages - 1
        if self.lr_multipliers is None:
            return tuple(1 + 0.5 * (inner - stage) for stage in range(self.num_stages))
        return tuple(
            math.sqrt(math.prod(self.targets[stage:]) * self.d_model[-1] / width)
            for stage, width in enumerate(self.d_model)
        )

    @property
    def residual_additions(self) -> tuple[int, ...]:
        """For each stage, sub-layers that add to a residual stream in it and in all stages around it, two per block."""
        depths = [2 * sum(entry) for entry in self.num_blocks]
        return tuple(sum(depths[: stage + 1]) for stage in range(self.num_stages))

    @property
    def attention_heads(self) -> int:
        """Heads of an attention block."""
        return self.attention_num_heads or max(1, self.d_model[-1] // 64)

    @property
    def innermost_layers(self) -> str:
        """The innermost stack block by block, ``x`` recurrent and ``a`` attention."""
        depth = self.num_blocks[-1][0]
        if not self.innermost_use_attention:
            return "x" * depth
        pattern = self.attention_layers_pattern or "xa"
        return (pattern * depth)[:depth]

    def flops_per_token(self, context: int) -> float:
        """sum_s share_s (blocks_s + 18 D_s^2) + 6 V D_0, with share_s = 1 / prod(N_i, i < s).

        The share of positions that reach a stage is the one that `chunk_targets` asks for, not the one that training
        reaches; the 18 D^2 are router and residual projection of an outer stage. An attention block costs what its
        matrices do and 12 D times its window.
        """
        share, total = 1.0, 0.0
        for width, entry, target in zip(self.d_model[:-1], self.num_blocks, self.targets, strict=False):
            total += share * (sum(entry) * self.block_flops(width) + 18.0 * width * width)
            share /= target
        width, kinds = self.d_model[-1], self.innermost_layers
        window = min(self.attention_window_size, math.ceil(context * share))
        attention = 6.0 * width * (4 * width + 3 * self.feed_forward_width(width) + 2 * window)
        total += share * (kinds.count("x") * self.block_flops(width) + kinds.count("a") * attention)
        return total + 6.0 * (self.vocab_size or 0) * self.d_model[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
