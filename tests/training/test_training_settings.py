"""Every setting of a run: it is validated, it reaches the resolved settings, and something in the package reads it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ternlm
from ternlm.errors import SettingsError
from ternlm.models import MODELS
from ternlm.settings.resolve import Layer, parse_overrides, resolve
from ternlm.training.launch import settings_from
from ternlm.training.settings import ALIASES, SECTION_ALIASES, RunSettings, resolve_settings, setting_names

CHANGED: dict[str, tuple[str, str]] = {
    # name: (another valid value, a value that must be refused), as written on the command line
    "model.family": ("bitnet", "bitnett"),
    "model.vocab_size": ("300", "0"),
    "model.max_position_embeddings": ("2k", "0"),
    "model.hidden_size": ("384", "100"),
    "model.num_hidden_layers": ("3", "0"),
    "model.num_attention_heads": ("6", "7"),
    "model.num_key_value_heads": ("4", "5"),
    "model.intermediate_size": ("1e3", "-1"),
    "model.hidden_act": ("relu2", "gelu"),
    "model.norm_layout": ("prenorm", "post"),
    "model.rope_theta": ("5e5", "0"),
    "model.rms_norm_eps": ("1e-6", "0"),
    "model.tie_word_embeddings": ("false", "2"),
    "model.initializer_range": ("0.01", "-1"),
    "model.embedding_init_std": ("0.01", ".nan"),
    "data.source": ("stdlib", "''"),
    "data.validation_path": ("held.txt", "[1]"),
    "data.test_path": ("test.txt", "[1]"),
    "data.text_column": ("body", "''"),
    "data.validation_fraction": ("10%", "1"),
    "data.test_fraction": ("0.2", "-0.1"),
    "data.max_documents": ("5k", "0"),
    "data.max_tokens": ("2B", "0"),
    "data.sequence_length": ("128", "0"),
    "data.encoding_errors": ("replace", "ignore"),
    "data.wikitext": ("joined", "words"),
    "data.revision": ("main", "[1]"),
    "data.retry_for": ("2h", "-1"),
    "data.stream": ("true", "perhaps"),
    "data.stream_buffer": ("1GiB", "0"),
    "data.stream_validation_tokens": ("10k", "0"),
    "data.cache": ("/tmp/x", "[1]"),
    "tokenizer.name": ("train", "''"),
    "tokenizer.vocab_size": ("8k", "258"),
    "tokenizer.mask_token": ("true", "x"),
    "objective.name": ("causal", "masked"),
    "objective.z_loss": ("1e-4", "-1"),
    "objective.mask_fraction": ("20%", "0"),
    "objective.mask_share": ("0.5", "1.1"),
    "objective.random_share": ("0.2", "-0.1"),
    "objective.whole_word": ("true", "x"),
    "optimizer.name": ("muon", "sgd"),
    "optimizer.learning_rate": ("3e-4", "0"),
    "optimizer.weight_decay": ("0", "-1"),
    "optimizer.betas": ("[0.9, 0.99]", "[0.9, 1]"),
    "optimizer.momentum": ("0.9", "1"),
    "optimizer.eps": ("1e-6", "0"),
    "optimizer.embedding_lr_ratio": ("0.5", "0"),
    "optimizer.other_lr_ratio": ("0.5", "0"),
    "optimizer.quantizer_lr_ratio": ("0.2", "0"),
    "schedule.name": ("wsd", "poly"),
    "schedule.warmup_steps": ("375", "-1"),
    "schedule.warmup_fraction": ("5%", "2"),
    "schedule.min_lr_ratio": ("10%", "-1"),
    "schedule.second_peak_ratio": ("0.5", "-1"),
    "schedule.decay_fraction": ("0.3", "1.1"),
    "schedule.stage_boundary": ("0.4", "1.1"),
    "schedule.weight_decay_until": ("1", "-1"),
    "quantization.weights": ("none", "binary"),
    "quantization.activations": ("int4", "int2"),
    "quantization.granularity": ("row", "channel"),
    "quantization.group_size": ("64", "0"),
    "quantization.quantizer": ("twn", "median"),
    "quantization.ste": ("identity", "tanh"),
    "quantization.ttq_percentile": ("25", "100"),
    "quantization.lsq_grad_clip": ("0.8", "0"),
    "quantization.least_bits": ("8", "9"),
    "quantization.full_precision_until": ("25%", "-1"),
    "quantization.progressive": ("true", "x"),
    "quantization.int8_until": ("5%", "1.1"),
    "quantization.partial_until": ("0.4", "-0.1"),
    "quantization.lr_factor": ("0.5", "0"),
    "quantization.lr_ramp_steps": ("0", "-1"),
    "quantization.blend_steps": ("50", "-1"),
    "quantization.qdrop": ("0.1", "1.1"),
    "quantization.qdrop_until": ("0.2", "-1"),
    "quantization.qdrop_steps": ("30k", "0"),
    "quantization.qdrop_by": ("element", "row"),
    "quantization.dither": ("0.5", "-1"),
    "quantization.dither_steps": ("100", "0"),
    "quantization.ternary_dropout": ("0.05", "1"),
    "quantization.ternary_dropout_steps": ("2k", "0"),
    "training.max_steps": ("2k", "0"),
    "training.max_tokens": ("300M", "0"),
    "training.max_epochs": ("1.5", "0"),
    "training.max_time": ("2h30m", "0"),
    "training.batch_size": ("8", "0"),
    "training.micro_batch_size": ("4", "0"),
    "training.gradient_accumulation_steps": ("2", "0"),
    "training.grad_clip": ("0", "-1"),
    "training.precision": ("bf16", "int8"),
    "training.device": ("cpu", "[1]"),
    "training.threads": ("2", "0"),
    "training.compile": ("true", "perhaps"),
    "training.gradient_checkpointing": ("true", "3"),
    "training.deterministic": ("true", "x"),
    "training.seed": ("7", "-1"),
    "training.checkpoint_every_steps": ("10", "0"),
    "training.keep_last": ("5", "1"),
    "training.keep_every": ("1k", "0"),
    "tracking.every_steps": ("1", "0"),
    "tracking.ternary_every_steps": ("7", "0"),
    "tracking.system_every_seconds": ("1m", "0"),
    "tracking.wandb": ("offline", "on"),
    "tracking.wandb_project": ("mine", "[1]"),
    "tracking.wandb_name": ("mine", "[1]"),
    "tracking.wandb_tags": ("[a, b]", "3"),
    "tracking.wandb_notes": ("note", "[1]"),
    "tracking.csv": ("false", "x"),
    "tracking.tensorboard": ("false", "x"),
    "tracking.report": ("false", "x"),
    "evaluation.every_steps": ("10", "0"),
    "evaluation.max_tokens": ("none", "0"),
    "evaluation.batch_size": ("3", "0"),
    "evaluation.sample_every_steps": ("10", "0"),
    "evaluation.prompts": ("['a', 'b']", "3"),
    "evaluation.sample_tokens": ("7", "0"),
    "evaluation.sample_modes": ("[greedy]", "[]"),
    "anomaly.window": ("200", "7"),
    "anomaly.min_values": ("100", "7"),
    "anomaly.spike_scale": ("8", "0"),
    "anomaly.spike_ratio": ("3", "1"),
    "anomaly.ema": ("0.9", "1"),
    "anomaly.grad_spike": ("keep", "clip"),
    "anomaly.divergence_nats": ("1", "0"),
    "anomaly.divergence_steps": ("20", "0"),
    "anomaly.non_finite_in_a_row": ("5", "0"),
    "anomaly.non_finite_in_1000": ("20", "0"),
    "anomaly.action": ("stop", "wait"),
    "anomaly.max_roll_backs": ("0", "-1"),
    "anomaly.roll_back_steps": ("50", "0"),
    "anomaly.skip_batches": ("0", "-1"),
    "anomaly.grace_steps": ("0", "-1"),
    "anomaly.cooldown_steps": ("10", "0"),
    "anomaly.max_dumps": ("0", "-1"),
    "anomaly.slow_for": ("1m", "0"),
    "distillation.teacher": ("fp-run@best", "[1]"),
    "distillation.teacher_quantized": ("true", "perhaps"),
    "distillation.temperature": ("3", "0"),
    "distillation.weight": ("0.3", "-1"),
    "distillation.ramp_steps": ("0", "-1"),
    "distillation.ramp_fraction": ("20%", "1.1"),
}
ONE_VALUE = {"model.family", "objective.name", "quantization.ste"}  # or one that stands alone


def resolved(*assignments: str) -> RunSettings:
    layers = [Layer("base", {"training.max_steps": 100}), Layer("command line", parse_overrides(assignments))]
    return settings_from(resolve(layers, setting_names()))


def names() -> Iterator[str]:
    for section, fields in setting_names().sections.items():
        yield from (f"{section}.{field}" for field in fields)


def test_t12_the_table_of_this_file_holds_every_setting_that_exists() -> None:
    bitnet = set(MODELS["bitnet"].settings.model_fields)
    existing = {name for name in names() if not name.startswith("model.") or name[6:] in bitnet}
    assert set(CHANGED) == existing


@pytest.mark.parametrize("name", CHANGED)
def test_t12_changing_a_setting_changes_that_setting_and_no_other(name: str) -> None:
    default, changed = resolved().model_dump(), resolved(f"{name}={CHANGED[name][0]}").model_dump()
    differing = {f"{s}.{f}" for s, fields in default.items() for f in fields if fields[f] != changed[s][f]}
    assert differing == (set() if name in ONE_VALUE else {name})


@pytest.mark.parametrize("name", CHANGED)
def test_t12_a_bad_value_is_refused_in_one_sentence_that_names_the_setting(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolved(f"{name}={CHANGED[name][1]}")
    field = name.partition(".")[2]
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", ["[1, 2]", "{a: 1}", "[]", ".inf", "1e400", "''"])
@pytest.mark.parametrize("name", CHANGED)
def test_nonsense_is_accepted_or_refused_but_never_an_unexpected_error(name: str, value: str) -> None:
    try:
        resolved(f"{name}={value}")
    except SettingsError:
        return


def test_t12_no_setting_is_accepted_and_ignored() -> None:
    root = Path(ternlm.__file__).parent
    read = {
        node.attr
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    raw = {"model.published"}  # read before the values are validated
    unread = {name for name in names() if name not in ONE_VALUE | raw and name.partition(".")[2] not in read}
    assert not unread


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_leads_to_a_setting_that_exists_and_hides_none(alias: str) -> None:
    known = set(names())
    assert ALIASES[alias] in known
    assert setting_names().canonical(alias) == ALIASES[alias]
    assert setting_names().canonical(alias.replace("_", "-")) == ALIASES[alias]


@pytest.mark.parametrize("alias", SECTION_ALIASES)
def test_every_short_section_name_leads_to_a_section(alias: str) -> None:
    section = SECTION_ALIASES[alias]
    field = min(setting_names().sections[section])
    assert setting_names().canonical(f"{alias}.{field}") == f"{section}.{field}"


@pytest.mark.parametrize("name", [*names()])
def test_every_setting_is_reached_by_its_full_name_and_by_a_bare_one_if_that_is_clear(name: str) -> None:
    canonical = setting_names().canonical
    assert canonical(name) == name
    field = name.partition(".")[2]
    owners = [other for other in names() if other.partition(".")[2] == field]
    if len(owners) == 1 and field not in ALIASES:
        assert canonical(field) == name
    elif len(owners) > 1:
        with pytest.raises(SettingsError, match="several sections"):
            canonical(field)


def test_numbers_mean_the_same_from_every_source() -> None:
    written = resolved("max_steps=1e3", "data.max_tokens=2B", "lr=3e-4", "max_time=2h30m", "min_lr_ratio=10%")
    assert (written.training.max_steps, written.data.max_tokens) == (1000, 2_000_000_000)
    assert (written.optimizer.learning_rate, written.training.max_time) == (3e-4, 9000)
    assert written.schedule.min_lr_ratio == 0.1
    assert type(written.training.max_steps) is int


def test_t16_float16_with_squared_relu_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"relu2 overflows.*Use bf16"):
        resolved("precision=fp16", "hidden_act=relu2")
    assert resolved("precision=bf16", "hidden_act=relu2").training.precision == "bf16"
    assert resolved("precision=fp16", "hidden_act=silu").training.precision == "fp16"


def test_a_window_longer_than_the_model_accepts_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"sequence_length=2000.*max_position_embeddings=1024"):
        resolved("sequence_length=2000")


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(SettingsError, match="no end"):
        resolved("max_steps=none")


def test_splitting_the_batch_in_two_ways_at_once_is_refused() -> None:
    with pytest.raises(SettingsError, match="give one"):
        resolved("micro_batch_size=2", "gradient_accumulation_steps=2")


@pytest.mark.parametrize(
    ("assignments", "size"),
    [
        ([], 16),
        (["micro_batch_size=5"], 5),
        (["micro_batch_size=50"], 16),
        (["gradient_accumulation_steps=3"], 6),
        (["gradient_accumulation_steps=16"], 1),
        (["gradient_accumulation_steps=99"], 1),
    ],
)
def test_the_first_micro_batch_size(assignments: list[str], size: int) -> None:
    assert resolved(*assignments).training.first_micro_batch_size() == size


def test_the_smallest_limit_ends_the_run() -> None:
    many = resolved("max_steps=100", "training.max_tokens=40960", "max_epochs=2")  # 4,096 tokens per step
    assert many.total_steps(windows_per_epoch=1000) == 10
    assert many.total_steps(windows_per_epoch=16) == 2
    assert resolved("max_steps=7").total_steps() == 7
    assert resolved("training.max_tokens=1", "max_steps=none").total_steps() == 1
    with pytest.raises(SettingsError, match="prepared data"):
        resolved("max_epochs=1", "max_steps=none").total_steps()


def test_settings_survive_being_written_and_read(tmp_path: Path) -> None:
    settings = resolved("betas=[0.8, 0.9]", "prompts=['x', 'é']", "max_time=90", "micro_batch_size=3")
    again: Any = RunSettings.from_mapping(settings.model_dump(mode="json"))
    assert again == settings


@pytest.mark.parametrize("choice", [{"model": {"family": "hnet"}}, {"model.family": "hnet"}, {"family": "hnet"}])
def test_a_name_that_is_an_alias_elsewhere_is_a_setting_of_the_family_that_has_it(choice: dict[str, object]) -> None:
    base = Layer("recipe", {"training.max_steps": 3})
    shape = {"d_model": [16, 24], "model.num_blocks": [[1, 0, 1], [2]]}
    settings = settings_from(resolve_settings([base, Layer("file", choice), Layer("command line", shape)]))
    assert settings.model.model_dump()["d_model"] == (16, 24)
    assert settings.model.total_blocks == 4
    other = settings_from(resolve_settings([base, Layer("command line", {"d_model": 384})]))
    assert other.model.model_dump()["hidden_size"] == 384


def test_settings_of_another_family_are_unknown_and_the_hint_is_from_the_chosen_one() -> None:
    layers = [Layer("recipe", {"model": {"family": "hgrn"}}), Layer("command line", {"model.hidden_siz": 3})]
    with pytest.raises(SettingsError, match=r"Did you mean 'model\.hidden_size'"):
        resolve_settings(layers)
    with pytest.raises(SettingsError, match=r"unknown setting 'model\.d_modell'"):
        resolve_settings([layers[0], Layer("command line", {"model.d_modell": 3})])
    with pytest.raises(SettingsError, match=r"unknown setting 'model\.chunk_targets'"):
        resolve_settings([layers[0], Layer("command line", {"model.chunk_targets": 3})])
