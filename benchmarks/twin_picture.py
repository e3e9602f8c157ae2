"""The picture of a twin for README and docs: both arms while they learn, and the gap on each text.

    python benchmarks/twin_picture.py RUNS/TWIN docs/pictures/novels-10m.svg

Reads only files of the twin's folder. The SVG follows the light or dark mode of whoever looks at it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ternlm.report.palette import PALETTE
from ternlm.report.vector import inline_svg
from ternlm.run_directory import RunDirectory, read_jsonl

ARMS = {"ternary": ("ternary", "series0"), "full": ("full precision", "series1")}
TEXT = 10


def main() -> None:
    """Draw the twin in the first argument to the file in the second."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    found = json.loads((folder / "comparison.json").read_text())
    svg = inline_svg(draw(folder, found), "twin", "A ternary model and its full-precision twin", described(found))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(svg.replace("</desc>", f"</desc>\n<style>{style()}</style>", 1) + "\n")
    print(f"{target}: {described(found)}")


def draw(folder: Path, found: dict[str, Any]) -> Figure:
    """Validation loss over epochs on the left, gaps with their intervals on the right."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, gaps = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm, (name, color) in ARMS.items():
        run = RunDirectory(folder / arm)
        epochs = {row["step"]: row["train/epoch"] for row in read_jsonl(run.scalars)}
        rows = [(epochs[row["step"]], row["val/loss"]) for row in read_jsonl(run.evaluations) if row["step"] in epochs]
        curves.plot(*zip(*rows, strict=True), "o-", ms=3.5, lw=1.8, color=ink(color))
        curves.annotate(f"{name}, {rows[-1][1]:.2f}", rows[-1], xytext=(6, 0), textcoords="offset points", va="center",
                        color=ink(color), fontsize=TEXT)  # fmt: skip
    curves.set(xlabel="epochs", ylabel="loss on validation text, nats per token")
    curves.margins(x=0.02)
    curves.set_xticks(range(1, 1 + max(1, round(rows[-1][0]))))
    curves.set_xlim(right=1.42 * curves.get_xlim()[1])
    texts = [text for text in found["texts"] if text["gap_nats"] is not None]
    for place, text in enumerate(texts):
        low, high = text.get("gap_nats_ci95") or (text["gap_nats"], text["gap_nats"])
        gaps.errorbar(text["gap_nats"], place, xerr=[[text["gap_nats"] - low], [high - text["gap_nats"]]], fmt="o",
                      color=ink("ink"), capsize=4, ms=5)  # fmt: skip
        gaps.annotate(f"{text['gap_nats']:+.3f}", (text["gap_nats"], place), xytext=(0, 9), ha="center",
                      textcoords="offset points", color=ink("ink"), fontsize=TEXT)  # fmt: skip
    gaps.axvline(0, color=ink("quiet"), lw=1)
    gaps.set_yticks(range(len(texts)), [text["name"] for text in texts])
    gaps.set_ylim(len(texts) - 0.4, -0.6)
    gaps.set(xlabel="ternary less full precision, nats per token")
    for axes in (curves, gaps):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink("line"))
        axes.tick_params(colors=ink("quiet"), labelsize=TEXT)
        axes.grid(axis="y" if axes is curves else "x", color=ink("line"), lw=0.6)
        axes.set_axisbelow(True)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=ink("ink"), fontsize=TEXT)
    return figure


def described(found: dict[str, Any]) -> str:
    """What is seen, with the numbers."""
    gaps = [f"{text['name']} {text['gap_nats']:+.3f}" for text in found["texts"] if text["gap_nats"] is not None]
    return f"Loss of a ternary model less that of its full-precision twin, nats per token: {', '.join(gaps)}."


def style() -> str:
    """The variables of the palette for both modes, and what a picture on its own needs."""
    light, dark = ("".join(f"--{name}:{colors[mode]};" for name, colors in PALETTE.items()) for mode in (0, 1))
    return f"svg{{{light}font-family:system-ui,sans-serif}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"


def ink(name: str) -> str:
    """A colour of the light palette, which the page's variable replaces."""
    return PALETTE[name][0]


if __name__ == "__main__":
    main()
