"""The memory table of docs/single-gpu.md is what `ternlm plan` computes."""

from pathlib import Path

import pytest

from ternlm.recipes import load_recipe
from ternlm.settings.resolve import Layer, parse_overrides, resolve
from ternlm.training.launch import settings_from
from ternlm.training.plan import Plan, make_plan
from ternlm.training.settings import setting_names

PAGE = Path(__file__).parent.parent / "docs" / "single-gpu.md"
SEQUENCES = 8


def row_of(recipe: str) -> str:
    """One line of the table: parameters, state, and activations of eight sequences without and with recomputation."""
    plans = [plan_of(recipe, f"training.gradient_checkpointing={recomputed}") for recomputed in ("false", "true")]
    length = load_recipe(recipe).values["data"]["sequence_length"]
    plain, recomputed = plans
    activations = [plan.activation_bytes_estimate for plan in plans]
    totals = [plain.state_bytes + activations[0], recomputed.state_bytes + activations[1]]
    counts = [f"`{recipe}`", f"{plain.parameters:,}", f"{plain.ternary - plain.integer:,}", str(length)]
    cells = counts + [f"{size / 1e9:.2f}" for size in (plain.state_bytes, *activations, *totals)]
    return "| " + " | ".join(cells) + " |"


def plan_of(recipe: str, assignment: str) -> Plan:
    overrides = ["training.device=cuda", "training.precision=bf16", "training.gradient_accumulation_steps=null",
                 f"training.micro_batch_size={SEQUENCES}", assignment]  # fmt: skip
    resolved = resolve([load_recipe(recipe), Layer("test", parse_overrides(overrides))], setting_names())
    return make_plan(settings_from(resolved))


ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| `qdyt")]


def test_every_published_size_is_in_the_table() -> None:
    named = {row.split("`")[1] for row in ROWS}
    assert {"qdyt-small", "qdyt-base", "qdyt-large", "qdyt-rtx"} <= named


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("`")[1])
def test_a_row_of_the_table_is_what_plan_computes(row: str) -> None:
    assert row == row_of(row.split("`")[1])
