"""How a run looks in a terminal: one screen of lines that never wrap, from 60 columns up, in UTF-8 or plain ASCII."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from ternlm.report.chart import Picture, dots, plot, sparkline
from ternlm.report.history import Curve
from ternlm.report.status import SILENT_S, Status
from ternlm.tracking.console import short_count, short_duration
from ternlm.training.status import FINAL

_LABEL = 9
_CELL, _CHART = 26, 29
STATE_STYLES = {
    "finished": "bold green", "stopped": "bold yellow", "preempted": "bold yellow", "lost": "bold red",
    "diverged": "bold red", "out_of_memory": "bold red", "failed": "bold red", "damaged": "bold red",
    "missing": "bold red", "unknown": "bold yellow",
}  # fmt: skip
_CHARTS = {
    "train/loss": "loss", "val/loss": "val loss", "train/grad_norm": "grad norm", "perf/tokens_per_sec": "tokens/s",
    "train/learning_rate": "lr",
}  # fmt: skip
_FROM_ZERO = ("tokens/s", "lr")
_ASCII = str.maketrans("━╸─·…↓↑→", "#>-|.v^>")


class Screen:
    """Draws runs for one terminal.

    Args:
        width: Columns.
        ascii_only: Whether the terminal cannot show UTF-8.
    """

    def __init__(self, width: int, ascii_only: bool = False) -> None:
        self.width, self.ascii_only = width, ascii_only

    def draw(self, status: Status, curves: Mapping[str, Curve], height: int | None = None) -> list[Text]:
        """The lines of a run.

        Args:
            status: The run.
            curves: Its curves by column, as `History` has them.
            height: Lines of a terminal that is watched, to be filled with charts; None draws each curve in one line.
        """
        above = [*self._head(status), Text(), *self._grid(_numbers(status))]
        below = [*self._facts(status), *self._next(status, is_watched=height is not None)]
        shown = {title: curves[name] for name, title in _CHARTS.items() if curves.get(name)}
        left = 0 if height is None else height - len(above) - len(below) - 3
        lines = [*above, Text(), *self._charts(shown, left), *below]
        is_too_high = height is not None and len(lines) > height
        return [line for line in lines if line.plain] if is_too_high else lines

    def line(self, *parts: tuple[str, str]) -> Text:
        """One line of (text, style), cut at the edge; what a terminal might obey is taken out."""
        text = Text.assemble(*((self._safe(part), style) for part, style in parts), no_wrap=True)
        text.rstrip()
        text.truncate(self.width, overflow="crop" if self.ascii_only else "ellipsis")
        return text

    def _safe(self, text: str) -> str:
        printable = "".join(c if c.isprintable() else " " if c.isspace() else "." for c in text)
        if self.ascii_only:
            return printable.translate(_ASCII).encode("ascii", "replace").decode()
        return printable

    def _head(self, status: Status) -> list[Text]:
        state, style = status.state.replace("_", " "), STATE_STYLES.get(status.state, "bold cyan")
        if status.is_running and (status.age_seconds or 0.0) > SILENT_S:
            state, style = f"{state}, silent for {short_duration(status.age_seconds or 0.0)}", "bold yellow"
        name = status.run_id[: max(self.width - len(state) - 2, 8)]
        gap = " " * max(self.width - len(name) - len(state), 1)
        first = self.line((name, "bold"), (gap, ""), (state, style))
        return [first, self.line((" · ".join(_circumstances(status)), "dim")), self._bar(status)]

    def _bar(self, status: Status) -> Text:
        step = "-" if status.step is None else f"{status.step:,}"
        if status.progress is None:
            return self.line((f"step {step}", "bold"))
        eta = "" if status.eta_seconds is None else f"  ETA {short_duration(status.eta_seconds)}"
        right = f"  {step}/{status.max_steps:,}  {100 * status.progress:.1f} %{eta}"
        room = max(self.width - len(right), 8)
        full = int(status.progress * room)
        return self.line(("━" * full, "cyan"), ("─" * (room - full), "dim"), (right, "bold"))

    def _grid(self, cells: Sequence[tuple[str, str]]) -> list[Text]:
        """Labels and values in as many columns as fit."""
        across = max(min(self.width // _CELL, 4), 1)
        size = self.width // across
        lines = []
        for start in range(0, len(cells), across):
            parts = []
            for label, value in cells[start : start + across]:
                shown = value[: size - _LABEL - 2]
                parts += [(f"{label:<{_LABEL}}", "dim"), (f" {shown:<{size - _LABEL - 1}}", "bold")]
            lines.append(self.line(*parts))
        return lines

    def _facts(self, status: Status) -> list[Text]:
        """One line each: evaluation, codes, samples, anomalies, disk, trackers, and what went wrong."""
        lines = [self._fact("val", _evaluation(status.val))]
        if status.best is not None:
            best, at = status.best, shown(status.best["step"], ",")
            lines.append(self._fact("best", f"loss {best['loss']:.4f}  at {at}"))
        if status.ternary:
            lines.append(self._fact("ternary", _codes(status.ternary)))
        for place, sample in enumerate(status.samples[:3]):
            mode = f"{sample['mode'] or '':<8}"[:8]
            parts = (f"{'' if place else 'samples':<{_LABEL}} ", "dim"), (f"{mode} ", "dim"), (sample["prompt"], "dim")
            lines.append(self.line(*parts, (sample["text"], "")))
        if status.anomalies["count"]:
            lines.append(self._fact("anomalies", _anomalies(status), "yellow"))
        for event in status.events[-2:]:
            style = "red" if event["severity"] == "error" else "yellow"
            lines.append(self._fact("event", f"step {event['step']}: {event['message'] or event['event']}", style))
        lines.append(self._fact("disk", _disk(status)))
        if status.tracker:
            lines.append(self._fact("trackers", status.tracker))
        if status.reason != status.error:
            lines += self._wrapped("reason", status.reason, "yellow")
        return lines + self._wrapped("error", status.error, "red")

    def _next(self, status: Status, is_watched: bool) -> list[Text]:
        """What to do now; a long command gets a line of its own, so that it can be copied."""
        if is_watched and status.is_running:
            return [Text(), self.line(("Ctrl-C leaves; training goes on.", "dim"))]
        if status.next_command is None:
            return []
        if len(status.next_command) + _LABEL + 1 <= self.width:
            return [Text(), self._fact("next", status.next_command, "bold")]
        return [Text(), self.line(("next", "dim")), self.line((status.next_command, "bold"))]

    def _fact(self, label: str, text: str, style: str = "") -> Text:
        return self.line((f"{label:<{_LABEL}} ", "dim"), (text, style))

    def _wrapped(self, label: str, text: str | None, style: str) -> list[Text]:
        """A sentence that must be read to its end, on up to four lines."""
        pieces = textwrap.wrap(text or "", self.width - _LABEL - 1)[:4]
        return [self._fact("" if place else label, piece, style) for place, piece in enumerate(pieces)]

    def _charts(self, curves: Mapping[str, Curve], left: int) -> list[Text]:
        """Charts side by side, as high as `left` lines allow; one line each if they allow nothing."""
        if not curves:
            return []
        across = max(min(self.width // _CHART, 3), 1)
        size = self.width // across
        titles = list(curves)
        rows = [titles[start : start + across] for start in range(0, len(titles), across)]
        height = min(left // len(rows) - 1, 6)
        if height < 2:
            return [*(self._sparklines(row, curves, size) for row in rows), Text()]
        lines = []
        for row in rows:
            columns = (size - 2) * dots(self.ascii_only)[0]
            pictures = {title: Picture(curves[title], columns, title in _FROM_ZERO) for title in row}
            lines.append(self.line(*(part for title in row for part in _chart_head(title, pictures[title], size))))
            drawn = [plot(picture, height, self.ascii_only) for picture in pictures.values()]
            for pieces in zip(*drawn, strict=True):
                lines.append(self.line(*((f"{piece:<{size}}", "cyan") for piece in pieces)))
        return [*lines, Text()]

    def _sparklines(self, titles: Sequence[str], curves: Mapping[str, Curve], size: int) -> Text:
        parts = []
        for title in titles:
            blocks = sparkline(curves[title], size - _LABEL - 3, title in _FROM_ZERO, self.ascii_only)
            parts += [(f"{title:<{_LABEL}} ", "dim"), (f"{blocks:<{size - _LABEL - 1}}", "cyan")]
        return self.line(*parts)


def size_text(count: float | None) -> str:
    """``12.3 MB``."""
    if count is None:
        return "-"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def shown(value: float | None, form: str) -> str:
    """A number in a format, or a dash."""
    return "-" if value is None else format(value, form)


def _numbers(status: Status) -> list[tuple[str, str]]:
    trend = status.loss_trend
    arrow = "" if trend is None or status.loss is None else f" {_arrow(trend, status.loss)}"
    step_ms, data_ms = status.step_time_ms, status.data_time_ms
    data = "" if data_ms is None else f", data {data_ms:.0f}"
    elapsed, tokens, speed = status.elapsed_seconds, status.tokens_seen, status.tokens_per_sec
    return [
        ("loss", shown(status.loss, ".4f") + arrow),
        ("slope", "-" if trend is None else f"{trend:+.3g} /1k"),
        ("bits/byte", shown(status.bpb, ".4f")),
        ("grad norm", shown(status.grad_norm, ".3g")),
        ("lr", shown(status.learning_rate, ".3g")),
        ("decay", shown(status.weight_decay, ".3g")),
        ("tokens", "-" if tokens is None else short_count(tokens)),
        ("tokens/s", "-" if speed is None else short_count(speed)),
        ("step", "-" if step_ms is None else f"{step_ms:.0f} ms{data}"),
        ("memory", _memory(status)),
        ("elapsed", "-" if elapsed is None else short_duration(elapsed)),
        ("saved at", "-" if status.last_checkpoint is None else f"step {status.last_checkpoint:,}"),
    ]


def _arrow(trend: float, loss: float) -> str:
    """Down or up if the loss changes by more than 0.1 % in 1000 steps."""
    if abs(trend) < 1e-3 * abs(loss):
        return "→"
    return "↓" if trend < 0 else "↑"


def _circumstances(status: Status) -> list[str]:
    """Stage, device, process, and how old all this is."""
    parts = []
    if status.stage is not None or status.stage_name:
        parts.append(" ".join(["stage", *map(str, filter(None, (status.stage, status.stage_name)))]))
    if status.device:
        parts.append(status.device)
    has_ended = status.state in FINAL
    if status.age_seconds is not None:
        parts.append(f"{'ended' if has_ended else 'updated'} {short_duration(status.age_seconds)} ago")
    if status.pid is not None and not has_ended:
        life = {True: "alive", False: "gone", None: "on another machine"}[status.alive]
        parts.append(f"pid {status.pid} on {status.host or '?'} ({life})")
    return parts


def _memory(status: Status) -> str:
    used = status.peak_memory_mb or status.system.get("system/process_ram_mb")
    gpu = status.system.get("system/gpu0/mem_percent")
    if used is None:
        return "-"
    return size_text(used * 2**20) + ("" if gpu is None else f", GPU {gpu:.0f} %")


def _evaluation(val: Mapping[str, Any] | None) -> str:
    if val is None:
        return "not evaluated yet"
    parts = [f"loss {shown(val['loss'], '.4f')}"]
    if val["bpb"] is not None:
        parts.append(f"bpb {val['bpb']:.4f}")
    if val["accuracy"] is not None:
        parts.append(f"accuracy {val['accuracy']:.1%}")
    return "  ".join([*parts, f"at {shown(val['step'], ',')}"])


def _codes(ternary: Mapping[str, Any]) -> str:
    named = {"zeros": ternary.get("frac_zero"), "flips": ternary.get("flip_rate")}
    return "  ".join(f"{name} {share:.2%}" for name, share in named.items() if share is not None)


def _anomalies(status: Status) -> str:
    known = status.anomalies
    newest = known["newest"] or ([known["last"]] if known["last"] else [])
    return f"{known['count']}: " + ", ".join(f"{row.get('event')} at {row.get('step')}" for row in reversed(newest))


def _disk(status: Status) -> str:
    count = len(status.checkpoints)
    kept = f"{count} checkpoint{'s' * (count != 1)} {size_text(status.checkpoint_bytes)}"
    return f"{kept}, run {size_text(status.run_bytes)}, {size_text(status.free_bytes)} free"


def _chart_head(title: str, picture: Picture, size: int) -> list[tuple[str, str]]:
    bounds = f"{_axis(picture.low)} to {_axis(picture.high)}"
    return [(title, "bold"), (f"{bounds:>{max(size - 2 - len(title), 0)}}  ", "dim")]


def _axis(value: float) -> str:
    return short_count(value) if abs(value) >= 1e4 else f"{value:.3g}"
