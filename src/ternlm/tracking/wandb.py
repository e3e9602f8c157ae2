"""Weights & Biases, in a process of its own: what the package does to the process it runs in (an exit that waits for
the network, replaced exception hooks, the interpreter lock) happens to that process and not to training.

What is sent and what is asked of the environment is decided here; `wandb_process` only calls the package.
"""

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from html import escape
from itertools import chain
from typing import Any

from ternlm import __version__
from ternlm.errors import EnvironmentFault, SettingsError, missing_extra
from ternlm.run_directory import RunDirectory
from ternlm.tracking.console import short_count
from ternlm.tracking.interface import Kind, Row, Tracker, TrackingSettings, event_text

INIT_TIMEOUT_S = 15.0
"""How long the network may take before the run is kept offline."""

START_TIMEOUT_S = 40.0
"""How long the process may take to answer at all; the package, asked to give up after 15 s, may take some more."""

_BESIDES = ("step", "tokens_seen", "wall_s", "eta_s")
_MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
          "disabled": "disabled"}  # fmt: skip


def chosen_mode(settings: TrackingSettings) -> str:
    """``online``, ``offline`` or ``disabled``: the setting, else WANDB_MODE, else whether WANDB_PROJECT is set.

    Raises:
        SettingsError: WANDB_MODE is something else.
    """
    asked = settings.wandb or os.environ.get("WANDB_MODE")
    if not asked:
        return "online" if os.environ.get("WANDB_PROJECT") else "disabled"
    if asked not in _MODES:
        raise SettingsError(f"WANDB_MODE={asked} is none of online, offline and disabled")
    return _MODES[asked]


class WandbTracker(Tracker):
    """One W&B run per training run, continued when training is resumed.

    Args:
        run: Its name becomes that of the W&B run; the package writes into its folder `wandb/`.
        settings: What the user asked for; the package's environment variables fill what was left open.
        facts: The configuration to show, nested or with dots; tags come from `model.family`,
            `total_parameters` and `data.source` where these are known.
        mode: ``online``, which falls back to ``offline``, or ``offline``.
        say: Called with one sentence about where the rows go.

    Raises:
        EnvironmentFault: The package is missing, or refuses to write even offline.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: TrackingSettings,
        facts: Mapping[str, Any],
        mode: str,
        say: Callable[[str], None],
    ) -> None:
        run.wandb.mkdir(parents=True, exist_ok=True)
        self._output = run.wandb / "process.log"
        self._samples: list[Row] = []
        arguments = init_arguments(run, settings, flat(facts))
        answer, why = self._start(arguments, mode), ""
        if mode == "online" and "problem" in answer:
            why = f" ({answer['problem'].rstrip('.')})"
            mode, answer = "offline", self._start(arguments, "offline")
        if "problem" in answer:
            raise EnvironmentFault(answer["problem"])
        if mode == "online":
            self._description = f"wandb online {answer['url']}"
            say(f"wandb is online: {answer['url']}")
        else:
            self._description = "wandb offline (buffering)"
            say(f"wandb is offline{why}. Send the rows later with: wandb sync {answer['directory']}")

    def log(self, kind: Kind, row: Row) -> None:
        if self._samples and (kind != "sample" or row["step"] != self._samples[0]["step"]):
            self._send_samples()
        if kind == "sample":
            self._samples.append(row)
        elif kind == "event":
            self._send({"step": row["step"], f"event/{row['event']}": event_text(row)})
        else:
            known = {name: value for name, value in row.items() if "/" in name or name in _BESIDES}
            self._send({name: value for name, value in known.items() if value is not None})

    def flush(self) -> None:
        if self._samples:
            self._send_samples()

    def close(self) -> None:
        self.flush()
        with self._process:
            self._write({"close": True})
            answer = self._read()
        if "problem" in answer:
            raise EnvironmentFault(answer["problem"])

    def describe(self) -> str:
        return self._description

    def _send_samples(self) -> None:
        """All samples of a step as one page; a W&B table would be kept outside the run's folder as well."""
        samples, self._samples = self._samples, []
        page = "".join(
            f"<p><b>{escape(str(row.get('mode', 'sample')))}: {escape(str(row['prompt']))}</b></p>"
            f'<pre style="white-space: pre-wrap">{escape(str(row["generated_text"]))}</pre>\n'
            for row in samples
        )
        page = page.encode("utf-8", "replace").decode("utf-8")
        self._write({"log": {"step": samples[0]["step"]}, "html": {"sample/text": page}})

    def _send(self, values: Mapping[str, Any]) -> None:
        self._write({"log": values})

    def _start(self, arguments: Mapping[str, Any], mode: str) -> dict[str, Any]:
        """Start the process and have it call `wandb.init`; its answer, or the problem.

        Raises:
            EnvironmentFault: The package is not installed.
        """
        with self._output.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ternlm.tracking.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for training
            )
        limit = threading.Timer(START_TIMEOUT_S, self._process.kill)
        limit.daemon = True
        limit.start()
        try:
            init_timeout = INIT_TIMEOUT_S if mode == "online" else START_TIMEOUT_S
            self._write({"arguments": {**arguments, "mode": mode}, "init_timeout": init_timeout})
            answer = self._read()
        except EnvironmentFault as error:
            answer = {"problem": str(error)}
        finally:
            limit.cancel()
        if "url" not in answer:
            with self._process:
                pass  # it has ended, or is about to
        if "missing" in answer:
            raise missing_extra("wandb", "wandb", "tracking.wandb")
        return answer

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message, default=str) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended; what it said last tells why
            with suppress(OSError):
                self._process.stdin.close()  # or the rest of the buffer would be tried, and complained of, at exit
            raise EnvironmentFault(self._read().get("problem", "its process has ended")) from None

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"problem": f"its process ended with code {self._process.wait()}, see {self._output}"}


def init_arguments(run: RunDirectory, settings: TrackingSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `wandb.init` is called with: the user's settings, else the package's variables, else the run's own names.

    Entity, group, job type and base URL are left to the package, which reads their variables itself.
    """
    environment = os.environ
    return {
        "project": settings.wandb_project or environment.get("WANDB_PROJECT") or "ternlm",
        "name": settings.wandb_name or environment.get("WANDB_NAME") or run.id,
        "id": _kept_id(run),
        "resume": environment.get("WANDB_RESUME") or "allow",
        # the package adds the last part of run.wandb itself
        "dir": environment.get("WANDB_DIR") or str(run.wandb.parent.resolve()),
        "tags": _tags(settings, config),
        "notes": settings.wandb_notes or environment.get("WANDB_NOTES"),
        "config": config,
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"model": {"family": "bitnet"}}`` as ``{"model.family": "bitnet"}``."""
    parts = (
        flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        for name, value in values.items()
    )
    return dict(chain.from_iterable(part.items() for part in parts))


def _kept_id(run: RunDirectory) -> str:
    """The id of the W&B run, which a resumed run finds again in its folder; names are no ids, they may be reused."""
    file = run.wandb / "run_id"
    known = file.read_text().strip() if file.exists() else ""
    chosen = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
    if chosen != known:
        file.write_text(chosen + "\n")
    return chosen


def _tags(settings: TrackingSettings, config: Mapping[str, Any]) -> list[str]:
    source = str(config.get("data.source") or "").rstrip("/").rpartition("/")[2]
    size = config.get("total_parameters")
    own = [config.get("model.family"), size and short_count(size), source, f"ternlm-{__version__}"]
    users = settings.wandb_tags or os.environ.get("WANDB_TAGS", "").split(",")
    tags = (str(tag).strip()[:64] for tag in (*own, *users) if tag)  # W&B takes up to 64 characters
    return list(dict.fromkeys(tag for tag in tags if tag))
