"""What autograd keeps for the backward pass, counted, against the estimate of `ternlm plan`.

    python benchmarks/activation_memory.py

One forward pass of each recipe on four sequences on the CPU, bfloat16. Every tensor that autograd saves is counted once
by its storage; parameters and buffers are not counted. `early` is the phase in which quantizers are perturbed, `late`
the one in which they only round. Writes benchmarks/results/activation_memory-DATE.json.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternlm.models import build_model
from ternlm.models.prediction import predict
from ternlm.recipes import load_recipe
from ternlm.settings.resolve import Layer, parse_overrides
from ternlm.training.launch import settings_from
from ternlm.training.objective import loss_sums
from ternlm.training.plan import activation_bytes
from ternlm.training.settings import RunSettings, resolve_settings

ROWS, STEPS = 4, 100_000
CASES = {
    "qdyt-small": [],
    "qdyt-small, attention without dropout": ["model.attention_dropout=0"],
    "qdyt-small, full-precision twin": ["quantization.weights=none"],
    "qdyt-base, 128 tokens": ["data.sequence_length=128"],
    "bitnet-25m, 256 tokens": ["data.sequence_length=256"],
    "hgrn-25m, 256 tokens": ["model.vocab_size=256", "data.sequence_length=256"],
    "hgrn-25m, full-precision twin": ["model.vocab_size=256", "data.sequence_length=256", "quantization.weights=none"],
    "hnet-25m, 256 tokens": ["model.vocab_size=256", "data.sequence_length=256"],
}


def main() -> None:
    """Count every case in both phases, and write the result."""
    torch.set_num_threads(1)
    results = []
    for case, overrides in CASES.items():
        words = ["training.precision=bf16", "training.device=cpu", *overrides]
        layers = [load_recipe(case.partition(",")[0]), Layer("case", parse_overrides(words))]
        settings = settings_from(resolve_settings(layers))
        estimate, counted = 0, {}
        for phase, update in (("early", 1), ("late", STEPS - 1)):
            counted[phase], estimate = count(settings, update)
        results.append({"case": case, "counted_mb": counted, "estimate_mb": estimate})
        print(f"{case}: early {counted['early']:.0f} MB, late {counted['late']:.0f} MB, estimate {estimate:.0f} MB")
    file = Path(__file__).parent / "results" / f"activation_memory-{datetime.now(UTC):%Y-%m-%d}.json"
    file.write_text(json.dumps({"rows": ROWS, "torch": torch.__version__, "results": results}, indent=1) + "\n")
    print(f"written to {file}")


def count(settings: RunSettings, update: int) -> tuple[float, float]:
    """Megabytes that a pass of this update keeps, and the estimate."""
    model = build_model(settings.model, settings.quantization.base())
    model.initialize(0)
    model.compute_dtype = torch.bfloat16
    settings.stages(STEPS).apply(model.train(), update)
    model.refresh()
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, settings.data.sequence_length)
    tokens = torch.randint(0, settings.model.vocab_size or 0, shape, generator=generator)
    masking = settings.objective.masking
    hidden = 1.0 if masking is None else masking.mask_fraction
    targets = torch.where(torch.rand(shape, generator=generator) < hidden, tokens, -100)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or a storage could be freed and its address counted as another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.begin_pass(1)
        loss = loss_sums(predict(model, tokens, targets), targets, settings.objective).objective
    assert loss.isfinite()
    return sum(kept.values()) / 1e6, activation_bytes(model, settings, ROWS) / 1e6


if __name__ == "__main__":
    main()
