"""The model card of an export: what the model is, what it can be used for, how good it is, and how it was made.

Every number is from the record of the run or from the export itself. What is not known is said to be unknown; nothing
is filled in. The front matter is what model hubs read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Any

from ternlm.report.blocks import Block, Paragraph, Section, Table, Text
from ternlm.report.card_training import papers_section, ternary_section, training_section
from ternlm.report.markdown import markdown
from ternlm.report.tail import mapping, number, string, whole

_FAMILIES = {
    "bitnet": "causal transformer",
    "qdyt": "bidirectional encoder, trained to fill in hidden tokens",
    "hgrn": "recurrent language model over bytes",
    "hnet": "hierarchical recurrent language model over bytes",
}
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def card(record: Mapping[str, Any]) -> str:
    """README.md of an export: front matter, then Markdown.

    Args:
        record: As `read_record` returns it for the one run that the model is of (`runs` may be empty), with `export`:
            what `ternlm.export.export` returns, and `name`, the title; `license` and `language` where they are known.
    """
    export = mapping(record.get("export"))
    found = record.get("runs")
    run = mapping(found[0]) if isinstance(found, Sequence) and found else {}
    sections = [
        Section("How good it is", _quality(run, export)),
        Section("How to run it", _usage(export)),
        Section("What it is for", _purpose(run, export)),
        Section("Limits", _limits(run, export)),
        training_section(run, export),
        ternary_section(run, export),
        Section("How the export was checked", _verification(export)),
        papers_section(run),
    ]
    title = string(export.get("name")) or "ternary language model"
    return _front_matter(export) + markdown(title, _summary(run, export), [s for s in sections if s.blocks])


def is_plain(value: str) -> bool:
    """Whether a licence or language is one word that may stand in the front matter."""
    return _PLAIN.fullmatch(value) is not None


def _front_matter(export: Mapping[str, Any]) -> str:
    """Licence and language only where somebody has said them: they cannot be known from a run."""
    lines = ["---"]
    for key in ("license", "language"):
        value = string(export.get(key))
        if value is not None and is_plain(value):
            lines.append(f"{key}: {value}")
    is_causal = export.get("is_causal") is not False
    lines.append(f"library_name: {'ternlm' if export.get('format') == 'packed' else 'transformers'}")
    lines.append(f"pipeline_tag: {'text-generation' if is_causal else 'fill-mask'}")
    tags = ["ternlm", *(["ternary", "bitnet", "1.58-bit"] if export.get("ternary_layers") else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", "", ""])


def _summary(run: Mapping[str, Any], export: Mapping[str, Any]) -> str:
    family = string(export.get("family")) or ""
    counts = mapping(export.get("parameters"))
    total, ternary = whole(counts.get("total")), whole(counts.get("ternary"))
    kind = _FAMILIES.get(family, f"model of the family {family or 'unknown'}")
    text = f"A {kind} with {_count(total)} parameters"
    if total and ternary and export.get("ternary_layers"):
        text += f", {ternary / total:.0%} of them ternary (-1, 0 or +1 times a scale)"
    elif total:
        text += ", in full precision"
    text += f". It was trained on {seen_tokens(export)} of {source(run)}."
    size, plain = whole(export.get("bytes")), whole(export.get("bytes_bfloat16"))
    if size and plain:
        text += f" The file of weights has {size / 1e6:,.1f} MB; in bfloat16 the same parameters take"
        text += f" {plain / 1e6:,.1f} MB."
    return text


def _quality(run: Mapping[str, Any], export: Mapping[str, Any]) -> list[Block]:
    """The evaluation at the exported step; of another step it is said which."""
    rows = [row for row in run.get("evaluations") or [] if isinstance(row, Mapping)]
    step = whole(export.get("step"))
    if not rows:
        return [Paragraph(
            "Not known: no evaluation of this model on held-out text was found. Measure it with 'ternlm evaluate'.",
            "warning",
        )]  # fmt: skip
    row = min(rows, key=lambda one: abs((whole(one.get("step")) or 0) - (step or 0)))
    blocks: list[Block] = []
    if whole(row.get("step")) != step:
        blocks.append(Paragraph(
            f"There is no evaluation at the exported step {step}; these numbers are of step {whole(row.get('step'))}.",
            "warning",
        ))  # fmt: skip
    cells = _quality_rows(row)
    how = ", ".join(
        f"{name} {value}" for name in ("split", "protocol", "dtype") if (value := string(row.get(name))) is not None
    )
    window = whole(row.get("sequence_length"))
    caption = f"On the held-out text of its own corpus ({how}{f', windows of {window:,} tokens' if window else ''})"
    blocks.append(Table(("measure", "value", "of what"), cells, caption, (1,), "eval/eval_results.jsonl"))
    blocks.append(Paragraph(
        "Numbers on other text are not known here. Perplexities of models with other tokenizers do not compare; bits "
        "per byte do, on the same text."
    ))  # fmt: skip
    return blocks


def _quality_rows(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    unit = string(row.get("perplexity_unit")) or "token"
    targets = whole(row.get("n_targets"))
    of_targets = f"{targets:,} targets" if targets else "targets"
    for name, key, form, what in (
        ("loss", "val/loss", "{:.4f}", f"nats per target, {of_targets}"),
        ("perplexity", "val/perplexity", "{:,.2f}", f"per {unit}"),
        ("bits per byte", "val/bpb", "{:.4f}", _interval(row)),
        ("accuracy", "val/accuracy", "{:.2%}", "the likeliest token is the right one"),
    ):
        value = number(row.get(key))
        if value is not None:
            rows.append((name, form.format(value), what))
    return rows


def _interval(row: Mapping[str, Any]) -> str:
    ends = row.get("bpb_ci95")
    found = [number(end) for end in ends] if isinstance(ends, list) else []
    if len(found) != 2 or found[0] is None or found[1] is None:
        return "interval not measured"
    return f"95 % over documents: {found[0]:.4f} to {found[1]:.4f}"


def _usage(export: Mapping[str, Any]) -> list[Block]:
    if export.get("format") == "packed":
        verb = "generate FOLDER --prompt 'Once upon a time'"
        if export.get("is_causal") is False:
            verb = "fill FOLDER 'A text with a [MASK] in it.'"
        commands = f"pip install ternlm\nternlm {verb}\nternlm evaluate FOLDER --data FILE"
        return [
            Text(commands, "FOLDER is where this file lies:"),
            Paragraph(
                "The file holds codes and scales and no latent weights: it computes what the trained model computes, "
                "and cannot be trained further. That takes the run's own checkpoint."
            ),
        ]  # fmt: skip
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        'tokens = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))"
    )
    blocks: list[Block] = [Text(code, "FOLDER is where this file lies:")]
    if export.get("ternary_layers"):
        blocks.append(Paragraph(
            "transformers needs accelerate for it. Load it with dtype=\"auto\": another dtype is an error or another "
            "model. On a CPU the first pass takes tens of seconds, because quantizers are compiled; the environment "
            "variable TORCHDYNAMO_DISABLE=1 avoids that."
        ))  # fmt: skip
    if export.get("format") == "hf":
        blocks.append(
            Paragraph("The weights are latent ones, so training can go on; transformers rounds them in each pass.")
        )
    return blocks


def _purpose(run: Mapping[str, Any], export: Mapping[str, Any]) -> list[Block]:
    does = "continues text" if export.get("is_causal") is not False else "fills in hidden tokens"
    return [Paragraph(
        f"It {does} in the manner of what it was trained on ({source(run)}), and is meant for experiments with ternary "
        "networks: measuring them, running them on small machines, teaching. It was not trained to follow "
        "instructions, to answer questions or to be safe, and is not fit to decide anything about people."
    )]  # fmt: skip


def _limits(run: Mapping[str, Any], export: Mapping[str, Any]) -> list[Block]:
    """Sentences, each computed from what is known of this model."""
    found = []
    context = whole(export.get("context"))
    if context and export.get("family") in ("bitnet", "qdyt"):
        found.append(f"It reads at most {context:,} tokens at once.")
    total, tokens = whole(mapping(export.get("parameters")).get("total")), whole(export.get("tokens_seen"))
    if total and tokens is not None and tokens < 20 * total:
        found.append(
            f"It has seen {tokens / total:.2g} tokens per parameter. About 20 are usual where text is plenty, so more "
            "training would make it better."
        )
    status = mapping(run.get("status"))
    state, last = string(status.get("state")), whole(status.get("max_steps"))
    if state is not None and state != "finished":
        found.append(f"The run it is of has not finished (its state: {state}).")
    step = whole(export.get("step"))
    if last is not None and step is not None and step < last:
        found.append(f"It is the model at step {step:,} of {last:,}.")
    anomalies = whole(mapping(status.get("anomalies")).get("count"))
    if anomalies:
        were = "anomaly was" if anomalies == 1 else "anomalies were"
        found.append(f"{anomalies} {were} noticed while it was trained.")
    found.append(
        "What it says may be false. Bias and harm were not measured, and the training text was not filtered for them."
    )
    if not string(export.get("license")):
        found.append("No licence has been stated for these weights.")
    return [Paragraph(text) for text in found]


def _verification(export: Mapping[str, Any]) -> list[Block]:
    checked = mapping(export.get("verification"))
    if checked.get("status") != "passed":
        reason = string(checked.get("reason")) or "the reason is not known"
        return [Paragraph(f"It was not: {reason}.", "warning")]
    difference, largest = number(checked.get("largest_logit_difference")), number(checked.get("largest_logit"))
    text = f"It was loaded again with {checked.get('by')} and compared with the trained model on "
    text += f"{checked.get('tokens')} tokens. "
    distance = number(checked.get("relative_l2_unrounded"))
    if distance is not None:
        text += (
            f"With activations not rounded, logits are {distance:.1g} apart (relative L2), which is what was judged; "
        )
        text += "rounding moves an activation to another code wherever a last bit differs. "
    text += f"The largest difference of a logit is {_small(difference)}, of logits up to {_small(largest)}."
    others = whole(checked.get("codes_found_otherwise"))
    if others:
        text += f" transformers rounds {others:,} weights to another code than the trained model."
    return [Paragraph(text)]


def source(run: Mapping[str, Any]) -> str:
    """What the run was trained on; of a file or folder the name alone, for the rest says where somebody keeps it."""
    name = string(mapping(run.get("data")).get("source")) or string(
        mapping(mapping(run.get("config")).get("data")).get("source")
    )
    if name is None:
        return "text that is not known here"
    if PurePath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith((".", "~")):
        return f"'{PureWindowsPath(name).name if chr(92) in name else PurePath(name).name}'"
    return f"'{name}'"


def seen_tokens(export: Mapping[str, Any]) -> str:
    """How many tokens it was trained on, in words."""
    tokens = whole(export.get("tokens_seen"))
    return "an unknown number of tokens" if tokens is None else f"{_count(tokens)} tokens"


def _count(value: int | None) -> str:
    if value is None:
        return "an unknown number of"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _small(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
