"""Tasks of lm-evaluation-harness, run in this process on a model of any causal family; needs the extra ``eval``.

The harness knows the tasks, reads their datasets and computes their metrics; `Scorer` answers what it asks. The class
that it wants is made inside a function, since the package may not be there.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ternlm.errors import DataError, SettingsError, TernlmError, missing_extra
from ternlm.evaluation.likelihood import Scorer

_TASK_NAME = re.compile(r"^task:\s*[\"']?([\w.-]+)", re.MULTILINE)
_BOOTSTRAP = 1000


def evaluate_tasks(scorer: Scorer, tasks: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """Run tasks.

    Args:
        scorer: Answers for the model.
        tasks: Names such as ``hellaswag``, groups of them, or files ending in ``.yaml`` that define a task.
        limit: Only the first so many documents of each task.

    Returns:
        ``{"harness": version, "tasks": {name: {metric: value, ..., "version", "n_samples", "few_shot", "limit"}}}``.
        Metrics carry the harness's names; ``acc_stderr`` is its standard error of ``acc``. A metric that comes from
        answers filtered in another way than ``none`` is called ``metric,filter``.

    Raises:
        EnvironmentFault: The extra is not installed.
        SettingsError: A task is unknown, or given twice.
        DataError: The dataset of a task cannot be read.
    """
    manager, names = _manager(tasks)
    from lm_eval import simple_evaluate

    adapter = _adapter(scorer)
    try:
        found = simple_evaluate(
            model=adapter, tasks=names, batch_size=scorer.batch_size, limit=limit,
            bootstrap_iters=_BOOTSTRAP, log_samples=False, task_manager=manager,
        )  # fmt: skip
    except (TernlmError, MemoryError):
        raise
    except Exception as error:  # errors of many network and file layers come through
        if adapter.was_asked:
            raise
        raise DataError(
            f"the data of {', '.join(names)} cannot be read: {_reason(error)}. lm-eval fetches them from the hub: "
            "connect once, or name a task file (.yaml) whose data are local."
        ) from None
    assert found is not None, "this process is the only one"
    return {"harness": version("lm_eval"), "tasks": {name: _row(found, name, limit) for name in found["results"]}}


def _manager(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and the names of those that are wanted."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise missing_extra("lm_eval", "eval", "evaluating on tasks") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [_name_in(Path(task)) if task.endswith(".yaml") else task for task in tasks]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise SettingsError(f"task '{twice}' is given twice. Give each once.")
    folders = sorted({str(Path(task).parent) for task in tasks if task.endswith(".yaml")})
    is_builtin = any(not task.endswith(".yaml") for task in tasks)  # reading thousands of definitions takes seconds
    manager = TaskManager(include_path=folders or None, include_defaults=is_builtin)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else " 'lm-eval ls tasks' lists them."
            raise SettingsError(f"lm-eval knows no task '{name}'.{hint}")
    return manager, names


def _name_in(file: Path) -> str:
    """The name of the task that a file defines."""
    try:
        found = _TASK_NAME.search(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"task file '{file}' cannot be read: {error}. Check the path.") from None
    if found is None:
        raise SettingsError(f"'{file}' defines no task: it has no line 'task: NAME'. Add one.")
    return found[1]


def _adapter(scorer: Scorer) -> Any:
    """An instance of the harness's own class that asks the scorer."""
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]
        """Hands the harness's requests on."""

        was_asked = False

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.was_asked = True
            return [tuple(each) for each in scorer.continuations([request.args for request in requests])]  # type: ignore[misc]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            self.was_asked = True
            return scorer.texts([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            self.was_asked = True
            return scorer.generate([request.args for request in requests])

    return Adapter()


def _row(found: Mapping[str, Any], name: str, limit: int | None) -> dict[str, Any]:
    """One task's metrics as JSON values, and how they were measured."""
    row: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric = key.removesuffix(",none")
        if isinstance(value, (int, float)) and metric not in ("alias", "name", "sample_len", "sample_count"):
            row[metric] = float(value)
    samples = found.get("n-samples", {}).get(name, {})
    return row | {
        "version": found.get("versions", {}).get(name),
        "n_samples": samples.get("effective"),
        "few_shot": found.get("n-shot", {}).get(name),
        "limit": limit,
    }


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
