"""Initial draws depend on (seed, name) alone."""

import torch

from ternlm.nn.initialization import normal_


def draw(seed: int, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    normal_(tensor, 0.5, seed, name)
    return tensor


def test_a_draw_depends_on_seed_and_name_and_nothing_else() -> None:
    first = draw(3, "a", 7, 5)
    torch.manual_seed(99)
    draw(3, "other", 2, 2)
    assert torch.equal(draw(3, "a", 7, 5), first)
    assert not torch.equal(draw(4, "a", 7, 5), first)
    assert not torch.equal(draw(3, "b", 7, 5), first)


def test_a_draw_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    draw(1, "a", 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_has_the_standard_deviation_asked_for() -> None:
    values = draw(1, "a", 200, 500)
    assert abs(values.std().item() - 0.5) < 0.005 and abs(values.mean().item()) < 0.01


def test_a_draw_in_another_precision_is_the_same_draw_rounded() -> None:
    assert torch.equal(draw(1, "a", 9, dtype=torch.bfloat16), draw(1, "a", 9).bfloat16())
