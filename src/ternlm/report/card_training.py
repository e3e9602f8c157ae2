"""The parts of a model card that tell how the model was made: training, ternary weights, papers."""

from collections.abc import Mapping
from typing import Any

from ternlm.report.blocks import Block, Paragraph, Section, Table, Text
from ternlm.report.tail import mapping, number, string, whole

_SETTINGS = (
    ("batch size, sequences", "training.batch_size"),
    ("tokens per sequence", "data.sequence_length"),
    ("optimizer", "optimizer.name"),
    ("learning rate", "optimizer.learning_rate"),
    ("weight decay", "optimizer.weight_decay"),
    ("schedule", "schedule.name"),
    ("seed", "training.seed"),
    ("objective", "objective.name"),
    ("teacher", "distillation.teacher"),
)


def training_section(run: Mapping[str, Any], export: Mapping[str, Any]) -> Section:
    """Text, settings, machine and code of the run."""
    rows = [*_data_rows(run), *_setting_rows(run, export), *_machine_rows(run)]
    if not rows:
        return Section("How it was trained", [Paragraph("Not known: its run was not found.", "warning")])
    blocks: list[Block] = [Table(("what", "value"), rows, "Of the run", (), "meta/config.json, meta/provenance.json")]
    return Section("How it was trained", [*blocks, *_sample(run, export)])


def ternary_section(run: Mapping[str, Any], export: Mapping[str, Any]) -> Section:
    """How weights and activations are rounded, and what was measured of the codes at the last measured step."""
    settings = mapping(mapping(run.get("config")).get("quantization"))
    if not export.get("ternary_layers"):
        return Section("Ternary weights", [Paragraph("None: this model computes in full precision.")])
    bits = whole(export.get("activation_bits"))
    rows = [
        ("quantizer", string(settings.get("quantizer")) or "not known"),
        ("what shares a scale", string(settings.get("granularity")) or "not known"),
        ("activations", f"{bits} bits" if bits else "not rounded per token by the ternary layers"),
        ("ternary layers", str(export.get("ternary_layers"))),
    ]
    ternary = mapping(run.get("ternary"))
    measured = {key: values[-1] for key, values in mapping(ternary.get("all")).items() if values}
    steps = ternary.get("steps") or []
    for name, key, form in (
        ("share of -1", "frac_neg", "{:.1%}"),
        ("share of 0", "frac_zero", "{:.1%}"),
        ("share of +1", "frac_pos", "{:.1%}"),
        ("mean scale", "scale", "{:.4g}"),
        ("codes that changed since the measurement before", "flip_rate", "{:.2%}"),
    ):
        value = number(measured.get(key))
        if value is not None:
            rows.append((name, form.format(value)))
    caption = (
        f"Codes as measured at step {steps[-1]:,}" if steps else "No measurement of its codes in training was found"
    )
    blocks: list[Block] = [Table(("what", "value"), rows, caption, (1,), "metrics/ternary.jsonl" if steps else "")]
    return Section("Ternary weights", [*blocks, *_alignment(run)])


def papers_section(run: Mapping[str, Any]) -> Section:
    """Sources of the parts that the run uses."""
    found = [paper for paper in run.get("papers") or [] if isinstance(paper, Mapping)]
    rows = [(str(paper.get("title")), str(paper.get("part"))) for paper in found]
    links = [str(paper.get("address")) for paper in found]
    table = Table(("paper", "for"), rows, "Sources of the parts it is made of", links=links)
    return Section("Papers", [table] if rows else [])


def _alignment(run: Mapping[str, Any]) -> list[Block]:
    rows = [row for row in mapping(run.get("alignment")).get("rows") or [] if isinstance(row, Mapping)]
    if not rows:
        return [Paragraph("How far it follows the definition of BitNet b1.58 was not checked.")]
    counts = {verdict: sum(row.get("verdict") == verdict for row in rows) for verdict in ("same", "differs", "unknown")}
    text = (
        f"Of {len(rows)} parts that were compared with the definition of BitNet b1.58: the same {counts['same']}, "
        f"different {counts['differs']}, could not be checked {counts['unknown']}."
    )
    differing = [
        (str(row.get("part")), str(row.get("definition")), str(row.get("run")))
        for row in rows
        if row.get("verdict") == "differs"
    ]
    table = Table(("part", "definition", "this model"), differing, "Where it differs", (), "eval/alignment.json")
    return [Paragraph(text), *([table] if differing else [])]


def _data_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = mapping(run.get("data"))
    rows = []
    for name, split in mapping(data.get("splits")).items():
        counts = [f"{split[key]:,} {key}" for key in ("documents", "tokens", "bytes") if key in mapping(split)]
        if counts:
            rows.append((f"{name} text", ", ".join(counts)))
    tokenizer = string(mapping(data.get("tokenizer")).get("name"))
    if tokenizer is not None:
        rows.append(("tokenizer", tokenizer))
    fingerprint = string(data.get("fingerprint"))
    if fingerprint is not None:
        rows.append(("fingerprint of the text", fingerprint[:16]))
    return rows


def _setting_rows(run: Mapping[str, Any], export: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = mapping(run.get("config"))
    rows = [("step", f"{step:,}")] if config and (step := whole(export.get("step"))) is not None else []
    for name, setting in _SETTINGS:
        section, _, key = setting.partition(".")
        value = mapping(config.get(section)).get(key)
        if value is not None:
            rows.append((name, "yes" if name == "teacher" else str(value)))
    return rows


def _machine_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    sittings = [sitting for sitting in run.get("sittings") or [] if isinstance(sitting, Mapping)]
    if not sittings:
        return []
    last, rows = sittings[-1], []
    hardware = mapping(last.get("hardware"))
    gpus = hardware.get("gpus")
    names = [string(mapping(gpu).get("name")) or str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
    machine = ", ".join(names) or string(hardware.get("cpu"))
    if machine:
        rows.append(("machine", machine))
    versions = [
        f"{name} {version}"
        for name, version in (("ternlm", last.get("ternlm")), ("torch", mapping(last.get("torch")).get("version")))
        if isinstance(version, str)
    ]
    if versions:
        rows.append(("software", ", ".join(versions)))
    git = mapping(mapping(last.get("git")).get("ternlm"))
    commit = string(git.get("commit"))
    if commit is not None:
        rows.append(("code", commit[:12] + (" with changes" if git.get("dirty") else "")))
    if len(sittings) > 1:
        rows.append(("sittings", str(len(sittings))))
    return rows


def _sample(run: Mapping[str, Any], export: Mapping[str, Any]) -> list[Block]:
    """One text that it wrote no later than at the exported step."""
    step = whole(export.get("step"))
    rows = [row for row in run.get("samples") or [] if isinstance(row, Mapping) and string(row.get("text"))]
    known = [row for row in rows if step is None or (whole(row.get("step")) or 0) <= step]
    if not known:
        return []
    row = known[-1]
    prompt = "" if row.get("mode") == "fill" else string(row.get("prompt")) or ""
    how = row.get("mode") or "mode not known"
    caption = f"A text it wrote at step {row.get('step')} ({how}), not chosen for its quality"
    return [Text(f"{prompt}{row['text']}", caption, len(prompt))]
