"""`ternlm doctor`: what this machine offers, and what to install for more."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from ternlm.cli.options import Json, RunsDir, print_json

EXTRAS = {
    "hub": ("datasets", "pyarrow", "zstandard", "transformers", "huggingface_hub"),
    "wandb": ("wandb",),
    "gguf": ("gguf",),
    "eval": ("lm_eval",),
}


def doctor(runs_dir: RunsDir = None, as_json: Json = False) -> None:
    """Check Python, torch, devices, compiler, optional packages and disk."""
    report = _examine(runs_dir)
    if as_json:
        print_json(report)
        return
    for name, entry in report.items():
        typer.echo(f"{'ok ' if entry['ok'] else '-- '} {name:<10} {entry['found']}")
        if not entry["ok"] and entry["fix"]:
            typer.echo(f"    {entry['fix']}")
    broken = [name for name, entry in report.items() if not entry["ok"] and entry["needed"]]
    if broken:
        from ternlm.errors import EnvironmentFault

        raise EnvironmentFault(f"not ready: {', '.join(broken)}. Follow the lines above.")
    typer.echo("\nready. Next: ternlm demo")


def _entry(ok: bool, found: str, fix: str = "", needed: bool = False) -> dict[str, Any]:
    return {"ok": ok, "found": found, "fix": fix, "needed": needed}


def _examine(runs_dir: str | None) -> dict[str, dict[str, Any]]:
    from ternlm.run_directory import runs_root

    report = {
        "python": _entry(
            sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}",
            "Install Python 3.11 or newer.", needed=True,
        )
    }  # fmt: skip
    report["torch"] = _torch()
    report |= _devices() if report["torch"]["ok"] else {}
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    report["compiler"] = _entry(
        compiler is not None,
        compiler or "none",
        "Install a C++ compiler to use training.compile=true on a CPU.",
    )
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        found = "installed" if not missing else f"not installed ({', '.join(missing)})"
        report[extra] = _entry(not missing, found, f"Optional: pip install 'ternlm[{extra}]'")
    report["disk"] = _disk(runs_root(runs_dir))
    return report


def _torch() -> dict[str, Any]:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return _entry(False, "not installed", "pip install torch", needed=True)
    import torch

    ok = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    return _entry(ok, f"{version}, {torch.get_num_threads()} threads", "pip install -U 'torch>=2.10'", needed=True)


def _devices() -> dict[str, dict[str, Any]]:
    import torch

    from ternlm.device import choose_device, choose_dtype

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    device = choose_device()
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    speed = "fast int8" if torch.cpu._is_vnni_supported() else "no fast int8"
    return {
        "cpu": _entry(True, f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {speed}"),
        "gpu": _entry(bool(gpus), ", ".join(gpus) or "none", "Recipes demo and bitnet-1m fit a CPU."),
        "default": _entry(True, f"device {device}, activations {dtype}"),
    }


def _disk(runs: Path) -> dict[str, Any]:
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    found = f"{runs} {'writable' if writable else 'not writable'}, {free / 1e9:.1f} GB free"
    return _entry(writable and free > 1e9, found, "Free disk space or choose another --runs-dir.", needed=True)
