"""The gated recurrence against a hand-written loop over time, and its memory across calls."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from builders import randn
from ternlm.errors import SettingsError
from ternlm.nn.gated_recurrence import GatedRecurrence, RecurrenceSettings, RecurrentState
from ternlm.nn.initialization import normal_
from ternlm.nn.quantization import FULL_PRECISION, QuantizationMode

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm each": {"bitlinear_norm": "rms", "bitlinear_norm_eps": 1e-8},
    "no inner norm": {"bitlinear_norm": "none"},
    "first published gate": {"output_gate": "norm_g_silu_h"},
    "two convolutions": {"use_short_conv": True},
    "shared convolution": {"use_short_conv": True, "share_conv_kernel": True, "conv_size": 3},
    "wide": {"expand_ratio": 1.5},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def mixer(mode: QuantizationMode = FULL_PRECISION, width: int = 14, seed: int = 1, **overrides: Any) -> GatedRecurrence:
    """A mixer with weights that matter and gains that are not 1."""
    made = GatedRecurrence(RecurrenceSettings(**overrides), width, mode)
    for name, parameter in made.named_parameters():
        normal_(parameter, 0.5 if parameter.dim() == 2 else 0.2, seed, name)
        if parameter.dim() == 1:
            parameter.data.add_(1)
    return made


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    channels, taps = kernel.shape
    return F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), kernel[:, None], groups=channels).transpose(1, 2)


def oracle(m: GatedRecurrence, x: Tensor, bound: Tensor | None, settings: RecurrenceSettings) -> Tensor:
    """The equations of the documentation, one position after the other, from the parameters."""
    p, eps = dict(m.named_parameters()), settings.rms_norm_eps
    inner_eps = settings.bitlinear_norm_eps or eps
    if "conv" in p:
        x = F.silu(causal_convolution(x, p["conv"]))
    if settings.bitlinear_norm == "rms":
        i, f, g = (rms(x, p[f"{n}_inner_norm.weight"], inner_eps) @ p[f"{n}.weight"].t() for n in "ifg")
    else:
        i, f, g = (x @ p["ifg.weight"].t()).chunk(3, dim=-1)
    if "i_conv" in p:
        i, f = causal_convolution(i, p["i_conv"]), causal_convolution(f, p["f_conv"])
    s = torch.sigmoid(f)
    keep = s if bound is None else bound + (1 - bound) * s
    h, states = torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):
        h = keep[:, t] * h + (1 - keep[:, t]) * F.silu(i[:, t])
        states.append(h)
    y = torch.stack(states, dim=1)
    gain = p["g_norm.weight"]
    y = rms(y, gain, eps) * F.silu(g) if settings.output_gate == "norm_h_silu_g" else rms(g, gain, eps) * F.silu(y)
    if settings.bitlinear_norm != "none":
        y = rms(y, p["o_inner_norm.weight"], inner_eps)
    return y @ p["o.weight"].t()


@every_variant
@pytest.mark.parametrize("bounded", [False, True])
def test_h08_h10_the_mixer_equals_its_equations_in_value_and_gradient(variant: str, bounded: bool) -> None:
    settings = RecurrenceSettings(**VARIANTS[variant])
    m, x = mixer(**VARIANTS[variant]), randn(2, 11, 14).requires_grad_()
    bound = torch.rand(m.recurrence_width, generator=torch.Generator().manual_seed(3)) if bounded else None
    if bound is not None:
        bound.requires_grad_()
    y, state = m(x, bound)
    expected = oracle(m, x, bound, settings)
    assert state is None
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    leaves, upstream = [x, *m.parameters(), *([] if bound is None else [bound])], randn(2, 11, 14, seed=4)
    got, wanted = (torch.autograd.grad((z * upstream).sum(), leaves) for z in (y, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_h08_the_two_output_gates_differ() -> None:
    x = randn(2, 5, 14)
    first, second = (mixer(output_gate=gate)(x, None)[0] for gate in ("norm_h_silu_g", "norm_g_silu_h"))
    assert (first - second).abs().max() > 0.1


def test_the_scan_does_not_depend_on_how_it_is_computed() -> None:
    m, x = mixer(), randn(2, 37, 14)
    results = []
    for m.scan_impl, m.scan_chunk in (("reference", 1), ("chunk", 5), ("chunk", 32), ("auto", 32)):
        results.append(m(x, None)[0])
    for y in results[1:]:
        torch.testing.assert_close(y, results[0], rtol=1e-4, atol=1e-5)


@every_variant
def test_h11_any_pieces_with_a_state_equal_one_pass(variant: str) -> None:
    m, x = mixer(**VARIANTS[variant]), randn(3, 13, 14)
    bound = torch.full((m.recurrence_width,), 0.25)
    whole, _ = m(x, bound)
    state, pieces = m.initial_state(3), []
    for piece in x.split([4, 1, 1, 5, 2], dim=1):
        y, state = m(piece, bound, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@every_variant
def test_h11_ragged_rows_leave_the_state_of_their_last_real_position(variant: str) -> None:
    m, x, lengths = mixer(**VARIANTS[variant]), randn(4, 9, 14), torch.tensor([9, 2, 0, 5])
    _, before = m(randn(4, 3, 14, seed=5), None, state=m.initial_state(4))
    _, after = m(x, None, state=before, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = RecurrentState(before.h[[row]], tuple(ring[[row]] for ring in before.rings))
        if length:
            _, alone = m(x[[row], :length], None, state=alone)
        torch.testing.assert_close(after.h[[row]], alone.h, rtol=1e-4, atol=1e-5)
        for a, b in zip(after.rings, alone.rings, strict=True):
            torch.testing.assert_close(a[[row]], b, rtol=1e-4, atol=1e-5)


@every_variant
def test_h13_packed_sequences_equal_separate_ones_in_value_and_gradient(variant: str) -> None:
    m, x, lengths = mixer(**VARIANTS[variant]), randn(1, 12, 14).requires_grad_(), [5, 1, 2, 4]
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [0, 5, 6, 8]] = True
    packed, _ = m(x, None, starts)
    separate = torch.cat([m(piece, None)[0] for piece in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)
    leaves, upstream = [x, *m.parameters()], randn(1, 12, 14, seed=4)
    got, wanted = (torch.autograd.grad((z * upstream).sum(), leaves) for z in (packed, separate))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_h09_h05_the_state_has_the_documented_shape_and_is_float32() -> None:
    m = mixer(expand_ratio=1.5, use_short_conv=True, conv_size=3)
    assert m.recurrence_width == 21
    _, state = m(randn(2, 5, 14).bfloat16(), None, state=m.initial_state(2))
    assert state is not None and state.h.shape == (2, 21)
    assert [ring.shape for ring in state.rings] == [(2, 21, 2), (2, 21, 2)]
    assert {state.h.dtype, *(ring.dtype for ring in state.rings)} == {torch.float32}
    shared = mixer(use_short_conv=True, share_conv_kernel=True).initial_state(2)
    assert [ring.shape for ring in shared.rings] == [(2, 14, 3)]


def test_h05_the_scan_is_fed_float32_whatever_the_type_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    from ternlm.nn import gated_recurrence

    seen, inner = [], gated_recurrence.scan

    def spy(a: Tensor, u: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append({a.dtype, u.dtype, *(() if h0 is None else (h0.dtype,))})
        return inner(a, u, h0, *rest)

    monkeypatch.setattr(gated_recurrence, "scan", spy)
    m = mixer(QuantizationMode())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y, _ = m(randn(2, 5, 14).to(dtype), None, state=m.initial_state(2))
        assert y.dtype == dtype
    assert seen == [{torch.float32}] * 3


def test_a_step_changes_no_state_in_place() -> None:
    m = mixer(use_short_conv=True)
    _, state = m(randn(2, 5, 14), None, state=m.initial_state(2))
    assert state is not None
    copies = [tensor.clone() for tensor in (state.h, *state.rings)]
    m(randn(2, 1, 14, seed=8), None, state=state)
    assert all(torch.equal(a, b) for a, b in zip((state.h, *state.rings), copies, strict=True))


def test_h12_reordered_rows_go_on_as_they_would_have() -> None:
    m, order = mixer(use_short_conv=True), torch.tensor([2, 0, 1])
    _, state = m(randn(3, 6, 14), None, state=m.initial_state(3))
    assert state is not None
    following = randn(3, 2, 14, seed=6)
    y, _ = m(following, None, state=state)
    moved = RecurrentState(state.h[order], tuple(ring[order] for ring in state.rings))
    torch.testing.assert_close(m(following[order], None, state=moved)[0], y[order], rtol=1e-5, atol=1e-6)


def test_memory_never_exceeds_the_largest_input_it_has_seen() -> None:
    m = mixer()
    _, state = m(30 * randn(2, 200, 14), torch.full((14,), 0.9), state=m.initial_state(2))
    assert state is not None
    i = F.silu((30 * randn(2, 200, 14) @ m.ifg.weight.t()).chunk(3, dim=-1)[0])  # type: ignore[union-attr]
    assert bool((state.h.abs() <= i.abs().amax(dim=1) * (1 + 1e-5)).all())


def test_a_bound_of_one_keeps_what_is_remembered() -> None:
    m = mixer()
    _, state = m(randn(2, 5, 14), None, state=m.initial_state(2))
    assert state is not None
    _, after = m(randn(2, 7, 14, seed=3), torch.ones(14), state=state)
    assert after is not None and torch.equal(after.h, state.h)


def test_convolutions_are_drawn_by_name_and_keep_the_variance() -> None:
    m = mixer(use_short_conv=True, width=400)
    m.initialize_convolutions(3, "layer")
    first = m.i_conv.detach().clone()  # type: ignore[union-attr]
    assert first.std().item() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(first, m.f_conv.detach())  # type: ignore[union-attr]
    m.initialize_convolutions(3, "layer")
    assert torch.equal(first, m.i_conv.detach())  # type: ignore[union-attr]


def test_the_merged_projections_keep_a_scale_each() -> None:
    m = mixer(QuantizationMode())
    assert m.ifg is not None and list(m.ifg.out_features) == ["i_proj", "f_proj", "g_proj"]
    m.ifg.refresh()
    assert m.ifg.scale.shape == (3,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conv_size": 1}, "conv_size"),
        ({"expand_ratio": 0}, "expand_ratio"),
        ({"expand_ratio": 1000}, "expand_ratio"),
        ({"output_gate": "norm"}, "output_gate"),
        ({"bitlinear_norm": "all"}, "bitlinear_norm"),
        ({"scan_impl": "fast"}, "scan_impl"),
        ({"scan_chunk": 0}, "scan_chunk"),
    ],
)
def test_settings_that_make_no_mixer_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RecurrenceSettings.from_mapping(values, "model")
