"""Checkpoints: old or new and never a mixture, every kind of damage is detected and named, and nothing foreign loads.

The fault tests let one file-system operation after the other fail, until a save meets none of them.
"""

import copy
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Fault, random_tokens, tiny_bitnet
from ternlm import checkpoint
from ternlm.errors import CheckpointError, Diverged, EnvironmentFault, TernlmError
from ternlm.models import LanguageModel, QuantizationMode
from ternlm.tokenizers import ByteTokenizer, train_bpe
from ternlm.training.optimizer import OptimizerSettings, build_optimizer, optimizer_tensors

FILES = [
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
]


def contents(seed: int = 0, model: LanguageModel | None = None, **changed: Any) -> checkpoint.Contents:
    model = model or tiny_bitnet(vocab_size=256, seed=seed)
    optimizer = build_optimizer(model, OptimizerSettings())
    model(random_tokens(2, 5)).logits.square().mean().backward()
    optimizer.step()
    config = {
        "model": model.settings.model_dump(mode="json"),
        "quantization": QuantizationMode().model_dump(mode="json"),
        "training": {"precision": "fp32"},
        "data": {"sequence_length": 9},
    }
    made = checkpoint.Contents(
        model.tensors(), optimizer_tensors(model, optimizer), {"seed": seed}, config, ByteTokenizer()
    )
    return made._replace(**changed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for step in (3, 7):
        checkpoint.save(root, step, contents(seed=step))
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A copy of two good checkpoints, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def edit_json(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file and its entry in the manifest, as somebody would who wants it to pass."""
    value = json.loads((path / name).read_bytes())
    value = change(value) or value
    replace(path, name, json.dumps(value).encode())


def replace(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_everything_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = contents(seed=5)
    model_tensors = {name: tensor.clone() for name, tensor in made.model.items()}
    path = checkpoint.save(tmp_path, 12, made, pinned="because")
    assert path.name == "step_000012"
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])
    model, optimizer, state = checkpoint.read_training_state(path)
    assert model.keys() == model_tensors.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in model_tensors.items())
    assert all(torch.equal(optimizer[name], tensor) for name, tensor in made.optimizer.items())
    assert (state["step"], state["seed"]) == (12, 5)
    loaded = checkpoint.load(path)
    assert all(torch.equal(loaded.model.tensors()[name], tensor) for name, tensor in model_tensors.items())
    assert not loaded.model.training
    assert loaded.tokenizer.fingerprint == ByteTokenizer.fingerprint
    assert loaded.config == made.config
    assert checkpoint.verify(path)["pinned"] == "because"


def test_a_loaded_model_computes_the_same_logits(root: Path) -> None:
    model = tiny_bitnet(vocab_size=256, seed=7)
    made = contents(seed=7, model=model)
    loaded = checkpoint.load(checkpoint.save(root, 9, made))
    tokens = random_tokens(2, 11, seed=1)
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, model.eval()(tokens).logits)


def test_l02_a_checkpoint_is_safetensors_and_json_and_nothing_else(root: Path) -> None:
    for file in (root / "step_000007").iterdir():
        if file.suffix == ".json":
            assert isinstance(json.loads(file.read_bytes()), dict)
        else:
            size = int.from_bytes(file.read_bytes()[:8], "little")
            assert file.suffix == ".safetensors"
            assert isinstance(json.loads(file.read_bytes()[8 : 8 + size]), dict)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_not_saved(root: Path, value: float) -> None:
    made = contents()
    tensors = dict(made.model)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone().fill_(value)
    with pytest.raises(Diverged, match=r"model\.norm\.weight.*not saved"):
        checkpoint.save(root, 9, made._replace(model=tensors))
    assert checkpoint.steps(root) == [3, 7]


# Damage


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_every_removed_file_is_noticed_and_named_and_the_previous_checkpoint_is_used(root: Path, name: str) -> None:
    newest = root / "step_000007"
    (newest / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.verify(newest)
    said: list[str] = []
    assert checkpoint.newest_valid(root, said.append).name == "step_000003"
    assert len(said) == 1
    assert name in said[0]


@pytest.mark.parametrize("name", FILES)
def test_every_truncated_file_is_noticed_and_named(root: Path, name: str) -> None:
    newest = root / "step_000007"
    whole = (newest / name).read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (newest / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{name.replace('.', r'[.]')}.*truncated"):
            checkpoint.verify(newest)
        assert checkpoint.newest_valid(root).name == "step_000003"
    (newest / name).write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="bytes"):
        checkpoint.verify(newest)


@pytest.mark.parametrize("name", FILES)
def test_single_flipped_bits_are_noticed_and_named(root: Path, name: str) -> None:
    newest, draw = root / "step_000007", random.Random(name)
    whole = (newest / name).read_bytes()
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            checkpoint.load(newest)
        with pytest.raises(CheckpointError):
            checkpoint.read_training_state(newest)
    assert checkpoint.newest_valid(root).name == "step_000003"


def test_a_link_or_folder_in_place_of_a_file_is_refused(root: Path, tmp_path: Path) -> None:
    newest = root / "step_000007"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(newest / "model.safetensors", elsewhere)
    (newest / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.verify(newest)
    (newest / "model.safetensors").unlink()
    (newest / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.verify(newest)


def test_no_valid_checkpoint_at_all_is_an_error_and_not_a_restart(root: Path) -> None:
    for step in (3, 7):
        (root / f"step_{step:06d}" / "manifest.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 damaged") as caught:
        checkpoint.newest_valid(root)
    assert caught.value.exit_code == 3
    with pytest.raises(CheckpointError, match="none"):
        checkpoint.newest_valid(root / "missing")


def test_a_newer_format_is_refused_with_the_way_out(root: Path) -> None:
    path = root / "step_000007"
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*Upgrade"):
        checkpoint.load(path)


ODD_VALUES: list[Any] = [
    None,
    "",
    "x",
    [],
    {},
    0,
    -1,
    True,
    1.5,
    [1],
    {"a": 1},
    "../model.safetensors",
    "\ud800",
    "a" * 300,
]


def mutate(value: Any, draw: random.Random) -> Any:
    """Somewhere in a JSON value: a key removed, renamed or given another value."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        action = draw.randrange(3)
        if action == 0 and isinstance(place, dict):
            del place[key]
        elif action == 1 and isinstance(place, dict):
            place[str(draw.choice(["x", "", "..", "/etc/passwd", "a\0b", "é" * 200, "\ud800"]))] = place.pop(key)
        else:
            place[key] = draw.choice(ODD_VALUES)
        return value


def test_fuzzed_manifests_raise_checkpoint_errors_and_nothing_else(root: Path) -> None:
    path, draw = root / "step_000007", random.Random(1)
    original = (path / "manifest.json").read_bytes()
    refused = 0
    for trial in range(500):
        if trial % 2:
            content = bytearray(original)
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(len(content))] = draw.randrange(256)
            damaged = bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        else:
            damaged = json.dumps(mutate(json.loads(original), draw)).encode()
        (path / "manifest.json").write_bytes(damaged)
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300
    for hostile in (
        b"[" * 100_000,
        b"9" * 5000,
        b'{"schema": 1, "files": []}',
        b"null",
        b'{"schema": NaN, "files": {}}',
    ):
        (path / "manifest.json").write_bytes(hostile)
        with pytest.raises(CheckpointError):
            checkpoint.verify(path)
    assert checkpoint.newest_valid(root).name == "step_000003"


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json"])
def test_fuzzed_settings_with_right_hashes_raise_typed_errors_only(root: Path, name: str) -> None:
    path, draw = root / "step_000007", random.Random(name)
    original = json.loads((path / name).read_bytes())
    refused = 0
    for _ in range(60):
        edit_json(path, name, lambda value: mutate(original, draw))
        try:
            checkpoint.load(path)
        except CheckpointError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04zip", b"\x80\x04\x95pickle", b"\xff" * 64, (2**63 - 1).to_bytes(8, "little") + b"{}", b"{}" * 50],
)
def test_l02_what_only_looks_like_tensors_is_refused(root: Path, name: str, content: bytes) -> None:
    path = root / "step_000007"
    replace(path, name, content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.read_training_state(path)


def test_the_wrong_tokenizer_in_a_checkpoint_is_refused(root: Path, tmp_path: Path) -> None:
    path = root / "step_000007"
    train_bpe(["a few words and some more words"] * 20, 270).save(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        replace(path, name, (tmp_path / "other" / name).read_bytes())
    with pytest.raises(CheckpointError, match="not the one the model was"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"lacks tensor 'model\.norm\.weight'"),
        (lambda tensors: tensors.update(extra=torch.zeros(3)), "unknown tensor 'extra'"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}), r"shape \(5,\)"),
        (
            lambda tensors: tensors.update({"_orig_mod.model.norm.weight": tensors.pop("model.norm.weight")}),
            r"model\.norm\.weight",
        ),
    ],
)
def test_foreign_tensors_are_refused_by_name_and_the_model_is_untouched(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    made = contents()
    tensors = dict(made.model)
    change(tensors)
    path = checkpoint.save(tmp_path, 1, made._replace(model=tensors))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)
    model = tiny_bitnet(vocab_size=256, seed=9)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_tensors(model, checkpoint.read_training_state(path)[0], path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


# Faults while saving


@pytest.mark.parametrize("sticks", [False, True])
def test_l11_a_failure_at_any_operation_of_a_save_leaves_the_old_or_the_new_checkpoint(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sticks: bool
) -> None:
    made, failures = contents(seed=8), 0
    for n in range(1, 200):
        root = Path(shutil.copytree(saved, tmp_path / str(n)))
        with monkeypatch.context() as patch:
            fault = Fault(patch.setattr, n, sticks)
            try:
                checkpoint.save(root, 8, made)
                failed = False
            except TernlmError as error:
                failed = True
                assert error.exit_code == 3
        if not fault.met:
            break
        failures += failed
        newest = checkpoint.newest_valid(root)
        assert newest.name in (("step_000007", "step_000008") if failed else ("step_000008",))
        checkpoint.load(newest)
        assert checkpoint.steps(root)[:2] == [3, 7]
        checkpoint.remove_unfinished(root)
        assert checkpoint.save(root, 8, made) == checkpoint.newest_valid(root), "the next save succeeds"
        assert {path.name for path in root.iterdir()} == {f"step_00000{step}" for step in (3, 7, 8)}
        shutil.rmtree(root)
    else:
        pytest.fail("the save never ended")
    assert failures > 15


def test_l11_the_name_appears_only_after_the_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), real_fsync(descriptor))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(Path(b).name), real_rename(a, b))[1])
    checkpoint.save(tmp_path, 4, contents())
    place = order.index("step_000004")
    assert order[:place].count("fsync") == len(FILES) + 4, (
        "each file, the manifest; the folder, also after each tokenizer file"
    )
    assert order[place + 1 :] == ["fsync"], "the folder that holds the new name"


def test_what_a_killed_process_left_is_ignored_and_removed(root: Path) -> None:
    for name in (".tmp-step_000009", ".del-step_000001"):
        shutil.copytree(root / "step_000007", root / name)
    (root / "step_12").mkdir()
    (root / "step_000011.bak").mkdir()
    assert checkpoint.steps(root) == [3, 7]
    checkpoint.remove_unfinished(root)
    assert sorted(path.name for path in root.iterdir()) == ["step_000003", "step_000007", "step_000011.bak", "step_12"]


# Retention, order and names


def fake(root: Path, *steps: int, pinned: tuple[int, ...] = ()) -> None:
    for step in steps:
        folder = root / f"step_{step:06d}"
        folder.mkdir(parents=True)
        manifest = {"schema": 1, "files": {}, "pinned": "boundary" if step in pinned else None}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_e11_steps_are_ordered_by_number_and_not_by_name(tmp_path: Path) -> None:
    fake(tmp_path, 9_000, 10_000, 999_999, 1_000_000, 200)
    assert checkpoint.steps(tmp_path) == [200, 9_000, 10_000, 999_999, 1_000_000]
    assert checkpoint.newest_valid(tmp_path).name == "step_1000000"
    assert sorted(path.name for path in tmp_path.iterdir() if len(path.name) == 11) == [
        "step_000200",
        "step_009000",
        "step_010000",
        "step_999999",
    ]


def test_pruning_keeps_the_last_the_best_the_pinned_and_every_nth(tmp_path: Path) -> None:
    fake(tmp_path, *range(100, 1100, 100), pinned=(200,))
    checkpoint.point(tmp_path, "best", tmp_path / "step_000300")
    assert checkpoint.prune(tmp_path, keep_last=2, keep_every=400) == [100, 500, 600, 700]
    assert checkpoint.steps(tmp_path) == [200, 300, 400, 800, 900, 1000]
    assert checkpoint.prune(tmp_path, keep_last=2, keep_every=400) == []
    assert not list(tmp_path.glob(".del-*"))


def test_pruning_never_deletes_the_only_checkpoint_nor_what_it_did_not_write(tmp_path: Path) -> None:
    fake(tmp_path, 5)
    (tmp_path / "step_5_notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoint.prune(tmp_path, keep_last=0) == []
    assert {path.name for path in tmp_path.iterdir()} == {"step_000005", "step_5_notes", "notes.txt"}


def test_pruning_renames_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, 1, 2, 3)
    deleted: list[str] = []
    monkeypatch.setattr(checkpoint.store.shutil, "rmtree", lambda path, **options: deleted.append(Path(path).name))
    checkpoint.prune(tmp_path, keep_last=2)
    assert set(deleted) == {".del-step_000001"}
    assert checkpoint.steps(tmp_path) == [2, 3]


@pytest.fixture
def runs(root: Path, tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo-1"
    (run / "meta").mkdir(parents=True)
    shutil.copytree(root, run / "checkpoints")
    checkpoint.point(run / "checkpoints", "best", run / "checkpoints" / "step_000003")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("reference", "step"),
    [
        ("demo-1", 7),
        ("demo", 7),
        ("latest", 7),
        ("demo-1@last", 7),
        ("demo-1@best", 3),
        ("demo-1@3", 3),
        ("demo-1@step_000003", 3),
        ("latest@000007", 7),
    ],
)
def test_a_run_and_a_step_lead_to_a_checkpoint(runs: Path, reference: str, step: int) -> None:
    assert checkpoint.resolve(reference, runs) == runs / "demo-1" / "checkpoints" / f"step_{step:06d}"


def test_a_checkpoint_folder_is_a_reference_too(runs: Path, tmp_path: Path) -> None:
    path = runs / "demo-1" / "checkpoints" / "step_000003"
    assert checkpoint.resolve(str(path), tmp_path) == path
    moved = Path(shutil.copytree(path, tmp_path / "my-model"))
    assert checkpoint.resolve(str(moved), tmp_path) == moved
    assert checkpoint.resolve(str(runs / "demo-1"), tmp_path).name == "step_000007"


def test_the_last_falls_back_and_a_named_step_never_does(runs: Path) -> None:
    newest = runs / "demo-1" / "checkpoints" / "step_000007"
    (newest / "model.safetensors").write_bytes(b"")
    assert checkpoint.resolve("demo-1", runs).name == "step_000003"
    assert checkpoint.resolve("demo-1@7", runs) == newest
    with pytest.raises(CheckpointError):
        checkpoint.load(newest)


@pytest.mark.parametrize(
    "reference", ["nothing", "demo-1@8", "demo-1@final", "demo-1@x", "a/step_000003", "demo-1@../.."]
)
def test_a_reference_that_leads_nowhere_is_one_sentence(runs: Path, reference: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.resolve(reference, runs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"../../etc\n", b"\xff\xfe\x00", b"step_9\n", b"step_000003\nstep_000007\n"])
def test_a_damaged_pointer_is_one_sentence_and_pruning_survives_it(runs: Path, content: bytes) -> None:
    root = runs / "demo-1" / "checkpoints"
    (root / "best").write_bytes(content)
    with pytest.raises(CheckpointError, match="no 'best' checkpoint"):
        checkpoint.resolve("demo-1@best", runs)
    assert checkpoint.prune(root, keep_last=2) == []


def test_a_pointer_that_cannot_be_written_is_a_typed_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.point(root, "last", root / "step_000003")
    with monkeypatch.context() as patch:
        Fault(patch.setattr, 1, sticks=True)
        with pytest.raises(EnvironmentFault, match="last"):
            checkpoint.point(root, "last", root / "step_000007")
    assert (root / "last").read_text() == "step_000003\n"
