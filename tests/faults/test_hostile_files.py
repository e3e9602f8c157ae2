"""Thousands of mutated files: each loads or is refused by one typed sentence, and nothing else ever happens.

The mutations know the structure of what they change, and four in five repair the hashes, as somebody would who wants
his file to be read. While a file is read, an audit hook watches for code, processes, connections and writing, a timer
for hangs, and memory is limited to a gigabyte above what the process has. ``TERNLM_FAULTS_SCALE=10`` tries ten times
as many.
"""

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import Row, apart
from mutations import (
    mutated_bytes,
    mutated_json,
    mutated_protobuf,
    mutated_safetensors,
    mutated_value,
    mutated_yaml,
    to_text,
)
from scenes import SCENES, contents, place
from seeds import VALUES, YAML, YAML_PIECES, tokenizer_files
from tripwires import Findings, Tripwires

from builders import tiny_bitnet, tiny_settings
from ternlm import checkpoint, recipes
from ternlm.checkpoint.manifest import seal as seal_checkpoint
from ternlm.data import statistics
from ternlm.data.corpus import load_corpus, seal, split_id
from ternlm.data.writer import SplitWriter
from ternlm.errors import CheckpointError, DataError, SettingsError, TernlmError, TokenizerError
from ternlm.run_directory import RunDirectory, append_jsonl, read_jsonl
from ternlm.settings.resolve import Layer, parse_overrides, read_mapping, resolve
from ternlm.tokenizers import load_tokenizer
from ternlm.training.optimizer import OptimizerSettings, build_optimizer, load_optimizer_tensors
from ternlm.training.settings import RunSettings, setting_names

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are used as Linux has them"),
]

SEED, SCALE = 5, float(os.environ.get("TERNLM_FAULTS_SCALE", "1"))
Trial = Callable[[random.Random], tuple[str, Callable[[], object]]]
"""Makes a mutated file and returns what was changed, and what reads it."""


@pytest.mark.parametrize(
    "target",
    ["checkpoints", "settings", "overrides", "tokenizers", "corpora", "preparations", "metrics", "cuts"],
)
def test_hostile(target: str, folder: Path, row: Row) -> None:
    found = apart(read_hostile_files, target, str(folder), seconds=900)
    row.test = f"hostile {target}"
    row.trials, counts = found["trials"], found["counts"]
    row.injected = f"{counts.get('refused', 0):,} refused, {counts.get('loaded', 0):,} loaded"
    assert not found["wrong"], "\n".join(f"{what}\n    {where}" for what, where in found["wrong"].items())
    assert counts.get("refused", 0) > found["trials"] / 10, "mutations that nobody refuses show nothing"
    assert found["controls"] == found["all_controls"], found
    row.controls = f"{len(found['controls'])} of {len(found['all_controls'])}"
    row.result = "typed errors only; no hang, no code, no writing"


# In a process of its own


def read_hostile_files(target: str, name: str) -> dict[str, Any]:
    """Mutate and read, and watch what happens."""
    folder = Path(name)
    place(folder / "scenes")
    trial_of, expected, trials = TARGETS[target]
    (folder / "work").mkdir()
    trial = trial_of(folder / "work")
    for number in range(100):  # what is imported late is imported now
        try:
            trial(random.Random(number))[1]()
        except BaseException:  # noqa: BLE001 (the same trials are judged below)
            continue
    findings = Findings(Tripwires(folder / "work"), SEED)
    caught = [bug for bug, load in BUGS.items() if _is_noticed(findings, load, folder)]
    count = int(trials * SCALE)
    for number in range(count):
        what, load = trial(findings.draw(target, number))
        findings.judge(f"seed {SEED}, {target}, trial {number}: {what}", expected, load, target in WRITING)
    return {
        "trials": count, "counts": findings.counts, "wrong": findings.wrong,
        "controls": caught, "all_controls": list(BUGS),
    }  # fmt: skip


def checkpoints(folder: Path) -> Trial:
    for step in (7, 8):
        checkpoint.save(folder, step, contents(step))
    path = folder / "step_000008"
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    names = ["manifest.json", *["config.json"] * 2, "trainer_state.json", "model.safetensors", "optimizer.safetensors"]
    model = tiny_bitnet(vocab_size=256, hidden_size=8, num_hidden_layers=1, intermediate_size=24)
    optimizer = build_optimizer(model, OptimizerSettings())

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        name = draw.choice([*names, "tokenizer.json", "tokenizer_config.json"])
        change = mutated_safetensors if name.endswith(".safetensors") else mutated_json
        for file, content in whole.items():
            (path / file).write_bytes(content)
        (path / name).write_bytes(change(whole[name], draw))
        if draw.random() < 0.8:
            repair_checkpoint(path, whole["manifest.json"] if name != "manifest.json" else None)
        way = draw.choice([checkpoint.verify, checkpoint.load, checkpoint.load, restore])
        return f"{name}, {getattr(way, '__name__', way)}", lambda: way(path)

    def restore(path: Path) -> None:
        _, _, tensors, moments, _ = checkpoint.open_checkpoint(path)
        checkpoint.load_tensors(model, tensors, path)
        load_optimizer_tensors(model, optimizer, moments)

    return trial


def repair_checkpoint(path: Path, manifest: bytes | None) -> None:
    """Make the manifest fit the files, where it is still one."""
    try:
        value = json.loads(manifest or (path / "manifest.json").read_bytes())
        if manifest is not None:
            for name, entry in value["files"].items():
                content = (path / name).read_bytes()
                entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        value["sha256"] = seal_checkpoint(value)
        (path / "manifest.json").write_text(json.dumps(value))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return  # beyond repair


def settings(folder: Path) -> Trial:
    names = setting_names()
    seeds = [path.read_bytes() for path in sorted(Path(recipes.__file__).parent.glob("*.yaml"))]
    full = tiny_settings(folder / "data").model_dump(mode="json")
    seeds += [json.dumps(full).encode(), YAML]

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        way = draw.choice(["yaml", "json", "mapping", "mapping"])
        if way == "mapping":
            value = mutated_value(full, draw)
            return way, lambda: RunSettings.from_mapping(value if isinstance(value, dict) else {"model": value})
        file = folder / f"settings.{way}"
        content = json.dumps(full).encode() if way == "json" else draw.choice(seeds)
        file.write_bytes(mutated_json(content, draw) if way == "json" else mutated_yaml(content, draw))
        return way, lambda: RunSettings.from_mapping(resolve([Layer("file", read_mapping(file))], names).values)

    return trial


def overrides(folder: Path) -> Trial:
    names = setting_names()
    known = [f"{section}.{field}" for section, fields in names.sections.items() for field in sorted(fields)]
    words = [*known, *names.aliases, *names.section_aliases, "", "model", "model.", ".", "=", "a" * 3000]

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        value = draw.choice([*VALUES, *(piece.decode("utf-8", "surrogateescape") for piece in YAML_PIECES)])
        if draw.random() < 0.3:
            value = mutated_bytes(os.fsencode(value.replace("\ud800", "")), draw).decode("utf-8", "surrogateescape")
        word = f"{draw.choice(words)}={value}"

        def load() -> None:
            layers = [Layer("defaults", {"training": {"max_steps": 5}}), Layer("command line", parse_overrides([word]))]
            RunSettings.from_mapping(resolve(layers, names).values)

        return f"{word!r:.120}", load

    return trial


def tokenizers(folder: Path) -> Trial:
    seeds = tokenizer_files(folder / "seeds")
    text = "A story: naïve 🙂 <s> don't 123\n"

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        name = draw.choice(list(seeds))
        work = folder / "tokenizer"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(seeds[name], work)
        files = sorted(path for path in work.iterdir())
        file = draw.choice(files)
        content = file.read_bytes()
        change = {".json": mutated_json, ".model": mutated_protobuf}.get(file.suffix, mutated_bytes)
        file.write_bytes(change(content, draw))
        if draw.random() < 0.8:
            repair_tokenizer(work)

        def load() -> None:
            loaded = load_tokenizer(work)
            assert all(0 <= index < loaded.vocab_size for index in loaded.encode(text))
            loaded.decode(loaded.encode(text))
            loaded.token_bytes()

        return f"{name}/{file.name}", load

    return trial


def repair_tokenizer(folder: Path) -> None:
    """Forget the fingerprint that we save, so that the rest is looked at."""
    file = folder / "tokenizer_config.json"
    try:
        value = json.loads(file.read_bytes())
        del value["ternlm"]
        file.write_text(json.dumps(value))
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return


def corpora(folder: Path) -> Trial:
    SCENES["prepare"].act(folder)
    corpus = folder / "corpus"
    whole = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    manifest = json.loads((corpus / "manifest.json").read_bytes())
    others = [path for path in whole if path.suffix == ".bin"]

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        for path, content in whole.items():
            path.write_bytes(content)
        file = corpus / "manifest.json"
        if draw.random() < 0.2:
            file = draw.choice(others)
            file.write_bytes(mutated_bytes(whole[file], draw))
        elif draw.random() < 0.2:
            file.write_bytes(mutated_json(whole[file], draw))
        else:
            value = mutated_value(manifest, draw)
            file.write_bytes(to_text(repaired_manifest(value), draw))
        verify = draw.random() < 0.5

        def load() -> None:
            loaded = load_corpus(corpus, verify)
            for name in loaded.splits:
                stream = loaded.split(name)
                stream.read(0, min(len(stream), 100_000))
                stream.document_hashes.sum()
            statistics(loaded, 16)

        return str(file.relative_to(corpus)), load

    return trial


def repaired_manifest(value: Any) -> Any:
    try:
        for split in value["splits"].values():
            split["eval_id"] = split_id(split)
        value["sha256"] = seal(value)
    except (LookupError, TypeError, AttributeError, ValueError):
        pass
    return value


def preparations(folder: Path) -> Trial:
    """What an interrupted preparation left, changed; it goes on or says so, and never ends with other bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitWriter, "finish", lambda self: (_ for _ in ()).throw(DataError("interrupted")))
        with suppress(DataError):
            SCENES["prepare"].act(folder / "whole")
    state = folder / "whole" / "corpus" / "progress.json"
    others = [path.relative_to(folder / "whole") for path in state.parent.rglob("*.part")]

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        work = folder / "preparation"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "whole", work)
        if draw.random() < 0.7:
            what = state.relative_to(folder / "whole")
            value = mutated_value(json.loads(state.read_bytes()), draw)
            if isinstance(value, dict):
                value["identity"] = json.loads(state.read_bytes())["identity"]
            (work / what).write_bytes(to_text(value, draw))
        else:
            what = draw.choice(others)
            (work / what).write_bytes(mutated_bytes((work / what).read_bytes(), draw))

        def load() -> None:
            SCENES["prepare"].act(work)
            load_corpus(work / "corpus", verify=True)

        return str(what), load

    return trial


def metrics(folder: Path) -> Trial:
    run = RunDirectory(folder / "run")
    run.create()
    for step in range(12):
        append_jsonl(run.scalars, {"step": step, "train/loss": 3.5, "text": "naïve\n", "nested": {"a": [1, None]}})
    seed = run.scalars.read_bytes()

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        lines = seed.splitlines()
        place = draw.randrange(len(lines))
        lines[place] = mutated_json(lines[place], draw)
        run.scalars.write_bytes(mutated_bytes(seed, draw) if draw.random() < 0.3 else b"\n".join(lines) + b"\n")

        def load() -> None:
            rows = read_jsonl(run.scalars)
            assert all(isinstance(row, dict) for row in rows)
            if len(rows) < len(lines):
                raise DataError("a row was skipped")

        return f"row {place}", load

    return trial


def cuts(folder: Path) -> Trial:
    """Metrics, cut back as a resumed run does."""
    read = metrics(folder)
    run = RunDirectory(folder / "run")
    table = b"step,loss\n" + b"".join(b"%d,1.5\n" % step for step in range(12))

    def trial(draw: random.Random) -> tuple[str, Callable[[], object]]:
        what, _ = read(draw)
        run.training_csv.write_bytes(mutated_bytes(table, draw))

        def load() -> None:
            before = len(read_jsonl(run.scalars))
            run.cut_after(6)
            rows = read_jsonl(run.scalars)
            assert all(float(row.get("step", 0)) <= 6 for row in rows)
            if before < 12:
                raise DataError("a row was skipped")

        return what, load

    return trial


TARGETS: dict[str, tuple[Callable[[Path], Trial], tuple[type[TernlmError], ...], int]] = {
    "checkpoints": (checkpoints, (CheckpointError, TokenizerError), 8000),
    "settings": (settings, (SettingsError,), 5000),
    "overrides": (overrides, (SettingsError,), 5000),
    "tokenizers": (tokenizers, (TokenizerError,), 5000),
    "corpora": (corpora, (DataError,), 5000),
    "preparations": (preparations, (DataError,), 1000),
    "metrics": (metrics, (DataError,), 5000),
    "cuts": (cuts, (DataError,), 2000),
}
WRITING = ("preparations", "cuts")


# Negative controls: what a careless reader would do


def _never_ends(folder: Path) -> None:
    while True:
        pass


def _uses_much_memory(folder: Path) -> None:
    bytearray(2**33)


def _imports_by_name(folder: Path) -> None:
    exec(compile("1", "from-a-file", "exec"))


def _starts_a_process(folder: Path) -> None:
    os.posix_spawn("/bin/true", ["true"], {})


def _writes(folder: Path) -> None:
    (folder / "work" / "written").write_text("x")


def _reads_elsewhere(folder: Path) -> None:
    Path("/etc/passwd").read_bytes()


BUGS: dict[str, Callable[[Path], None]] = {
    "an endless loop": _never_ends,
    "memory by declared size": _uses_much_memory,
    "code": _imports_by_name,
    "a process": _starts_a_process,
    "writing": _writes,
    "reading elsewhere": _reads_elsewhere,
    "a plain exception": lambda folder: json.loads("{"),
}


def _is_noticed(findings: Findings, load: Callable[[Path], object], folder: Path) -> bool:
    findings.judge("control", (TernlmError,), lambda: load(folder))
    found = bool(findings.wrong)
    findings.wrong.clear()
    findings.counts.clear()
    return found
