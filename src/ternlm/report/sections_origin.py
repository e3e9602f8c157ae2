"""Where a run comes from and how its parts compare with the published definition: provenance, settings, papers."""

from collections.abc import Mapping
from typing import Any

from ternlm.report.blocks import Kind, Paragraph, Section, Table
from ternlm.report.tail import mapping, string, whole
from ternlm.report.wording import NOTHING, count, listed, setting, size

Run = Mapping[str, Any]

PROVENANCE, DATA, CONFIG, ORIGIN, MEASURED = (
    "meta/provenance.json", "meta/dataset_fingerprint.json", "meta/config.json", "meta/config_origin.json",
    "eval/alignment.json",
)  # fmt: skip
_KINDS: dict[str, Kind] = {"same": "good", "differs": "warning", "unknown": "plain"}


def origin_section(run: Run) -> Section:
    """Code, machine, data and command lines."""
    rows = [*_folder_rows(run), *_data_rows(run["data"])]
    sittings = run["sittings"]
    blocks: list[Any] = []
    if not sittings:
        blocks.append(Paragraph("The run does not say with which code and on which machine it was made.", "warning"))
    else:
        rows += _code_rows(sittings[-1])
        git = mapping(mapping(sittings[-1].get("git")).get("ternlm"))
        if git.get("dirty") is True:
            blocks.append(Paragraph("The code had changes that were not committed: its commit is not all of it.",
                                    "warning"))  # fmt: skip
    blocks.insert(0, Table(("what", "value"), rows, "What was run, on what, with which data.", (),
                           f"{PROVENANCE}, {DATA}"))  # fmt: skip
    if len(sittings) > 1:
        blocks.append(_sittings_table(sittings))
    return Section("Where it comes from", tuple(blocks))


def settings_section(run: Run) -> Section | None:
    """The settings that are no defaults, with who set them; None where they are not known."""
    if not run["changed"]:
        return None
    rows = [(one["setting"], setting(one["value"]), one["origin"]) for one in run["changed"]]
    table = Table(("setting", "value", "set by"), rows, "All others have their defaults.", (), f"{CONFIG}, {ORIGIN}")
    return Section("Settings", (table,), is_folded=True)


def checkpoints_section(run: Run) -> Section | None:
    """What was saved; None if nothing was."""
    if not run["checkpoints"]:
        return None
    rows = [
        (one["name"], count(one["step"]), size(one["bytes"]), ", ".join(one["pointers"]) or "",
         _damage(one))
        for one in run["checkpoints"]
    ]  # fmt: skip
    kinds: list[Kind] = ["bad" if _damage(one) else "plain" for one in run["checkpoints"]]
    titles = ("checkpoint", "step", "size", "called", "state")
    return Section("Checkpoints", (Table(titles, rows, "Saved weights.", (1, 2), "checkpoints", kinds),), True)


def _damage(checkpoint: Mapping[str, Any]) -> str:
    if not checkpoint["has_manifest"]:
        return "its manifest cannot be read"
    return "" if checkpoint["is_complete"] else "damaged: a file is missing or cut short"


def alignment_section(run: Run) -> Section:
    """Each part of the run against the definition of BitNet b1.58."""
    rows = run["alignment"]["rows"]
    where, step = MEASURED, run["alignment"]["step"]
    if step is None:
        said = "The model itself has not been measured: 'ternlm report' does so where torch and a checkpoint are there."
        intro = Paragraph(said, "warning")
    else:
        intro = Paragraph(
            f"Weights, activations and layers were measured on the checkpoint of step {step}, schedules are read off "
            f"the log. {verdicts_in_words(run)}"
        )
        if (reached := run["status"]["step"]) is not None and reached != step:
            intro = Paragraph(f"{intro.text} The run has reached step {reached} since.", "warning")
    cells = [(row["part"], row["verdict"], row["definition"], row["run"], row["source"]) for row in rows]
    kinds = [_KINDS[row["verdict"]] for row in rows]
    table = Table(
        ("part", "verdict", "definition", "this run", "read from"), cells,
        "Against BitNet b1.58 (arXiv 2402.17764) and its note on training; what differs may well be meant to.", (),
        f"{where}, metrics/scalars.jsonl, {CONFIG}", kinds,
    )  # fmt: skip
    return Section("Against the paper", (intro, table))


def verdicts_in_words(run: Run) -> str:
    """How many checks hold, and which do not."""
    rows = run["alignment"]["rows"]
    same, differs, unknown = ([row["part"] for row in rows if row["verdict"] == verdict] for verdict in _KINDS)
    said = f"{len(same)} of {len(rows)} checks against BitNet b1.58 hold"
    if differs:
        said += f"; {listed(differs)} {'differs' if len(differs) == 1 else 'differ'}"
    if unknown:
        said += f"; nothing can be said of {listed(unknown)}"
    return f"{said}."


def papers_section(*runs: Run) -> Section | None:
    """The papers of the parts that runs use; None where their settings are not known."""
    papers = {paper["address"]: paper for run in runs for paper in run["papers"]}
    if not papers:
        return None
    rows = [(paper["title"], paper["part"]) for paper in papers.values()]
    caption = f"Chosen by the settings of the {'run' if len(runs) == 1 else 'runs'}."
    table = Table(("paper", "what of it is used"), rows, caption, (), CONFIG, (), list(papers))
    return Section("Papers", (table,), is_folded=True)


def _folder_rows(run: Run) -> list[tuple[str, str]]:
    status = run["status"]
    rows = [("run", run["id"]), ("state", _state(status)), ("ternlm", status["version"]), ("host", status["host"]),
            ("began", status["started_at"]), ("last sign of life", status["updated_at"])]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _state(status: Mapping[str, Any]) -> str:
    reason = f": {status['reason']}" if status["reason"] else ""
    return f"{status['state']}{reason}"


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not data:
        return []
    tokenizer = mapping(data.get("tokenizer"))
    rows = [("data", string(data.get("source"))), ("revision", string(data.get("revision"))),
            ("fingerprint of the data", (string(data.get("fingerprint")) or "")[:16]),
            ("tokenizer", string(tokenizer.get("name")))]  # fmt: skip
    for name, split in mapping(data.get("splits")).items():
        counted = [f"{count(split[what])} {what}" for what in ("documents", "tokens", "bytes") if what in split]
        if counted:
            rows.append((f"{name} split", ", ".join(counted)))
    return [(name, value) for name, value in rows if value]


def _code_rows(sitting: Mapping[str, Any]) -> list[tuple[str, str]]:
    hardware, git = mapping(sitting.get("hardware")), mapping(mapping(sitting.get("git")).get("ternlm"))
    packages, torch = mapping(sitting.get("packages")), mapping(sitting.get("torch"))
    gpus = hardware.get("gpus")
    names = [str(mapping(gpu).get("name")) for gpu in gpus] if isinstance(gpus, list) else []
    cores, memory = whole(hardware.get("cores")), hardware.get("ram_gb")
    machine = [string(hardware.get("cpu")), None if cores is None else f"{cores} cores",
               f"{memory} GiB memory" if isinstance(memory, int | float) else None, *names]  # fmt: skip
    command = sitting.get("command_line")
    rows = [
        ("command line", " ".join(str(word) for word in command) if isinstance(command, list) else None),
        ("commit", string(git.get("commit"))),
        ("machine", ", ".join(part for part in machine if part)),
        ("system", string(sitting.get("platform"))),
        ("python", string(sitting.get("python"))),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("threads", setting(torch["threads"]) if "threads" in torch else None),
        ("seeds", ", ".join(f"{name} {value}" for name, value in mapping(sitting.get("seeds")).items())),
        ("settings, sha256", string(sitting.get("config_sha256"))),
    ]
    return [(name, value) for name, value in rows if value]


def _sittings_table(sittings: list[dict[str, Any]]) -> Table:
    rows = [
        (setting(one.get("started_at") or NOTHING), setting(one.get("stopped_at") or NOTHING),
         count(one.get("first_step")), count(one.get("last_step")), setting(one.get("state") or NOTHING),
         setting(one.get("reason") or one.get("note") or ""))
        for one in sittings
    ]  # fmt: skip
    titles = ("began", "ended", "from step", "to step", "how it ended", "why")
    return Table(titles, rows, "The run was stopped and continued.", (2, 3), PROVENANCE)
