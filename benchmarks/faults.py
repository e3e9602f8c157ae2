"""The fault suite, with its summary kept: kills, failing disks, power cuts, damage and hostile files.

    python benchmarks/faults.py [pytest arguments, e.g. -k power]

Writes benchmarks/results/faults-DATE.json and prints the table; exits as pytest does. ``TERNLM_FAULTS_SCALE=10`` tries
ten times as many hostile files.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

import ternlm

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the suite and keep what it says."""
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        command = [sys.executable, "-m", "pytest", "-m", "faults", "tests/faults", *sys.argv[1:]]
        environment = os.environ | {"TERNLM_FAULTS_SUMMARY": str(summary), "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        rows = json.loads(summary.read_text()) if summary.exists() else []
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "ternlm": ternlm.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.platform(), "processors": os.cpu_count(),
        "passed": code == 0, "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"faults-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
