"""`load_tokenizer`: a tokenizer from a name, a folder, a file, or the hub."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ternlm.errors import TokenizerError
from ternlm.tokenizers.byte import ByteTokenizer, byte_characters
from ternlm.tokenizers.files import SPECIAL_NAMES, read_bytes, read_json
from ternlm.tokenizers.interface import Tokenizer, library_errors
from ternlm.tokenizers.library import LibraryTokenizer, require_small_ids, require_sound_map
from ternlm.tokenizers.sentencepiece import build_sentencepiece

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: ``byte``; a folder that `save` or Hugging Face wrote; a ``tokenizer.json``; a SentencePiece
            ``tokenizer.model``; BERT's ``vocab.txt``; GPT-2's folder of ``vocab.json`` and ``merges.txt``;
            else a name on the hub, whose tokenizer files are downloaded.

    Raises:
        TokenizerError: Nothing is there, it cannot be fetched, or it is damaged.
    """
    if str(source) == "byte":
        return ByteTokenizer()
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if path.is_file():
        return _from_file(path, path.resolve().parent.name)
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise TokenizerError(
            f"there is no tokenizer at '{source}'. Give 'byte', an existing file or folder, or a hub name."
        )
    return _from_folder(_download(source), source.rpartition("/")[2])


def _from_folder(folder: Path, name: str) -> Tokenizer:
    ours = _settings(folder).get("ternlm")
    if isinstance(ours, dict):
        return _saved(folder, ours)
    if (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        return _from_gpt2_files(folder, name)
    for file in ("tokenizer.json", "tokenizer.model", "vocab.txt"):
        if (folder / file).is_file():
            return _from_file(folder / file, name)
    raise TokenizerError(f"the folder '{folder}' holds no tokenizer. Expected one of: {', '.join(_FILES)}.")


def _saved(folder: Path, ours: dict[str, Any]) -> Tokenizer:
    name = str(ours.get("name", folder.name))
    if ours.get("kind") == "byte":
        loaded: Tokenizer = ByteTokenizer()
    else:
        loaded = _from_json(folder / "tokenizer.json", name, _special_tokens(folder))
        if isinstance(loaded, LibraryTokenizer) and (folder / "tokenizer.model").is_file():
            loaded.model_file = read_bytes(folder / "tokenizer.model")
    if loaded.fingerprint != ours.get("fingerprint"):
        raise TokenizerError(
            f"the tokenizer in '{folder}' has fingerprint {loaded.fingerprint[:12]}, it was saved as "
            f"{str(ours.get('fingerprint'))[:12]}: its files were changed. Restore them from the original."
        )
    return loaded


def _from_file(path: Path, name: str) -> Tokenizer:
    if path.suffix == ".json" and path.name not in ("vocab.json", "tokenizer_config.json"):
        return _from_json(path, name, _special_tokens(path.parent))
    if path.suffix == ".model":
        return build_sentencepiece(read_bytes(path), name)
    if path.suffix == ".txt" and path.name != "merges.txt":
        return _from_wordpiece(path, name)
    if path.name in ("vocab.json", "merges.txt"):
        return _from_gpt2_files(path.parent, name)
    raise TokenizerError(f"'{path}' is not a tokenizer file that is known here. Expected one of: {', '.join(_FILES)}.")


def _from_json(path: Path, name: str, special_tokens: dict[str, str | None]) -> Tokenizer:
    document = read_json(path)
    with library_errors(f"reading {path}"):
        for content in _maps_in(document.get("normalizer")):
            require_sound_map(content)
        require_small_ids(token["id"] for token in document.get("added_tokens") or [])
        vocabulary = document["model"]["vocab"]
        require_small_ids(vocabulary.values() if isinstance(vocabulary, dict) else ())
        inner = tokenizers.Tokenizer.from_str(json.dumps(document))
    return LibraryTokenizer(inner, name, special_tokens)


def _maps_in(normalizer: Any) -> Iterator[bytes]:
    """Compiled normalizations, however deep in a sequence of normalizers."""
    if isinstance(normalizer, dict):
        if "precompiled_charsmap" in normalizer:
            yield base64.b64decode(normalizer["precompiled_charsmap"] or "")
        for inner in normalizer.get("normalizers") or []:
            yield from _maps_in(inner)


def _from_gpt2_files(folder: Path, name: str) -> Tokenizer:
    vocabulary = read_json(folder / "vocab.json")
    merges = _lines(folder / "merges.txt")
    pairs = [line.partition(" ")[::2] for line in merges if line and not line.startswith("#version")]
    if not vocabulary.keys() >= set(byte_characters()) or not all(left and right for left, right in pairs):
        raise TokenizerError(
            f"'{folder}' is not a byte-level BPE like GPT-2's: bytes are missing from vocab.json or a line "
            "of merges.txt is not a pair. Use the model's tokenizer.json."
        )
    with library_errors(f"reading {folder}"):
        require_small_ids(vocabulary.values())
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        special = [t for t in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>") if t in vocabulary]
        inner.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return LibraryTokenizer(inner, name, _special_tokens(folder))


def _from_wordpiece(path: Path, name: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(_lines(path)) if token}
    if "[UNK]" not in vocabulary:
        raise TokenizerError(f"'{path}' has no [UNK], so it is not BERT's vocab.txt. Use another tokenizer file.")
    lower_case = _settings(path.parent).get("do_lower_case", True) is not False
    with library_errors(f"reading {path}"):
        inner = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(prefix="##")
        special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary]
        inner.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return LibraryTokenizer(inner, name, _special_tokens(path.parent))


def _special_tokens(folder: Path) -> dict[str, str | None]:
    """What the folder's settings files say about special tokens; silence about one leaves it out."""
    settings = _settings(folder)
    ours = settings.get("ternlm")
    given: dict[str, str | None] = {}
    for name in SPECIAL_NAMES:
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            given[name] = text
        elif isinstance(ours, dict):
            given[name] = None  # saved by us: silence means there is none
    return given


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in reversed(_SETTINGS_FILES):
        if (folder / file).is_file():
            found |= read_json(folder / file)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return read_bytes(path).decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"'{path}' is not UTF-8 (byte {error.start:,}). Fetch it again.") from None


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *_SETTINGS_FILES])
    except Exception as error:  # noqa: BLE001 (errors of many network and file layers come through)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerError(
            f"the tokenizer '{name}' is neither a local file nor can it be fetched from the hub: {reason}. "
            "Check the name and the connection, or give a local folder; built in is 'byte'."
        ) from None
    return Path(folder)
