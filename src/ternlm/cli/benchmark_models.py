"""The words of `ternlm benchmark`: recipes, runs, references and Hugging Face models as candidates."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ternlm.errors import CheckpointError, EnvironmentFault, SettingsError

if TYPE_CHECKING:
    from ternlm.benchmark.candidate import Candidate
    from ternlm.benchmark.suite import Options


def candidate_of(word: str, runs_dir: str | None, random_weights: bool) -> "Candidate":
    """The model that a word names.

    Raises:
        SettingsError, CheckpointError, EnvironmentFault: It names none, or one that cannot be had.
    """
    from ternlm.benchmark.reference import REFERENCES
    from ternlm.files import from_json
    from ternlm.recipes import recipe_names

    name, _, variant = word.partition(":")
    is_file = Path(name).suffix in (".yaml", ".yml", ".json") and Path(name).is_file()
    if is_file or name in recipe_names():
        if variant not in ("", "full"):
            raise SettingsError(f"'{word}': there is no variant '{variant}'. Use {name} or {name}:full.")
        return _from_recipe(name, variant == "full")
    if word in REFERENCES:
        return _from_reference(word, random_weights)
    config = Path(word) / "config.json"
    if config.is_file() and "model_type" in from_json(config.read_bytes()):
        return _from_hugging_face(word, Path(word))
    return _from_run_or_hub(word, runs_dir, random_weights)


def _from_recipe(name: str, is_full: bool) -> "Candidate":
    from ternlm.benchmark.candidate import Candidate
    from ternlm.cli.options import resolve_recipe
    from ternlm.cli.plan import with_prepared
    from ternlm.training.launch import settings_from

    flags = {"quantization.weights": "none", "quantization.activations": "none"} if is_full else {}
    settings, windows = with_prepared(settings_from(resolve_recipe(name, flags, None)))
    return Candidate(
        name=f"{Path(name).stem}{':full' if is_full else ''}",
        kind="own",
        model=settings.model.model_dump(mode="json"),
        quantization=settings.quantization.model_dump(mode="json"),
        tokenizer=settings.tokenizer.name if settings.tokenizer.name != "train" else "",
        epoch_tokens=None if windows is None else windows * settings.data.sequence_length,
    )


def _from_reference(name: str, random_weights: bool) -> "Candidate":
    from ternlm.benchmark.candidate import Candidate
    from ternlm.benchmark.reference import REFERENCES, fetch

    reference, reason = REFERENCES[name], ""
    for with_weights in (True, False) if not random_weights else (False,):
        try:
            return _from_hugging_face(name, fetch(reference.hub, with_weights))
        except EnvironmentFault as error:
            reason = str(error)
    notes = (
        "random weights: speed and memory only.",
        f"its shape is that of {reference.source}." + (f" {reason}" if reason else ""),
    )
    return Candidate(name, "hugging_face", model=reference.config, notes=notes)


def _from_hugging_face(name: str, folder: Path) -> "Candidate":
    from ternlm.benchmark.candidate import Candidate
    from ternlm.benchmark.foreign import read_config

    config = read_config(folder)
    has_weights = any(folder.glob("*.safetensors"))
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()
    return Candidate(
        name=name if "/" not in name else name.rstrip("/").rpartition("/")[2],
        kind="hugging_face",
        model={"model_type": config.model_type, "max_position_embeddings": config.max_position_embeddings},
        folder=str(folder),
        has_weights=has_weights,
        tokenizer=str(folder) if has_tokenizer else "",
        notes=() if has_weights else ("random weights: speed and memory only.",),
    )


def _from_run_or_hub(word: str, runs_dir: str | None, random_weights: bool) -> "Candidate":
    from ternlm import checkpoint
    from ternlm.benchmark.candidate import Candidate
    from ternlm.benchmark.reference import fetch
    from ternlm.run_directory import runs_root

    try:
        path = checkpoint.resolve(word, runs_root(runs_dir))
    except CheckpointError as error:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", word):
            raise CheckpointError(
                f"{error} '{word}' is no recipe ('ternlm recipes'), reference model or Hugging Face folder either."
            ) from None
        return _from_hugging_face(word, fetch(word, not random_weights))
    loaded = checkpoint.load(path)
    tokens = None
    splits = path.parent.parent / "meta" / "dataset_fingerprint.json"
    if splits.is_file():
        from ternlm.files import from_json

        tokens = from_json(splits.read_bytes()).get("splits", {}).get("train", {}).get("tokens")
    return Candidate(
        name=word,
        kind="checkpoint",
        model=loaded.config["model"],
        quantization=loaded.config["quantization"],
        folder=str(path),
        tokenizer=str(path),
        epoch_tokens=tokens,
    )


def with_data(candidates: "list[Candidate]", data: str, options: "Options") -> "tuple[list[Candidate], dict[str, Any]]":
    """Tokens of the text for each model whose tokenizer is here, and the length of its epochs."""
    from dataclasses import replace

    import numpy as np
    import torch

    from ternlm.cli.options import prepare_with_bar
    from ternlm.data.settings import DataSettings
    from ternlm.tokenizers import TokenizerSettings

    needed = max(options.work.rows * (options.work.length + 1), options.rows * options.prompt_length)
    tokens, made = {}, []
    for each in candidates:
        if not each.tokenizer:
            made.append(each)
            continue
        prepared = prepare_with_bar(DataSettings(source=data), TokenizerSettings(name=each.tokenizer))
        stream: Any = prepared.corpus.split("train")
        tokens[each.name] = torch.from_numpy(stream.read(0, min(needed, len(stream))).astype(np.int64))
        made.append(replace(each, epoch_tokens=len(stream)))
    return made, tokens


def most_tokens(candidate: "Candidate") -> int | None:
    """Longest text that a model takes; None where that is unlimited."""
    from ternlm.models import MODELS

    family = candidate.model.get("family")
    if family is not None and MODELS[family].model.is_recurrent:
        return None
    return int(candidate.model["max_position_embeddings"])
