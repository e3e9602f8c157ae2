"""What a person sees: a progress bar on a terminal, plain lines elsewhere, and `logs/train.log` in both cases."""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ternlm.tracking.interface import Kind, Row, Tracker, event_text


class ConsoleTracker(Tracker):
    """Shows rows as they come, and sentences said in between.

    Args:
        total_steps: Length of the bar.
        first_step: Where the bar starts, for resumed runs.
        log_file: Everything shown is also appended here, with the time; None keeps no file.
        console: Where to write.
        quiet: Show nothing; the file is still written.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        log_file: Path | None = None,
        console: Console | None = None,
        quiet: bool = False,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._log_file, self._quiet, self._total = log_file, quiet, total_steps
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._sampled_step: int | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, numbers="")
            self._bar.start()

    def say(self, text: str) -> None:
        """Show a sentence above the bar and keep it in the log file."""
        if not self._quiet:
            self._show(text)
        self._keep(text)

    def progress(self, step: int, numbers: str) -> None:
        """Move the bar without a logged row."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)

    def log(self, kind: Kind, row: Row) -> None:
        if kind == "train":
            numbers = training_numbers(row)
            self.progress(int(row["step"]), numbers)
            line = f"step {row['step']}/{self._total}  {numbers}"
            if self._bar is None and not self._quiet:
                self._show(line)
            self._keep(line)
        elif kind == "eval":
            parts = [f"val loss {row['val/loss']:.4f}"]
            if row.get("val/bpb") is not None:
                parts.append(f"bpb {row['val/bpb']:.4f}")
            parts.append(f"accuracy {row['val/accuracy']:.1%}")
            self.say(f"step {row['step']}  " + "  ".join(parts))
        elif kind == "sample":
            if self._sampled_step != row["step"]:  # one of them; samples.jsonl has all
                self._sampled_step = row["step"]
                prompt = "" if row.get("mode") == "fill" else row["prompt"]  # a filled text holds its prompt
                text = " ".join(f"{prompt}{row['generated_text']}".split())
                self.say(f"step {row['step']}  sample: {text}")
        elif kind == "event":
            line = f"step {row['step']}  {event_text(row)}"
            if row.get("severity") in ("warning", "error"):
                self.say(line)
            else:
                self._keep(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, text: str) -> None:
        try:
            self._console.print(escape(text), soft_wrap=True)
        except (OSError, SystemExit):  # rich ends the process when nobody reads any more; training goes on
            self._quiet = True

    def _keep(self, text: str) -> None:
        if self._log_file is not None:
            stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            # A full disk: the sentence that would say so could not be kept either, and the next one is tried again.
            with suppress(OSError), self._log_file.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{stamp} {text}\n")


def training_numbers(row: Row) -> str:
    """``loss 1.234  bpb 1.780  12.3k tok/s  ETA 1m05s``."""
    parts = [f"loss {row['train/loss']:.4f}"]
    if row.get("train/bpb") is not None:
        parts.append(f"bpb {row['train/bpb']:.3f}")
    parts.append(f"{short_count(row['perf/tokens_per_sec'])} tok/s")
    parts.append(f"ETA {short_duration(row['eta_s'])}")
    return "  ".join(parts)


def short_count(value: float) -> str:
    """``12.3k``, ``4.5M``."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def short_duration(seconds: float) -> str:
    """``45s``, ``3m05s``, ``2h07m``, ``3d04h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
