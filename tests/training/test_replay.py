"""Computing a step again: what lies in data and weights comes out the same, what came from outside does not."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from builders import TRAIN, let_data_be_bad, tiny_corpus, tiny_settings
from streams import some_files, stream_settings, write_dataset
from ternlm import checkpoint
from ternlm.data.preparation import Prepared, prepare_data
from ternlm.errors import CheckpointError, DataError, EnvironmentFault
from ternlm.run_directory import RunDirectory
from ternlm.settings.resolve import Resolved
from ternlm.training import launch
from ternlm.training.replay import Replay, replay
from ternlm.training.settings import RunSettings
from ternlm.training.trainer import Trainer

BATCH, STEPS = 4, 24
EDGY = {"window": 8, "min_values": 8, "spike_scale": 1e-3, "grace_steps": 0, "cooldown_steps": 1}
"""A gradient a little above the median counts as a spike, and its update is skipped."""

BAD = {*range(11 * BATCH, 14 * BATCH), 18 * BATCH, 22 * BATCH}
"""Samples whose batch gives no finite gradient: updates 11 to 13, and after the return to step 8 updates 10 and 14."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"), train=TRAIN[:20])


@pytest.fixture(scope="module")
def edgy(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> RunDirectory:
    """A run with spikes before and after its first checkpoint, at step 10."""
    path = tmp_path_factory.mktemp("edgy") / "run"
    return start(path, prepared, EDGY, checkpoint_every_steps=10, keep_last=3)


@pytest.fixture
def copy(edgy: RunDirectory, tmp_path: Path) -> RunDirectory:
    """The same run, to be damaged."""
    return RunDirectory(Path(shutil.copytree(edgy.path, tmp_path / "copy")))


def given(prepared: Prepared) -> launch.Prepare:
    return lambda settings, folder: prepared


def settings_of(path: Path, anomaly: dict[str, Any], **training: Any) -> RunSettings:
    return tiny_settings(
        path.parent,
        training={"max_steps": STEPS, "batch_size": BATCH, "checkpoint_every_steps": 4} | training,
        optimizer={"learning_rate": 3e-2},
        tracking={"every_steps": 1, "tensorboard": False},
        evaluation={"every_steps": 1000},
        anomaly=anomaly,
    )


def start(path: Path, prepared: Prepared, anomaly: dict[str, Any], **training: Any) -> RunDirectory:
    settings, run = settings_of(path, anomaly, **training), RunDirectory(path)
    launch.start(Resolved(settings.model_dump(mode="json"), {}), run, given(prepared), quiet=True)
    return run


def again(run: RunDirectory, name: str, prepared: Prepared, said: Callable[[str], None] = str) -> Replay:
    return replay(run.anomalies / name, given(prepared), said)


def evidence_steps(run: RunDirectory) -> list[int]:
    return sorted(int(path.name[5:11]) for path in run.anomalies.glob("*_grad_spike"))


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def tree(run: RunDirectory) -> dict[str, tuple[bytes, int]]:
    files = (path for path in run.path.rglob("*") if path.is_file() and path.name not in ("run.lock", ".lock"))
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_every_anomaly_of_a_run_comes_out_bit_for_bit_and_the_run_is_only_read(
    edgy: RunDirectory, prepared: Prepared
) -> None:
    steps, kept, before = evidence_steps(edgy), checkpoint.steps(edgy.checkpoints), tree(edgy)
    assert len(steps) >= 3
    assert min(steps) < kept[0] <= max(steps), "some before the first checkpoint, some after"
    for step in steps:
        result = again(edgy, f"step_{step:06d}_grad_spike", prepared)
        assert (result.verdict, result.same_batch) == ("reproduced bit for bit", True)
        assert result.start.step == max((saved for saved in kept if saved <= step), default=0)
        assert (result.start.opened is None) == (step < kept[0])
        assert result.replayed == result.recorded
    assert tree(edgy) == before


def test_it_says_first_how_far_it_is_and_then_where_it_is(edgy: RunDirectory, prepared: Prepared) -> None:
    step, heard = evidence_steps(edgy)[0], []
    progress = lambda done, total: heard.append((done, total))  # noqa: E731
    replay(edgy.anomalies / f"step_{step:06d}_grad_spike", given(prepared), heard.append, progress)
    assert heard[0] == f"replaying step {step}: {step} steps from the initial weights, then the step itself"
    assert heard[1:] == [(done, step) for done in range(step + 1)]


def test_a_damaged_checkpoint_is_passed_over(copy: RunDirectory, prepared: Prepared) -> None:
    step, kept = evidence_steps(copy)[-1], checkpoint.steps(copy.checkpoints)
    newest = [saved for saved in kept if saved <= step][-1]
    (checkpoint.folder(copy.checkpoints, newest) / "model.safetensors").write_bytes(b"")
    result = again(copy, f"step_{step:06d}_grad_spike", prepared)
    assert result.start.step < newest
    assert result.verdict == "reproduced bit for bit"


def test_a_fault_from_outside_is_not_reproduced_and_its_place_is_shown(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Trainer._build_model

    def with_hook(self: Trainer) -> Any:
        model = build(self)
        parameter = model.get_parameter("model.layers.1.mlp.down.weight")
        parameter.register_hook(lambda g: g * math.nan if self.progress.step == 5 else g)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_build_model", with_hook)
        run = start(tmp_path / "run", prepared, {})
    result = again(run, "step_000005_nan_inf_grad", prepared)
    assert result.verdict == "not reproduced"
    assert "injected from outside" in result.likely_reason
    assert "codes, batch and loss are the same" in result.likely_reason
    name, recorded, replayed = result.notable()[0]
    assert name == "model.layers.1.mlp.down.weight"
    assert math.isnan(recorded)
    assert math.isfinite(replayed)


@pytest.fixture
def bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cause be in the data: gradients of some batches are NaN, whoever computes them."""
    let_data_be_bad(monkeypatch, BAD)


@pytest.mark.usefixtures("bad_data")
def test_the_sample_counter_tells_on_which_side_of_a_roll_back_a_step_lies(tmp_path: Path, prepared: Prepared) -> None:
    rules = {"roll_back_steps": 4, "skip_batches": 8, "cooldown_steps": 1}
    run = start(tmp_path / "run", prepared, rules, keep_every=4)
    again_at = partial(again, run, prepared=prepared)
    assert len(checkpoint.open_newest(run.checkpoints).state["progress"]["roll_backs"]) == 1
    for step, since, returned in ((11, 8, False), (12, 8, False), (13, 8, False), (10, 8, True), (14, 12, False)):
        result = again_at(f"step_{step:06d}_nan_inf_grad")
        assert (result.start.step, result.start.roll_backs is not None) == (since, returned), step
        assert result.verdict == "reproduced bit for bit", step
        assert math.isnan(result.replayed.gradient_norms["model.norm.weight"])
    shutil.rmtree(checkpoint.folder(run.checkpoints, 8))
    with pytest.raises(CheckpointError, match=r"no checkpoint .* leads to step 10 .*steps kept: 4, 12, "):
        again_at("step_000010_nan_inf_grad")
    assert again_at("step_000011_nan_inf_grad").start.step == 4


def test_initial_weights_are_not_where_a_branch_began(copy: RunDirectory, prepared: Prepared) -> None:
    name = f"step_{evidence_steps(copy)[0]:06d}_grad_spike"
    edit(copy.provenance, lambda record: record["sittings"][0].update(first_step=3))
    with pytest.raises(CheckpointError, match="leads to step"):
        again(copy, name, prepared)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1 + 1e-6, "reproduced within 1e-3"), (1 + 1e-2, "not reproduced"), (math.nan, "not reproduced")],
)
@pytest.mark.parametrize("quantity", ["loss", "grad_norm", "gradient_norms"])
def test_the_verdict_depends_on_how_much_differs(
    edgy: RunDirectory, prepared: Prepared, quantity: str, factor: float, verdict: str
) -> None:
    result = again(edgy, f"step_{evidence_steps(edgy)[-1]:06d}_grad_spike", prepared)
    value = getattr(result.replayed, quantity)
    if quantity == "gradient_norms":
        value = {**value, result.notable()[0][0]: result.notable()[0][1] * factor}
    else:
        value *= factor
    other = Replay(**{**vars(result), "replayed": result.replayed._replace(**{quantity: value})})
    assert other.verdict == verdict


def test_another_batch_is_never_a_reproduction_and_a_left_out_one_is_not_compared(
    copy: RunDirectory, prepared: Prepared
) -> None:
    name = f"step_{evidence_steps(copy)[-1]:06d}_grad_spike"
    batch = copy.anomalies / name / "batch.json"
    edit(batch, lambda content: content["rows"][2]["tokens"].reverse())
    result = again(copy, name, prepared)
    assert (result.same_batch, result.verdict) == (False, "not reproduced")
    assert "data" in result.likely_reason
    edit(batch, lambda content: [row.pop("tokens") for row in content["rows"]])
    result = again(copy, name, prepared)
    assert (result.same_batch, result.verdict) == (None, "reproduced bit for bit")


def test_other_weights_on_the_way_are_named_with_what_may_have_changed(copy: RunDirectory, prepared: Prepared) -> None:
    name = f"step_{evidence_steps(copy)[-1]:06d}_grad_spike"
    edit(copy.config, lambda config: config["training"].update(max_steps=3 * STEPS))
    edit(copy.anomalies / name / "event.json", lambda event: event.update(device="cuda:7", codes_sha256="0" * 64))
    reason = again(copy, name, prepared).likely_reason
    assert "another length since" in reason
    assert "device 'cuda:7' instead of 'cpu'" in reason


def test_other_data_are_refused_from_a_checkpoint_and_from_initial_weights(edgy: RunDirectory, tmp_path: Path) -> None:
    other = tiny_corpus(tmp_path, train=TRAIN[:19])
    for step in (evidence_steps(edgy)[0], evidence_steps(edgy)[-1]):
        with pytest.raises(DataError, match="are not what run 'run' was trained on"):
            again(edgy, f"step_{step:06d}_grad_spike", other)


def test_evidence_that_is_damaged_or_lies_beyond_the_end_is_one_sentence(
    copy: RunDirectory, prepared: Prepared
) -> None:
    name = f"step_{evidence_steps(copy)[-1]:06d}_grad_spike"
    edit(copy.config, lambda config: config["training"].update(max_steps=5))
    with pytest.raises(EnvironmentFault, match="has 5 steps"):
        again(copy, name, prepared)
    edit(copy.anomalies / name / "event.json", lambda event: event.update(step=-1))
    with pytest.raises(CheckpointError, match="leads to step -1"):
        again(copy, name, prepared)
    (copy.anomalies / name / "layers.json").unlink()
    with pytest.raises(EnvironmentFault, match="no complete evidence"):
        again(copy, name, prepared)


@pytest.fixture
def streamed(tmp_path: Path) -> Iterator[tuple[RunDirectory, launch.Prepare]]:
    """A run on data that are read while it trains."""
    data = stream_settings(write_dataset(tmp_path / "data", some_files(), kind="jsonl"))
    run, values = RunDirectory(tmp_path / "run"), settings_of(tmp_path / "run", EDGY).model_dump(mode="json")
    values["data"] = data.model_dump(mode="json")

    def prepare(settings: RunSettings, folder: Path) -> Prepared:
        return prepare_data(settings.data, settings.tokenizer, folder=folder)

    launch.start(Resolved(values, {}), run, prepare, quiet=True)
    return run, prepare


def test_a_streamed_run_is_replayed_from_its_blocks_unless_somebody_reads_them(
    streamed: tuple[RunDirectory, launch.Prepare],
) -> None:
    run, prepare = streamed
    name, before = f"step_{evidence_steps(run)[0]:06d}_grad_spike", tree(run)
    result = replay(run.anomalies / name, prepare, str)
    assert (result.verdict, result.same_batch) == ("reproduced bit for bit", True)
    stream = str(run.stream)
    after = tree(run)
    assert {path: file for path, file in after.items() if stream not in path} == {
        path: file for path, file in before.items() if stream not in path
    }
    settings = launch.settings_from(Resolved(json.loads(run.config.read_text()), {}))
    reader = prepare(settings, run.stream)
    try:
        with pytest.raises(DataError, match="being read by another process"):
            replay(run.anomalies / name, prepare, str)
    finally:
        reader.corpus.close()
    shutil.rmtree(run.stream)
    with pytest.raises(DataError, match="is gone"):
        replay(run.anomalies / name, prepare, str)
    assert not run.stream.exists()


def test_a_micro_batch_that_the_run_was_forced_to_is_used_again(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path / "run", prepared, EDGY, micro_batch_size=1)
    edit(run.config, lambda config: config["training"].update(micro_batch_size="auto"))
    rows: list[int] = []
    build = Trainer._build_model

    def counting(self: Trainer) -> Any:
        model = build(self)
        model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        return model

    monkeypatch.setattr(Trainer, "_build_model", counting)
    name = f"step_{evidence_steps(run)[0]:06d}_grad_spike"
    assert again(run, name, prepared).verdict == "reproduced bit for bit"
    assert set(rows) == {1}
