"""The files a tokenizer leaves in a folder: `tokenizer.json` and `tokenizer_config.json`.

Both are Hugging Face's, so a saved folder opens with other programs too; the block ``"ternlm"`` in the
second file says what this package needs to build the same tokenizer again.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ternlm.errors import TokenizerError
from ternlm.files import from_json, read_regular, replace_durably

if TYPE_CHECKING:
    from ternlm.tokenizers.interface import Tokenizer

SPECIAL_NAMES = ("bos", "eos", "pad", "unk", "mask")
LARGEST_FILE = 512 * 2**20


def write_files(tokenizer: "Tokenizer", directory: Path, kind: str) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, each replaced atomically.

    Raises:
        TokenizerError: The folder cannot be written.
    """
    document = json.loads(tokenizer.to_json())
    names = {index: token for token, index in _vocabulary(document).items()}
    ids = {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_NAMES}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": names.get(index) for name, index in ids.items() if index is not None},
        "ternlm": {"kind": kind, "name": tokenizer.name, "fingerprint": tokenizer.fingerprint, **ids},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_durably(directory / "tokenizer.json", tokenizer.to_json().encode())
        replace_durably(directory / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    except OSError as error:
        raise TokenizerError(
            f"the tokenizer cannot be written to {directory}: {error.strerror}. Choose a writable folder."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        TokenizerError: The file is missing, too large, not JSON, or not an object.
    """
    try:
        value = from_json(read_bytes(path))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}). Fetch the tokenizer's files again.") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object. Fetch the file again.")
    return value


def read_bytes(path: Path) -> bytes:
    """The content of a tokenizer file, refused above 512 MiB.

    Raises:
        TokenizerError: The file is missing, unreadable, too large, or no ordinary file.
    """
    try:
        return read_regular(path.resolve(), LARGEST_FILE)  # the hub's cache is made of links
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(f"{path} cannot be read: {reason}. Check that it is a tokenizer file.") from None


def _vocabulary(document: dict[str, Any]) -> dict[str, int]:
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in document.get("added_tokens", [])}}
