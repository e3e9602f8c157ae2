"""Where a run comes from: code, packages, machine, command lines, seeds and data, on disk before the first step.

`meta/provenance.json` has one entry per sitting, that is per start or resume; its end is written into the same
entry. `meta/dataset_fingerprint.json` holds what the data were when the run began, and a resume compares.

No secret gets in: of the environment only listed variables are taken, and texts pass through `masking`.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

import ternlm
from ternlm.device import choose_device
from ternlm.errors import DataError, EnvironmentFault
from ternlm.files import from_json, read_regular, replace_durably, to_json
from ternlm.run_directory import RunDirectory
from ternlm.training.masking import HIDDEN, is_secret, masked, readable, without_credentials
from ternlm.training.settings import RunSettings
from ternlm.training.utilization import peak_flops

SCHEMA = 1
FIRST_TOKENS = 1000
LARGEST_FILE = 64 * 2**20
GIT_PATIENCE_S = 2.0

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "triton", "datasets", "pyarrow", "transformers",
            "huggingface_hub", "sentencepiece", "wandb", "tensorboard")  # fmt: skip
"""Packages whose versions are recorded where they are installed."""

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG",
               "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR", "PYTHONHASHSEED",
               "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID",
               "SLURM_RESTART_COUNT")  # fmt: skip
"""Variables that are recorded where they are set, beside those that begin with TERNLM_."""


class Described(Protocol):
    """Prepared or streamed data, as far as they can say what they are."""

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> Mapping[str, Any]: ...

    def first_tokens(self, n: int = FIRST_TOKENS) -> Sequence[int]: ...


def record(run: RunDirectory, settings: RunSettings, first_step: int, teacher: Mapping[str, Any] | None = None) -> None:
    """Open a sitting in `meta/provenance.json`.

    Args:
        run: The run; its folder exists.
        settings: What this sitting trains with.
        first_step: Completed steps at its beginning.
        teacher: Which checkpoint it learns from, if any.

    Raises:
        EnvironmentFault: The file cannot be written.
    """
    seed = settings.training.seed
    peak = peak_flops(choose_device(settings.training.device))
    sitting = {
        "started_at": _now(),
        "command_line": masked(sys.argv),
        "working_directory": readable(str(Path.cwd())),
        "ternlm": ternlm.__version__,
        "git": {
            "ternlm": _git_state(Path(ternlm.__file__).parent, "__init__.py"),
            "working_directory": _git_state(Path.cwd()),
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "hardware": hardware(),
        "torch": _torch(),
        "peak": None if peak is None else peak._asdict(),
        "environment": _environment(),
        "seeds": {"run": seed, "initial_weights": seed, "data_order": seed, "samples": seed},
        "config_sha256": hashlib.sha256(to_json(settings.model_dump(mode="json"))).hexdigest(),
        "first_step": first_step,
        "teacher": None if teacher is None else {**teacher, "path": readable(str(teacher["path"]))},
    }
    _write(run, [*_sittings(run), sitting])


def record_stop(run: RunDirectory, state: str, exit_code: int, reason: str | None, step: int) -> None:
    """Close the sitting that `record` opened.

    Args:
        run: The run.
        state: The final state, as in `status.json`.
        exit_code: Of the process.
        reason: One sentence, or None.
        step: Completed steps.

    Raises:
        EnvironmentFault: The file cannot be written.
    """
    stop = {
        "stopped_at": _now(), "state": state, "exit_code": exit_code,
        "reason": None if reason is None else readable(reason), "last_step": step,
    }  # fmt: skip
    *earlier, last = _sittings(run) or [{}]
    _write(run, [*earlier, {**last, **stop}])


def record_data(run: RunDirectory, data: Described) -> None:
    """Write `meta/dataset_fingerprint.json` before the first step, or compare with what it holds.

    Raises:
        DataError: The data are not those that the run began with; the message names what differs.
        EnvironmentFault: The file cannot be written.
    """
    tokens = [int(token) for token in data.first_tokens(FIRST_TOKENS)]
    content = b"".join(token.to_bytes(4, "little") for token in tokens)
    found = without_credentials({
        **data.describe(),
        "schema": SCHEMA,
        "fingerprint": data.fingerprint,
        "first_token_ids": tokens,
        "first_token_ids_sha256": hashlib.sha256(content).hexdigest(),
    })  # fmt: skip
    file = run.data_fingerprint
    if not file.exists():
        _replace(file, to_json(found))
        return
    try:
        before = from_json(read_regular(file, LARGEST_FILE))
        differences = _differences(before, found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise DataError(
            f"'{file}' is damaged, so nobody can tell whether the data are still those of the run. "
            "Delete it to go on with the present data."
        ) from None
    if differences:
        raise DataError(
            f"the data are not those that run '{run.id}' began with: {'; '.join(differences)}. Restore them, or start "
            "a new run with: ternlm train --resume-from CHECKPOINT --run-id NEW"
        )


def _environment() -> dict[str, str]:
    names = sorted(name for name in os.environ if name in ENVIRONMENT or name.startswith("TERNLM_"))
    values = {}
    for name in names:
        dotted = name.removeprefix("TERNLM__").replace("__", ".").lower()
        values[name] = HIDDEN if is_secret(dotted) else readable(os.environ[name])
    return values


def _git_state(folder: Path, tracked: str | None = None) -> dict[str, Any] | None:
    """Commit, branch and changes of a folder in a git work tree, or None.

    Args:
        folder: Looked at with what is below it.
        tracked: A file that git must know: an installed package may lie in somebody else's work tree.
    """
    status = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=normal", "--", ".")
    if status is None or (tracked is not None and not _git(folder, "ls-files", "--", tracked)):
        return None
    lines = status.decode(errors="replace").splitlines()
    head = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# ") and line.count(" ") > 1)
    commit, branch = head.get("branch.oid"), head.get("branch.head")
    diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--full-index", "HEAD", "--", ".")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": any(not line.startswith("#") for line in lines),
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _git(folder: Path, *words: str) -> bytes | None:
    """What git prints, or None: it is missing, refuses, or takes too long."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # A work tree's own settings may name programs that `status` starts; core.fsmonitor is one.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_PATIENCE_S, env=environment, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def package_versions() -> dict[str, str]:
    """Of the packages in `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Processor, memory and GPUs of this machine."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    """All NVIDIA GPUs of the machine, used or not, without touching them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    gpus = []
    with suppress(pynvml.NVMLError):
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            gpus.append({
                "name": str(pynvml.nvmlDeviceGetName(handle)),
                "memory_gb": round(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) / 2**30, 1),
                "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            })  # fmt: skip
    pynvml.nvmlShutdown()
    return gpus


def _torch() -> dict[str, Any]:
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; a stream may have been read further in one of them."""
    found = []
    for name in ("source", "revision", "fingerprint", "first_token_ids_sha256"):
        if name in before and before[name] != now.get(name):
            found.append(f"{name} was {_short(before[name])}, is {_short(now.get(name))}")
    for name, value in before.get("tokenizer", {}).items():
        if now["tokenizer"].get(name) != value:
            found.append(f"tokenizer {name} was {_short(value)}, is {_short(now['tokenizer'].get(name))}")
    if before["splits"].keys() != now["splits"].keys():
        found.append(f"splits were {', '.join(before['splits'])}, are {', '.join(now['splits'])}")
    for split in before["splits"].keys() & now["splits"].keys():
        pairs = zip(before["splits"][split]["shards"], now["splits"][split]["shards"], strict=False)
        changed = [a["file"] for a, b in pairs if a["sha256"] != b["sha256"]]
        if changed:
            found.append(f"{split} shard {changed[0]} ({len(changed)} in all)")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12]


def _sittings(run: RunDirectory) -> list[dict[str, Any]]:
    """The sittings so far; a file that cannot be read is kept beside, and a run is not stopped for it."""
    if not run.provenance.exists():
        return []
    try:
        sittings = from_json(read_regular(run.provenance, LARGEST_FILE))["sittings"]
        if isinstance(sittings, list) and all(isinstance(sitting, dict) for sitting in sittings):
            return sittings
    except (OSError, ValueError, LookupError, TypeError):
        pass
    with suppress(OSError):
        run.provenance.replace(run.provenance.with_suffix(".damaged.json"))
    return [{"note": "the file of the sittings before was damaged and is kept as provenance.damaged.json"}]


def _write(run: RunDirectory, sittings: list[dict[str, Any]]) -> None:
    _replace(run.provenance, to_json({"schema": SCHEMA, "run_id": run.id, "sittings": sittings}))


def _replace(file: Path, content: bytes) -> None:
    try:
        replace_durably(file, content)
    except OSError as error:
        raise EnvironmentFault(
            f"'{file}' cannot be written: {error.strerror}. Free disk space or choose another --runs-dir."
        ) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
