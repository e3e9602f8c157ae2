"""Models under test: what a step does, what a turn does, and what of it is counted."""

import math
from typing import Any

import pytest
import torch

from ternlm.benchmark.candidate import Candidate
from ternlm.benchmark.inference import compare_inference
from ternlm.benchmark.memory import bytes_of, tensor_peak_mb
from ternlm.benchmark.peers import PEERS, require_peer
from ternlm.benchmark.subject import OwnSubject, Work
from ternlm.benchmark.training import compare_training
from ternlm.errors import EnvironmentFault, SettingsError

CPU = torch.device("cpu")
BITNET: dict[str, Any] = {
    "family": "bitnet", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bitnet": BITNET,
    "hgrn": {"family": "hgrn", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2},
    "qdyt": {
        "family": "qdyt", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 32,
    },
}  # fmt: skip
TERNARY, FULL = {"weights": "ternary"}, {"weights": "none", "activations": "none"}


def candidate(name: str, model: dict[str, Any] = BITNET, **values: Any) -> Candidate:
    return Candidate(name, "own", model=model, quantization=FULL if name == "full" else TERNARY, **values)


def built(one: Candidate) -> OwnSubject:
    subject = one.build(CPU, trains=True)
    assert isinstance(subject, OwnSubject)
    subject.dtype = subject.model.compute_dtype = torch.float32
    return subject


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_compared_with_the_first_full_precision_model(family: str) -> None:
    subjects = [built(candidate(name, FAMILIES[family])) for name in ("ternary", "full")]
    result = compare_training(subjects, [Work(3, 17), Work(2, 11)], warmup=1, repeats=3)
    ternary, full = result["rows"]
    assert (result["base"], result["clock"]) == ("full", "cpu")
    assert full["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ternary["ratio"]["low"] <= ternary["ratio"]["median"] <= ternary["ratio"]["high"]
    assert (ternary["tokens_per_step"], full["tokens_per_step"]) == (51, 22)
    assert all(math.isfinite(row["loss"]) and row["joules_per_token"] is None for row in result["rows"])


def test_p04_tokens_per_second_are_the_tokens_of_a_step_by_the_wall_time_of_it() -> None:
    row = compare_training([built(candidate("full"))], Work(3, 17), repeats=4)["rows"][0]
    assert row["tokens_per_sec"] == pytest.approx(51 / (row["step_wall_ms"]["median"] / 1e3))


def test_a_ratio_is_by_token_where_batches_differ() -> None:
    subjects = [built(candidate("full")), built(candidate("ternary"))]
    small, large = Work(1, 8), Work(4, 32)
    rows = compare_training(subjects, [large, small], repeats=4, measures_memory=False)["rows"]
    by_step = rows[1]["step_cpu_ms"]["median"] / rows[0]["step_cpu_ms"]["median"]
    assert rows[1]["ratio"]["median"] > 4 * by_step  # 16 times as many tokens in a step of the base


def test_a_step_trains() -> None:
    subject = built(candidate("ternary"))
    before = {name: tensor.clone() for name, tensor in subject.model.named_parameters()}
    subject.begin_training(Work(2, 9), print)
    losses = [subject.training_step() for _ in range(3)]
    assert losses[2] < losses[0]
    assert all(not torch.equal(before[name], tensor) for name, tensor in subject.model.named_parameters())


@pytest.mark.parametrize("family", ["bitnet", "hgrn"])
def test_decoding_gives_the_logits_of_reading_everything_at_once(family: str) -> None:
    subject = built(candidate("full", FAMILIES[family]))
    subject.begin_inference()
    tokens = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    subject.prefill(tokens[:, :5])
    subject.decode(tokens[:, 5])
    step_by_step = subject.decode(tokens[:, 6])
    torch.testing.assert_close(step_by_step, subject.prefill(tokens), rtol=1e-4, atol=1e-5)


def test_latencies_are_those_of_all_tokens() -> None:
    subjects = [built(candidate("ternary")), built(candidate("full"))]
    result = compare_inference(subjects, prompt_length=9, new_tokens=5, rows=2, repeats=3)
    for row in result["rows"]:
        latency = row["decode"]["wall_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert row["prefill"]["wall_ms"]["low"] <= row["prefill"]["wall_ms"]["high"]
        assert row["tensors_mb"] > row["weights_mb"] > 0
    assert result["rows"][1]["decode"]["ratio"]["median"] == 1


def test_an_encoder_only_reads() -> None:
    row = compare_inference([built(candidate("ternary", FAMILIES["qdyt"]))], 9, 5, repeats=2)["rows"][0]
    assert row["decode"] is None
    assert row["prefill"]["tokens_per_sec"] > 0


def test_a_file_has_two_bits_per_ternary_weight_and_sixteen_for_the_rest() -> None:
    ternary, full = built(candidate("ternary")), built(candidate("full"))
    counts, layers = ternary.parameter_counts(), ternary.model.bit_linears().values()
    codes = sum(sum(layer.sizes) * 64 * math.ceil(layer.in_features / 256) for layer in layers)
    matrices = sum(len(layer.sizes) for layer in layers)
    assert ternary.disk_bytes() == codes + 4 * matrices + 2 * (counts.embedding + counts.other)
    assert full.disk_bytes() == 2 * counts.total


def test_live_tensors_are_what_is_held_and_the_most_that_a_call_adds() -> None:
    held = torch.zeros(2**18)
    shared = held.view(2, -1)

    def call() -> None:
        first = torch.zeros(2**19, dtype=torch.uint8)
        del first
        torch.zeros(3 * 2**20, dtype=torch.uint8)

    assert bytes_of([held, shared]) == 2**20
    assert tensor_peak_mb(call, [held, shared], CPU) == pytest.approx(4.0, abs=0.01)


def test_on_a_gpu_the_tensors_of_other_models_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    held, others, most = torch.zeros(2**18), 50 * 2**20, []  # 1 MiB beside 50 MiB of somebody else
    allocator = {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: others + 2**20,
        "max_memory_allocated": lambda device: others + 2**20 + max(most),
    }
    for name, answer in allocator.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert tensor_peak_mb(lambda: most.append(3 * 2**20), [held], torch.device("cuda")) == 4.0


@pytest.mark.parametrize("peer", ["published", "transformers"])
def test_p06_a_peer_computes_the_same_network_on_the_same_weights(peer: str) -> None:
    if peer != "published":
        pytest.importorskip("transformers")
    ours, theirs = built(candidate("ternary")), built(candidate("ternary").with_peer(peer))
    for subject in (ours, theirs):
        subject.begin_training(Work(2, 9), print)
    assert theirs.is_quantized
    with torch.compiler.set_stance("force_eager"):  # transformers compiles its quantizers
        assert theirs.training_step() == pytest.approx(ours.training_step(), rel=1e-3)
    full = built(candidate("full"))
    full.begin_training(Work(2, 9), print)
    assert abs(full.training_step() - ours.training_step()) > 1e-6


def test_a_peer_does_not_fit_where_inputs_are_rounded_elsewhere() -> None:
    with pytest.raises(SettingsError, match="qdyt"):
        candidate("ternary", FAMILIES["qdyt"]).with_peer("published").build(CPU, trains=True)


def test_a_peer_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "absent", PEERS["torchao"]._replace(package="no-such-package-anywhere"))
    with pytest.raises(EnvironmentFault, match="pip install no-such-package-anywhere"):
        require_peer("absent", CPU)
    with pytest.raises(SettingsError, match="published"):
        require_peer("unheard-of", CPU)


def test_the_torchao_peer_trains_where_it_is_installed() -> None:
    pytest.importorskip("torchao")
    ours, theirs = built(candidate("ternary")), built(candidate("ternary").with_peer("torchao"))
    for subject in (ours, theirs):
        subject.begin_training(Work(3, 16), print)
    assert theirs.training_step() == pytest.approx(ours.training_step(), rel=1e-2)


def test_a_model_of_transformers_is_measured_like_ours() -> None:
    pytest.importorskip("transformers")
    shape = {
        "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 32,
    }  # fmt: skip
    subject = Candidate("theirs", "hugging_face", model=shape).build(CPU, trains=True)
    linear = 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40) + 61 * 24
    assert subject.flops_per_token(8) == 6 * (linear + 2 * 2 * 24 * 8)
    assert subject.parameter_counts().embedding == 2 * 61 * 24
    row = compare_training([subject], Work(2, 8), repeats=2)["rows"][0]
    assert math.isfinite(row["loss"])
    assert not row["is_quantized"]
    assert compare_inference([subject], 8, 3, repeats=2)["rows"][0]["decode"]["tokens_per_sec"] > 0
