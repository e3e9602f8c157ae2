"""The screen of a run: every number is there, no line is wider than the terminal, nothing a terminal would obey."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_run import TIME, fake_run
from ternlm.report.history import History
from ternlm.report.screen import Screen, size_text
from ternlm.report.status import Status, read_status
from ternlm.run_directory import RunDirectory


def drawn(
    run: RunDirectory, width: int, height: int | None = None, ascii_only: bool = False, **changes: Any
) -> list[str]:
    history = History(run)
    history.poll()
    status = replace(read_status(run, now=TIME + 3), **changes)
    lines = Screen(width, ascii_only).draw(status, history.curves, height)
    assert max(line.cell_len for line in lines) <= width
    return [line.plain for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo-20261120-153401-ab12", next_command="ternlm resume latest")


@pytest.mark.parametrize("ascii_only", [False, True], ids=["utf-8", "ascii"])
@pytest.mark.parametrize("height", [None, 24, 50])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_numbers_are_on_the_screen_at_any_width(
    run: RunDirectory, width: int, height: int | None, ascii_only: bool
) -> None:
    status: Status = read_status(run)
    lines = drawn(run, width, height, ascii_only, state="training", alive=True)
    text = "\n".join(lines)
    assert status.loss is not None and status.bpb is not None and status.val is not None
    for shown in (
        "demo-20261120-153401-ab12", "training", "3,120/5,000", "62.4 %", "ETA 6m35s", f"{status.loss:.4f}", "-0.0213",
        f"{status.bpb:.4f}", f"{status.grad_norm:.3g}", f"{status.learning_rate:.3g}", "12.8M", "10m55s", "1.9 GB",
        f"{status.val['loss']:.4f}", "accuracy 58.0%", "at 1,750", "38.10%", "0.42%", "greedy", "typical", "stress",
        "3: loss_spike at 2003, nan_inf_grad at 811", "step 2003: loss 2.14", "12 checkpoints", "jsonl, csv",
    ):  # fmt: skip
        assert shown in text, shown
    if ascii_only:
        assert text.isascii()
    if height is not None and (height > 24 or width >= 80):
        assert len(lines) < height


def test_a_watched_screen_fills_its_height_with_charts(run: RunDirectory) -> None:
    low, high = drawn(run, 80, 24, state="training"), drawn(run, 80, 50, state="training")
    assert not any("⠉" in line for line in low)
    assert any("█" in line for line in low)
    assert sum("⠉" in line or "⣀" in line for line in high) > 5
    for title in ("loss", "val loss", "grad norm", "tokens/s", "lr"):
        assert any(title in line and " to " in line for line in high), title
    assert high[-1] == "Ctrl-C leaves; training goes on."


def test_what_to_do_next_is_said_and_can_be_copied(run: RunDirectory) -> None:
    assert drawn(run, 80)[-1] == "next      ternlm resume latest"
    command = "ternlm resume /a/rather/long/folder/runs/demo-20261120-153401-ab12"
    assert drawn(run, 70, next_command=command)[-2:] == ["next", command]
    assert drawn(run, 80, 50, state="finished")[-1] == "next      ternlm resume latest"
    assert not any(line.startswith("next") for line in drawn(run, 80, next_command=None))


def test_a_run_that_is_silent_but_alive_is_marked(run: RunDirectory) -> None:
    assert drawn(run, 80, state="training", age_seconds=725.0)[0].endswith("training, silent for 12m05s")
    assert drawn(run, 80, state="finished", age_seconds=725.0)[0].endswith("  finished")


def test_the_process_is_named_while_it_matters(run: RunDirectory) -> None:
    assert "updated 3s ago · pid 4194305 on box (alive)" in drawn(run, 80, state="training", alive=True)[1]
    assert "(gone)" in drawn(run, 80, state="lost", alive=False)[1]
    assert drawn(run, 80, state="finished", alive=False)[1].endswith("ended 3s ago")


def test_reason_and_error_of_a_failed_run_are_shown(run: RunDirectory) -> None:
    error = "the model needs 3 GB and there are 2 GB.\nTry training.micro_batch_size=1 or model.hidden_size=256"
    lines = drawn(run, 80, state="out_of_memory", reason="no memory", error=error)
    assert lines[0].endswith("out of memory")
    assert "reason    no memory" in lines
    start = lines.index("error     the model needs 3 GB and there are 2 GB. Try")
    assert sum("no memory" in line for line in drawn(run, 80, reason="no memory", error="no memory")) == 1
    assert lines[start + 1].strip() == "training.micro_batch_size=1 or model.hidden_size=256"


def test_a_terminal_is_given_no_orders(run: RunDirectory) -> None:
    evil = "\x1b[2J\x07\r\u202edrowssap\u200b [bold]x[/bold] \udc80"
    text = "\n".join(
        drawn(run, 80, run_id=evil, reason=evil, error=evil, tracker=evil, device=evil, next_command=evil,
              samples=[{"mode": evil, "prompt": evil, "text": evil}])
    )  # fmt: skip
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold]x[/bold]" in text


def test_a_run_of_which_nothing_is_known_has_a_screen(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for width in (60, 80, 120):
        lines = drawn(RunDirectory(tmp_path / "empty"), width)
        assert "damaged" in lines[0]
        assert "step -" in lines
        assert "val       not evaluated yet" in lines


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.34e9, "2.3 GB"), (5e12, "5.0 TB")]
)
def test_sizes_are_short(count: float | None, text: str) -> None:
    assert size_text(count) == text
