"""Causal self-attention that looks back over a fixed number of positions, with a memory of fixed size."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternlm.errors import SettingsError
from ternlm.nn.initialization import normal_
from ternlm.ops.chunking import at_least_float32
from ternlm.ops.rotary import rotary_table, rotate


class AttentionState(NamedTuple):
    """The last positions of each row, as far back as the next one may look.

    Attributes:
        keys, values: (B, heads, window - 1, head_dim), float32, oldest first, filled from the right; keys are not
            rotated, so that no position grows beyond all bounds.
        filled: How many of them are, (B,) int64.
    """

    keys: Tensor
    values: Tensor
    filled: Tensor


class WindowedAttention(nn.Module):
    """o_i = softmax over 0 <= i - j < window of (q_i k_j / sqrt(e)) times v_j, then the output projection.

    Queries and keys are rotated by their positions, of which only differences matter: positions are counted anew in
    each block of `window` queries, which sees the block before it and itself. Time and memory grow with
    time * window. All four projections stay in full precision.

    Args:
        width: Width of the residual stream.
        heads: Attention heads, each of an even width.
        window: Positions that one sees, itself included.
        theta: Base of the rotary frequencies.

    Raises:
        SettingsError: Heads do not share the width evenly, or the window is empty.

    Source:
        Beltagy et al. 2020, Longformer, section 3.1 (arXiv 2004.05150); rotary positions, Su et al. 2021
        (arXiv 2104.09864).
    """

    rotary: Tensor

    def __init__(self, width: int, heads: int, window: int, theta: float = 10_000.0) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise SettingsError(
                f"{heads} attention heads do not divide a width of {width} into heads of an even width. "
                "Choose a number of heads whose double divides the width."
            )
        if window < 1:
            raise SettingsError(f"an attention window of {window} sees nothing. Choose 1 or more.")
        self.heads, self.head_dim, self.window = heads, width // heads, window
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.register_buffer("rotary", rotary_table(2 * window - 1, self.head_dim, theta), persistent=False)

    def initialize(self, std: float, output_std: float, seed: int, name: str) -> None:
        """Draw all matrices from N(0, std^2), the output projection from N(0, output_std^2)."""
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = self.get_parameter(f"{part}.weight")
            normal_(weight, output_std if part == "o_proj" else std, seed, f"{name}.{part}")

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> AttentionState:
        """Empty memory for `batch_size` rows."""
        shape = (batch_size, self.heads, self.window - 1, self.head_dim)
        filled = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return AttentionState(torch.zeros(shape, device=device), torch.zeros(shape, device=device), filled)

    def forward(
        self,
        x: Tensor,
        starts: Tensor | None = None,
        state: AttentionState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attend within x and to the memory.

        Args:
            x: (B, T, width).
            starts: (1, T) bool for packed rows, True where a sequence starts; not together with a state.
            state: What came before; None is nothing.
            lengths: (B,) int64 for ragged rows.

        Returns:
            (B, T, width), and the next memory if one was given.

        Raises:
            ValueError: Packed rows came with a state.
        """
        if starts is not None and state is not None:
            raise ValueError("packed rows cannot continue after a state; pad them instead")
        batch, time, _ = x.shape
        if not time:
            return x, state
        q, k, v = self._project(x)
        before = self.initial_state(batch, x.device) if state is None else state
        keys = torch.cat((before.keys.to(k.dtype), k), dim=2)
        values = torch.cat((before.values.to(v.dtype), v), dim=2)
        o = self._attend(q, keys, values, self._sequences(before, time, starts))
        y = F.linear(o.transpose(1, 2).flatten(2), self.o_proj.weight.to(x.dtype))
        return y, None if state is None else self._next_state(state, keys, values, lengths)

    def _project(self, x: Tensor) -> list[Tensor]:
        """Heads first: (B, heads, T, head_dim) each."""
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        return [F.linear(x, w.to(x.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in matrices]

    def _sequences(self, before: AttentionState, time: int, starts: Tensor | None) -> Tensor:
        """Number of the sequence to which each place of memory and row belongs, (B, window - 1 + T); -1 is none."""
        places = torch.arange(self.window - 1, device=before.filled.device)
        memory = (places >= self.window - 1 - before.filled[:, None]).long() - 1
        row = memory.new_zeros(memory.shape[0], time) if starts is None else starts.cumsum(dim=1)
        return torch.cat((memory, row), dim=1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, sequences: Tensor) -> Tensor:
        """(B, heads, T, head_dim), block by block: queries of one block share their keys."""
        batch, time = q.shape[0], q.shape[2]
        size = min(self.window, time)
        blocks = -(-time // size)
        reach, spare = self.window - 1 + size, blocks * size - time
        # What is added behind the row belongs to its last sequence, so every query sees at least itself.
        sequences = torch.cat((sequences, sequences[:, -1:].expand(-1, spare)), dim=1)
        q = F.pad(q, (0, 0, 0, spare)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
        keys, values = (
            F.pad(part, (0, 0, 0, spare)).unfold(2, reach, size).permute(0, 2, 1, 4, 3).flatten(0, 1)
            for part in (keys, values)
        )
        of_query = sequences[:, self.window - 1 :].unflatten(1, (blocks, size))
        of_key = sequences.unfold(1, reach, size)
        ahead = torch.arange(reach, device=q.device) - torch.arange(size, device=q.device)[:, None]
        visible = (ahead >= 0) & (ahead < self.window) & (of_query[..., None] == of_key[:, :, None])
        cos, sin = self.rotary[:, :reach].unbind()
        q = rotate(q, cos[self.window - 1 :], sin[self.window - 1 :])
        keys = rotate(keys, cos, sin)
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible.flatten(0, 1)[:, None])
        return o.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :time]

    def _next_state(
        self, state: AttentionState, keys: Tensor, values: Tensor, lengths: Tensor | None
    ) -> AttentionState:
        time = keys.shape[2] - (self.window - 1)
        if lengths is None:
            lengths = torch.full_like(state.filled, time)
        places = lengths[:, None] + torch.arange(self.window - 1, device=keys.device)
        index = places[:, None, :, None].expand(-1, self.heads, -1, self.head_dim)
        keys, values = (at_least_float32(part.gather(2, index)) for part in (keys, values))
        return AttentionState(keys, values, (state.filled + lengths).clamp_max(self.window - 1))
