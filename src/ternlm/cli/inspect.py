"""`ternlm inspect`: what is in a checkpoint, and proof that its weights are ternary."""

from typing import Annotated, Any

import typer

from ternlm.cli.options import Checkpoint, Json, RunsDir, print_json


def inspect(
    checkpoint: Checkpoint,
    layers: Annotated[bool, typer.Option("--layers", help="One row per matrix.")] = False,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> None:
    """Verify a checkpoint and show its parameters, and the codes and scales of its quantized matrices.

    The file holds float latent weights, from which training goes on; the codes shown are what the
    model computes with.
    """
    from ternlm import checkpoint as checkpoints
    from ternlm.run_directory import runs_root

    loaded = checkpoints.load(checkpoints.resolve(checkpoint, runs_root(runs_dir)))
    matrices = _matrices(loaded.model)
    counts = loaded.model.parameter_counts()
    summary: dict[str, Any] = {
        "checkpoint": str(loaded.path),
        "verified": True,
        "step": loaded.state["step"],
        "family": loaded.model.settings.family,
        "tokenizer": loaded.tokenizer.name,
        "vocab_size": loaded.model.settings.vocab_size,
        "parameters": {"total": counts.total, **counts._asdict()},
        "weights": loaded.config["quantization"]["weights"],
        "matrices": matrices,
    }
    if as_json:
        print_json(summary)
    else:
        _print(summary, layers)


def _matrices(model: Any) -> list[dict[str, Any]]:
    from ternlm.evaluation.ternary import code_shares, quantized_matrices

    rows = []
    for matrix in quantized_matrices(model):
        negative, zero, positive = (float(share) for share in code_shares(matrix.codes).values())
        rows.append({
            "name": matrix.name, "shape": list(matrix.codes.shape), "distinct_codes": matrix.codes.unique().numel(),
            "negative": negative, "zero": zero, "positive": positive, "scale": float(matrix.scale.mean()),
            "zero_rows": int((matrix.codes == 0).all(dim=1).sum()),
        })  # fmt: skip
    return rows


def _print(summary: dict[str, Any], layers: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    counts, matrices = summary["parameters"], summary["matrices"]
    typer.echo(f"{summary['checkpoint']} (every file verified by sha256)")
    typer.echo(
        f"{summary['family']}, step {summary['step']:,}, tokenizer '{summary['tokenizer']}' with "
        f"{summary['vocab_size']:,} ids\n{counts['total']:,} parameters: {counts['ternary']:,} in BitLinear, "
        f"{counts['embedding']:,} in embedding and head, {counts['other']:,} elsewhere"
    )
    if not matrices:
        typer.echo("full precision: no matrix is quantized")
        return
    sizes = [row["shape"][0] * row["shape"][1] for row in matrices]

    def mean(key: str) -> float:
        return float(sum(size * row[key] for size, row in zip(sizes, matrices, strict=True)) / sum(sizes))

    most = max(row["distinct_codes"] for row in matrices)
    typer.echo(
        f"{len(matrices)} matrices with at most {most} distinct codes each: -1 {mean('negative'):.1%}, "
        f"0 {mean('zero'):.1%}, +1 {mean('positive'):.1%}"
    )
    if not layers:
        typer.echo("--layers shows each matrix")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("matrix", "shape", "-1", "0", "+1", "scale", "zero rows"):
        table.add_column(column, justify="left" if column == "matrix" else "right", no_wrap=True)
    for row in matrices:
        table.add_row(
            row["name"].removeprefix("model."), "x".join(map(str, row["shape"])), f"{row['negative']:.1%}",
            f"{row['zero']:.1%}", f"{row['positive']:.1%}", f"{row['scale']:.5f}", str(row["zero_rows"]),
        )  # fmt: skip
    Console(highlight=False).print(table)
