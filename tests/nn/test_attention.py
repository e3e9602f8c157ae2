"""Causal attention with grouped queries against plain softmax attention, and its cache against the full pass."""

import pytest
import torch

from builders import randn
from ternlm.nn.attention import CausalAttention, KeyValueCache
from ternlm.nn.initialization import normal_
from ternlm.nn.quantization import FULL_PRECISION
from ternlm.ops.rotary import rotary_table, rotate

WIDTH, HEADS, HEAD_DIM, TIME = 24, 4, 6, 9
TABLE = rotary_table(TIME, HEAD_DIM, 10_000.0)


def attention(key_value_heads: int, eps: float | None = None) -> CausalAttention:
    made = CausalAttention(WIDTH, HEADS, key_value_heads, FULL_PRECISION, eps)
    for name, parameter in made.named_parameters():
        normal_(parameter, 0.4, 1, name)
    return made


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_attention_equals_its_formula_head_by_head(key_value_heads: int, eps: float | None) -> None:
    made, x = attention(key_value_heads, eps), randn(2, TIME, WIDTH)
    q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)) for part in made.qkv(x))
    assert k.shape[2] == v.shape[2] == key_value_heads
    heads = []
    for head in range(HEADS):
        shared = head * key_value_heads // HEADS
        query, key = (rotate(part[:, None], *TABLE.unbind())[:, 0] for part in (q[:, :, head], k[:, :, shared]))
        scores = query @ key.transpose(1, 2) * HEAD_DIM**-0.5
        scores = scores.masked_fill(torch.ones(TIME, TIME, dtype=torch.bool).triu(1), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, :, shared])
    o = torch.cat(heads, dim=-1)
    if eps is not None:
        o = o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * made.attn_sub_norm.weight
    torch.testing.assert_close(made(x, TABLE), o @ made.o.weight.t(), rtol=1e-4, atol=1e-5)


def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values() -> None:
    grouped, full, x = attention(2), attention(4), randn(3, TIME, WIDTH)
    q, k, v = grouped.qkv.weight.detach().split(grouped.qkv.sizes)
    repeated = [part.unflatten(0, (2, HEAD_DIM)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v)]
    with torch.no_grad():
        full.qkv.weight.copy_(torch.cat([q, *repeated]))
        full.o.weight.copy_(grouped.o.weight)
    torch.testing.assert_close(grouped(x, TABLE), full(x, TABLE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [(9,), (4, 5), (1,) * 9, (6, 1, 2)])
def test_the_cache_equals_the_full_pass_however_the_tokens_arrive(chunks: tuple[int, ...]) -> None:
    made, x = attention(2), randn(3, TIME, WIDTH)
    cache = KeyValueCache(*(torch.full((3, 2, TIME, HEAD_DIM), torch.nan) for _ in "kv"))
    outputs, start = [], 0
    for part in x.split(list(chunks), dim=1):
        positions = torch.arange(start, start + part.shape[1]).expand(3, -1)
        outputs.append(made.forward_cached(part, TABLE[:, positions][:, :, None], cache, positions))
        start += part.shape[1]
    torch.testing.assert_close(torch.cat(outputs, dim=1), made(x, TABLE), rtol=1e-4, atol=1e-5)


def test_rows_stand_at_their_own_positions_in_the_cache() -> None:
    made, x = attention(2), randn(1, TIME, WIDTH)
    cache = KeyValueCache(*(torch.zeros(2, 2, TIME, HEAD_DIM) for _ in "kv"))
    tokens, positions = torch.stack([x[0, :4], x[0, :4]]), torch.arange(4).expand(2, -1)
    made.forward_cached(tokens, TABLE[:, positions][:, :, None], cache, positions)
    positions = torch.tensor([[4], [2]])  # the second row overwrites its third token
    y = made.forward_cached(x[0, [4, 2]][:, None], TABLE[:, positions][:, :, None], cache, positions)
    full = made(x, TABLE)
    torch.testing.assert_close(y[:, 0], full[0, [4, 2]], rtol=1e-4, atol=1e-5)
