"""TensorBoard event files, written with TensorBoard's own record writer: one event per row, and no torch."""

import os
import re
import socket
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.record_writer import RecordWriter

from ternlm.run_directory import RunDirectory
from ternlm.tracking.interface import Kind, Row, Tracker, event_text

_NO_TAG = re.compile(r"[^\w.-]+")


class TensorBoardTracker(Tracker):
    """Writes every number whose name has a slash, and samples and events as text.

    Args:
        run: The run; events go to `logs/tensorboard`.
        purge_step: When a run resumes, TensorBoard hides earlier events from this step on.
    """

    def __init__(self, run: RunDirectory, purge_step: int | None = None) -> None:
        run.tensorboard.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (run.tensorboard / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"), time.time())
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)), time.time())

    def log(self, kind: Kind, row: Row) -> None:
        if kind == "sample":
            prompt = str(row["prompt"])
            tag = f"sample/{row.get('mode', 'text')}/{_NO_TAG.sub('_', prompt)[:40]}"
            continuation = _verbatim(str(row["generated_text"]))
            values = [_text(tag, f"**Prompt**\n\n{_verbatim(prompt)}\n**Continuation**\n\n{continuation}")]
        elif kind == "event":
            values = [_text(f"event/{_NO_TAG.sub('_', str(row['event']))}", _verbatim(event_text(row)))]
        else:
            values = [
                Summary.Value(tag=name, simple_value=value)
                for name, value in row.items()
                if "/" in name and isinstance(value, (int, float))
            ]
        self._write(Event(step=int(row["step"]), summary=Summary(value=values)), row.get("time", time.time()))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event, wall_time: float) -> None:
        event.wall_time = wall_time
        self._writer.write(event.SerializeToString())
        self._file.flush()


def _verbatim(text: str) -> str:
    """A Markdown code block by indentation, which no text can end, unlike a fence."""
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])


def _text(tag: str, markdown: str) -> Summary.Value:
    """What TensorBoard's text dashboard shows: a tensor of one string."""
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    content = TensorProto(
        dtype="DT_STRING",
        string_val=[markdown.encode("utf-8", "replace")],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=content)
