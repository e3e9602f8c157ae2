"""TensorBoard event files."""

from ternlm.run_directory import RunDirectory
from ternlm.tracking.interface import Kind, Row, Tracker


class TensorBoardTracker(Tracker):
    """Writes every number of a row under its own name, and samples as text.

    Args:
        run: The run; events go to `logs/tensorboard`.
        purge_step: When a run resumes, TensorBoard hides earlier events from this step on.
    """

    def __init__(self, run: RunDirectory, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=purge_step, flush_secs=10)

    def log(self, kind: Kind, row: Row) -> None:
        step = int(row["step"])
        if kind == "sample":
            text = f"{row['prompt']}**{row['generated_text']}**"
            self._writer.add_text(f"sample/{row['prompt'][:40]}", text, step)
            return
        for name, value in row.items():
            if "/" in name and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
