"""Checkpoints: what is saved comes back bit for bit, every kind of damage is named, and nothing foreign loads."""

import copy
import hashlib
import json
import math
import os
import platform
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from builders import randn, random_tokens, tiny_bitnet, tiny_contents
from ternlm import checkpoint
from ternlm.checkpoint.manifest import seal
from ternlm.checkpoint.snapshot import serialize
from ternlm.errors import CheckpointError, Diverged
from ternlm.models import LanguageModel
from ternlm.tokenizers import ByteTokenizer, train_bpe

FILES = [
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
]


def contents(seed: int = 0, model: LanguageModel | None = None, **changed: Any) -> checkpoint.Contents:
    made = tiny_contents(model or tiny_bitnet(vocab_size=256, seed=seed), {"seed": seed})
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
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a fitting sha256 of itself, where it can have one."""
    with suppress(ValueError):
        manifest = manifest | {"sha256": seal(manifest)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def describe(content: bytes = b"") -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def fake(root: Path, *steps: int, pinned: tuple[int, ...] = (), run_id: str | None = "mine") -> None:
    """Folders that verify, and hold nothing."""
    for step in steps:
        folder = root / f"step_{step:06d}"
        folder.mkdir(parents=True)
        for name in FILES:
            (folder / name).touch()
        files = {name: describe() for name in FILES}
        manifest = {"schema": 1, "files": files, "pinned": "boundary" if step in pinned else None, "run_id": run_id}
        write_manifest(folder, manifest)


def test_everything_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = contents(seed=5)
    model_tensors = {name: tensor.clone() for name, tensor in made.model.items()}
    path = checkpoint.save(tmp_path, 12, made, pinned="because")
    assert path.name == "step_000012"
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])
    _, _, model, optimizer, state = checkpoint.open_checkpoint(path)
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


def test_the_manifest_says_whose_checkpoint_it_is_and_what_wrote_it(tmp_path: Path) -> None:
    made = contents(state={"run_id": "demo-1", "progress": {"roll_backs": [{}, {}]}})
    manifest = checkpoint.verify(checkpoint.save(tmp_path, 12, made, pinned="end"))
    wanted = {"schema": 1, "run_id": "demo-1", "step": 12, "pinned": "end", "rollbacks": 2, "finite": True}
    assert manifest.items() >= wanted.items()
    assert manifest["env"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "device": "cpu",
    }
    plain = checkpoint.verify(checkpoint.save(tmp_path, 13, contents()))
    assert (plain["run_id"], plain["pinned"], plain["rollbacks"]) == (None, None, 0)


def test_manifests_from_before_these_fields_still_load(root: Path) -> None:
    path = root / "step_000007"
    manifest = json.loads((path / "manifest.json").read_bytes())
    old = {key: manifest[key] for key in ("schema", "writer", "step", "pinned", "files")} | {"torch": "2.10.0"}
    (path / "manifest.json").write_text(json.dumps(old))
    assert checkpoint.load(path).state["step"] == 7
    said: list[str] = []
    assert checkpoint.open_newest(root, said.append).manifest == old
    assert said == []


@pytest.mark.parametrize("field", ["run_id", "rollbacks", "finite", "env"])
def test_a_manifest_that_lost_its_sha256_is_not_taken_for_an_old_one(root: Path, field: str) -> None:
    path = root / "step_000007"
    manifest = json.loads((path / "manifest.json").read_bytes())
    old = {key: manifest[key] for key in ("schema", "writer", "step", "pinned", "files", field)}
    (path / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=r"manifest\.json.*own sha256"):
        checkpoint.verify(path)


def test_tensors_are_laid_out_so_that_the_library_reads_them() -> None:
    tensors = {
        "b": randn(3, 5), "a": torch.tensor(7.0), "é\n": randn(2, 3).to(torch.bfloat16), "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]), "count": torch.tensor([2**40, -1]), "half": randn(3).half(),
        "codes": torch.tensor([-1, 0, 1], dtype=torch.int8), "double": randn(2).double(),
        "bytes": torch.arange(5, dtype=torch.uint8), "short": torch.arange(3, dtype=torch.int16),
        "int": torch.arange(3, dtype=torch.int32),
    }  # fmt: skip
    ours = b"".join(serialize(tensors))
    assert int.from_bytes(ours[:8], "little") % 8 == 0
    back = safetensors.torch.load(ours)
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == tensor.dtype and torch.equal(back[name], tensor) for name, tensor in tensors.items())
    for same in ({}, {name: randn(3, 5, seed=seed) for seed, name in enumerate(("b", "é", "a"))}):
        assert b"".join(serialize(same)) == safetensors.torch.save(same, {"format": "pt"}), "the library's bytes"


# Reading to go on from


def test_resuming_reads_every_file_of_the_checkpoint_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def counting(path: Any, *args: Any, **options: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", counting)
    made = checkpoint.open_newest(root)
    assert sorted(opened) == sorted([*FILES, "manifest.json"])
    assert (made.path, made.state["step"], made.manifest["step"]) == (root / "step_000007", 7, 7)
    _, _, model, optimizer, state = checkpoint.open_checkpoint(root / "step_000007")
    assert made.state == state
    for ours, theirs in ((made.model, model), (made.optimizer, optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_whose_bytes_are_right_and_whose_content_is_not_is_passed_over(root: Path) -> None:
    replace(root / "step_000007", "optimizer.safetensors", b"x" * 50)
    said: list[str] = []
    assert checkpoint.open_newest(root, said.append).path.name == "step_000003"
    assert len(said) == 1
    assert "optimizer.safetensors" in said[0]


def test_other_versions_than_those_that_wrote_a_checkpoint_are_said(root: Path) -> None:
    path = root / "step_000007"
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["env"] |= {"torch": "1.2.3", "python": platform.python_version(), "device": "cuda"}
    write_manifest(path, manifest)
    said: list[str] = []
    assert checkpoint.open_newest(root, said.append).path == path
    assert len(said) == 1
    assert f"torch 1.2.3 (now {torch.__version__})" in said[0]
    assert "python" not in said[0]


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
    write_manifest(path, json.loads((path / "manifest.json").read_bytes()) | {"schema": 99})
    with pytest.raises(CheckpointError, match=r"manifest\.json.*format 99.*Upgrade"):
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
            mutated = mutate(json.loads(original), draw)
            with suppress(ValueError):
                mutated["sha256"] = seal(mutated)  # as somebody would who wants it to pass
            damaged = json.dumps(mutated).encode()
        (path / "manifest.json").write_bytes(damaged)
        try:
            checkpoint.verify(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


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
        checkpoint.open_checkpoint(path)


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
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(24).half()}), "type float16"),
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
        checkpoint.load_tensors(model, checkpoint.open_checkpoint(path).model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


# Saving: failures of the disk are in test_checkpoint_writer.py


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
