"""Experiment files of another trainer of byte-level models, read as ours.

Two forms are known: sections (``model.config_file``, ``data``, ``training``, ``evaluation``, ``output``, ``hardware``),
and one flat list of training settings with ``output_dir``. Where a key means something else here, its value is
converted, and where there is nothing here that it could set, it is left out; both are said in a sentence. A key that
nobody knows is an error like any other unknown setting.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ternlm.data.catalog import CORPORA
from ternlm.errors import SettingsError
from ternlm.recipes.seed import is_model_config, model_section
from ternlm.settings.resolve import read_mapping

_SECTIONS = ("model", "data", "training", "evaluation", "output", "hardware")
_FOREIGN_MODEL = {"config_file", "params", "type", "model_type"}
_OUTPUT = ("checkpoint_dir", "log_dir", "results_dir")

_TRAINING = {
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "adam_eps": "optimizer.eps",
    "max_grad_norm": "training.grad_clip",
    "max_steps": "training.max_steps",
    "warmup_steps": "schedule.warmup_steps",
    "scheduler": "schedule.name",
    "lr_scheduler": "schedule.name",
    "eval_interval": "evaluation.every_steps",
    "save_interval": "training.checkpoint_every_steps",
    "log_interval": "tracking.every_steps",
    "compile_model": "training.compile",
    "seed": "training.seed",
}
_DATA = {
    "max_seq_length": "data.sequence_length",
    "val_ratio": "data.validation_fraction",
    "test_ratio": "data.test_fraction",
    "max_samples": "data.max_documents",
    "streaming": "data.stream",
    "val_data_path": "data.validation_path",
    "cache_dir": "data.cache",
}
_EVALUATION = {
    "batch_size": "evaluation.batch_size",
    "num_generation_samples": "generation.samples",
    "generation_max_tokens": "generation.max_new_tokens",
    "generation_prompts": "generation.prompts",
}
_FLAT_DATA = {
    *_DATA, "dataset", "dataset_config", "data_path", "data_dir", "text_column", "text_columns", "separator",
    "train_split", "val_split",
}  # fmt: skip


def is_foreign(values: Mapping[str, Any]) -> bool:
    """Whether an experiment file is written in the keys of the other trainer."""
    model, training = values.get("model"), values.get("training")
    if isinstance(model, Mapping) and not _FOREIGN_MODEL.isdisjoint(model):
        return True
    if isinstance(training, Mapping) and "learning_rate" in training:
        return True
    return "output_dir" in values and not isinstance(training, Mapping)


def translate(values: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Sections of ours, and a sentence on everything that was converted or left out.

    Args:
        values: The file.
        folder: Where the file is; `model.config_file` is looked for there, above it, and in the working folder.

    Raises:
        SettingsError: A part asks for what there is not here.
    """
    return _Translation(folder).run(values if isinstance(values.get("training"), Mapping) else _sectioned(values))


def _sectioned(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat list of settings in sections."""
    general = ("experiment_name", "description", "extends", "model")
    sections: dict[str, Any] = {name: flat[name] for name in general if name in flat}
    sections["data"] = {key: value for key, value in flat.items() if key in _FLAT_DATA and value is not None}
    rest = {key: value for key, value in flat.items() if key not in {*_FLAT_DATA, *general, "output_dir"}}
    sections["training"] = {key: value for key, value in rest.items() if value is not None}
    sections["output"] = {"directory": flat["output_dir"]} if "output_dir" in flat else None
    return sections


class _Translation:
    """One file being translated: the settings so far, and the sentences."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sections: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def run(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        given = {name: _section(values, name) for name in _SECTIONS}
        if not given["model"]:
            raise SettingsError(
                "the file holds settings of training and no model. Add the file of a model with --model-config, or a "
                "section 'model'."
            )
        kept = {name: value for name, value in values.items() if name not in (*_SECTIONS, "seed")}
        self.put("tokenizer.name", "byte")
        self._model(given["model"])
        self._data(given["data"])
        self._training(dict(given["training"]))
        self._rename(given["evaluation"], _EVALUATION, "evaluation")
        output = self._output(given["output"])
        self._hardware(given["hardware"])
        if values.get("seed") is not None:
            self.put("training.seed", values["seed"])
        for name, fields in self.sections.items():
            kept[name] = {**kept[name], **fields} if isinstance(kept.get(name), Mapping) else fields
        return {**kept, **({"output": output} if output else {})}, self.notes

    def put(self, dotted: str, value: Any) -> None:
        section, _, field = dotted.partition(".")
        self.sections.setdefault(section, {})[field] = value

    def _rename(self, fields: Mapping[str, Any], known: Mapping[str, str], section: str) -> None:
        for key, value in fields.items():
            self.put(known.get(key, f"{section}.{key}"), value)

    def _model(self, model: Mapping[str, Any]) -> None:
        rest = {key: value for key, value in model.items() if key not in ("config_file", "params", "type")}
        config = _section(model, "params", "model.params")
        if model.get("config_file"):
            file = self._find(str(model["config_file"]))
            config = {**read_mapping(file), **config}
            self.notes.append(f"the model is the one of {file}")
        for key, value in {**config, **rest}.items():
            self.put(f"model.{key}", value)
        described = self.sections.get("model", {})
        if is_model_config(described):
            self.sections["model"], sentences = model_section(described)
            self.notes += sentences

    def _find(self, name: str) -> Path:
        places = [Path(name), self.folder / name, self.folder.parent / name, self.folder / Path(name).name]
        for place in places:
            if place.is_file():
                return place
        tried = ", ".join(f"'{place}'" for place in dict.fromkeys(places))
        raise SettingsError(f"model.config_file='{name}' is not found; tried {tried}. Give its path.")

    def _data(self, fields: Mapping[str, Any]) -> None:
        data = {key: value for key, value in fields.items() if value is not None}
        dataset, config = _text(data, "data", "dataset"), _text(data, "data", "dataset_config")
        places = [place for key in ("data_path", "data_dir") if (place := _text(data, "data", key)) is not None]
        source = _source(dataset, config, places[0] if places else None)
        if source is not None:
            self.put("data.source", source)
        else:
            self.notes.append("the file names no data: set data.source, or the generated stories are read")
        if dataset is not None and places:
            self.notes.append(f"data.data_dir={places[0]} is left out: prepared corpora go to data.cache")
        column, columns = data.pop("text_column", "auto"), data.pop("text_columns", None)
        if not isinstance(columns, list | None):
            raise SettingsError(f"setting data.text_columns={columns!r} is refused: it must be a list with one name.")
        if columns is not None and len(columns) > 1:
            raise SettingsError(
                f"data.text_columns={columns} joins several columns; one is read here. Name it with data.text_column, "
                "or write the joined text into files first."
            )
        column = columns[0] if columns else column
        if column != "auto":
            self.put("data.text_column", column)
        if data.pop("train_split", "train") != "train":
            raise SettingsError("data.train_split must be 'train'. Give the files themselves as data.source instead.")
        for key in ("val_split", "separator"):
            if key in data:
                self.notes.append(f"data.{key}={data.pop(key)!r} is left out: there is nothing here that it would set")
        own = CORPORA[source].splits if source in CORPORA else ()
        for key, split in (("val_ratio", "validation"), ("test_ratio", "test")):
            if key in data and split in own:
                self.notes.append(f"data.{key}={data[key]} has no effect: '{source}' has a {split} split of its own")
        self._rename(data, _DATA, "data")

    def _training(self, fields: dict[str, Any]) -> None:
        batch = _count(fields, "training", "batch_size")
        parts = _count(fields, "training", "gradient_accumulation_steps") or 1
        if batch is not None:
            self.put("training.batch_size", batch * parts)
            self.put("training.micro_batch_size", batch)
            if parts > 1:
                self.notes.append(f"{batch} sequences x {parts} passes: training.batch_size={batch * parts} per step")
        stated = fields.pop("effective_batch_size", None)
        if stated is not None and batch is not None and stated != batch * parts:
            self.notes.append(f"training.effective_batch_size={stated} is left out: it is {batch * parts}")
        self._precision(fields)
        self._hierarchy(fields)
        if "adam_beta1" in fields or "adam_beta2" in fields:
            self.put("optimizer.betas", [fields.pop("adam_beta1", 0.9), fields.pop("adam_beta2", 0.95)])
        if fields.pop("resume_from", None):
            raise SettingsError(
                "training.resume_from is not for experiment files: the same command goes on where it was stopped. "
                "Leave it out, or start from a checkpoint with 'ternlm train --resume-from'."
            )
        if fields.pop("use_packed_sequences", None) is not None:
            self.notes.append("training.use_packed_sequences is left out: documents always share windows here")
        data = {key: fields.pop(key) for key in tuple(fields) if key in _DATA}
        self._rename(data, _DATA, "data")
        if {"scheduler", "lr_scheduler"} & fields.keys():
            self.put("schedule.min_lr_ratio", 0.0)
            self.put("schedule.weight_decay_until", 1.0)
            self.notes.append(
                "the learning rate falls to 0 and weight decay lasts to the end, as the schedule did there"
            )
        self._rename(fields, _TRAINING, "training")

    def _precision(self, fields: dict[str, Any]) -> None:
        """Half precision was only ever used on GPUs there, which is what `auto` does."""
        named = fields.pop("mixed_precision", None)
        flags = {name: fields.pop(name, None) for name in ("bf16", "fp16")}
        if named is None and not any(value is not None for value in flags.values()):
            return
        wanted = named if named is not None else next((name for name, on in flags.items() if on), "none")
        if wanted in ("bf16", "fp16"):
            self.notes.append(f"mixed precision {wanted} becomes training.precision=auto, which knows the device")
        self.put("training.precision", "auto" if wanted in ("bf16", "fp16") else "fp32")

    def _hierarchy(self, fields: dict[str, Any]) -> None:
        """What only the model with chunks has; its settings are of the model here."""
        is_hnet = self.sections.get("model", {}).get("family") == "hnet"
        weight = fields.pop("lambda_lb", None)
        for key, field, value in (
            ("lr_multipliers", "lr_multipliers", fields.pop("lr_multipliers", None)),
            ("lambda_lb", "ratio_loss_weight", weight),
            ("downsampling_factor", "chunk_targets", fields.pop("downsampling_factor", None)),
        ):
            if value is None:
                continue
            if is_hnet:
                self.put(f"model.{field}", value)
            else:
                self.notes.append(f"training.{key}={value} is left out: this model has no chunks")
        if is_hnet and weight == 0:
            self.notes.append("training.lambda_lb=0 leaves the length of chunks to itself; a weight of 0.03 holds it")

    def _output(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        left = {key: fields[key] for key in _OUTPUT if fields.get(key)}
        if left:
            self.notes.append(
                f"output.{', '.join(left)}: all of an experiment is in one folder here; output.directory names it"
            )
        return {key: value for key, value in fields.items() if key not in _OUTPUT}

    def _hardware(self, fields: Mapping[str, Any]) -> None:
        rules: dict[str, Callable[[Any], None]] = {
            "device": self._device,
            "num_workers": lambda value: self.notes.append("hardware.num_workers is left out: loading needs none"),
        }
        for key, value in fields.items():
            if key not in rules:
                raise SettingsError(f"unknown setting 'hardware.{key}'. Known here: {', '.join(rules)}.")
            rules[key](value)

    def _device(self, value: Any) -> None:
        if value == "cuda":
            self.notes.append("hardware.device=cuda becomes training.device=auto, which takes a GPU where there is one")
        self.put("training.device", "auto" if value == "cuda" else value)


def _section(values: Mapping[str, Any], name: str, shown: str | None = None) -> Mapping[str, Any]:
    fields = values.get(name) or {}
    if not isinstance(fields, Mapping):
        raise SettingsError(f"section '{shown or name}' must hold settings, not a {type(fields).__name__}.")
    return fields


def _count(fields: dict[str, Any], section: str, key: str) -> int | None:
    """A number taken out of a section."""
    value = fields.pop(key, None)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise SettingsError(f"setting {section}.{key}={value!r} is refused: it must be a whole number above 0.")
    return value


def _text(fields: dict[str, Any], section: str, key: str) -> str | None:
    """A text taken out of a section."""
    value = fields.pop(key, None)
    if value is not None and not isinstance(value, str):
        raise SettingsError(f"setting {section}.{key}={value!r} is refused: it must be a text.")
    return value


def _source(dataset: str | None, config: str | None, place: str | None) -> str | None:
    """A corpus by its name here, a dataset of the hub, or files."""
    if dataset is None:
        known = None if place is None else Path(place).name.lower()
        return known if known in CORPORA and not Path(str(place)).exists() else place
    for name, entry in CORPORA.items():
        if dataset.lower() == name or (dataset == entry.hub and config in (None, entry.config)):
            return name
    if "/" not in dataset or Path(dataset).exists():
        return dataset
    return f"hf:{dataset}" + (f":{config}" if config else "")
