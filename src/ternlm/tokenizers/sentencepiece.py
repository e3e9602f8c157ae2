"""SentencePiece's `tokenizer.model`, read without the sentencepiece package.

The file is a protobuf message; the few fields that decide the ids are read here and turned into a BPE or
Unigram tokenizer of the `tokenizers` library that gives the same ids.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ternlm.errors import TokenizerError
from ternlm.tokenizers.interface import library_errors
from ternlm.tokenizers.library import LibraryTokenizer, require_sound_map

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"


@dataclass
class SentencePieceModel:
    """What a `tokenizer.model` says; field numbers are those of `sentencepiece_model.proto`.

    Attributes:
        pieces: (text, score, type) by id.
        model_type: 1 Unigram, 2 BPE, 3 word, 4 character.
        byte_fallback: Unknown characters become byte pieces ``<0xNN>``.
        character_map: Compiled normalization, empty for none.
        add_dummy_prefix: A space is put before the text.
        remove_extra_whitespaces: Outer spaces are dropped and inner runs shortened.
        space_is_suffix: "▁" ends words instead of starting them.
        special: Texts of bos, eos, pad and unk.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    character_map: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    space_is_suffix: bool = False
    special: dict[str, str] = field(
        default_factory=lambda: {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    )


def read_sentencepiece(content: bytes) -> SentencePieceModel:
    """Parse the content of a `tokenizer.model`.

    Raises:
        TokenizerError: It is not such a file, or is damaged.
    """
    model = SentencePieceModel()
    try:
        for number, value in _fields(content):
            if number == 1:
                model.pieces.append(_piece(_bytes(value)))
            elif number == 2:
                _read_trainer(_bytes(value), model)
            elif number == 3:
                _read_normalizer(_bytes(value), model)
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise TokenizerError(f"the SentencePiece file is damaged ({error}). Fetch tokenizer.model again.") from None
    if not model.pieces:
        raise TokenizerError("the SentencePiece file holds no pieces. Fetch tokenizer.model again.")
    return model


def build_sentencepiece(content: bytes, name: str) -> LibraryTokenizer:
    """The tokenizer that a `tokenizer.model` describes.

    Its ids equal SentencePiece's for models without a character map (Llama, Mistral, Gemma). With one
    (NFKC), the library applies the map to whole graphemes, so letters followed by combining marks may come
    out differently. It is not lossless: the space put before the text counts a byte (`prefix_bytes`), and a
    literal "▁" in a text reads as a space.

    Args:
        content: The file.
        name: Human name of the tokenizer.

    Raises:
        TokenizerError: The file is damaged, or uses a feature that cannot be reproduced exactly.
    """
    model = read_sentencepiece(content)
    _require_supported(model, name)
    with library_errors(f"building the tokenizer '{name}'"):
        inner = tokenizers.Tokenizer(_bpe(model) if model.model_type == _BPE else _unigram(model))
        inner.normalizer = _normalizer(model)
        if model.model_type == _BPE and model.byte_fallback and _spaces_only_lead(model):
            # no merge crosses the start of a run of spaces, so cutting there changes no id and is much faster
            pattern = tokenizers.Regex(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
            inner.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
        inner.decoder = _decoder(model)
        _add_tokens(inner, model)
    known = {text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)}
    special: dict[str, str | None] = {role: text if text in known else None for role, text in model.special.items()}
    return LibraryTokenizer(inner, name, special, model_file=content)


def _require_supported(model: SentencePieceModel, name: str) -> None:
    kinds = {kind for _, _, kind in model.pieces}
    reason = None
    if model.model_type not in (_UNIGRAM, _BPE):
        reason = "is a word or character model"
    elif model.space_is_suffix:
        reason = "treats whitespace as a suffix"
    elif UNUSED in kinds:
        reason = "has unused pieces"
    elif USER_DEFINED in kinds and model.add_dummy_prefix:
        reason = "has user-defined pieces together with a dummy prefix"
    elif USER_DEFINED in kinds and model.model_type == _UNIGRAM:
        reason = "has user-defined pieces in a Unigram model"
    elif UNKNOWN not in kinds:
        reason = "has no unknown piece"
    if reason:
        raise TokenizerError(
            f"the SentencePiece model '{name}' {reason}, which cannot be reproduced id by id. "
            "Use its tokenizer.json instead."
        )


def _bpe(model: SentencePieceModel) -> models.BPE:
    vocabulary = {text: index for index, (text, _, _) in enumerate(model.pieces)}
    mergeable = {text: index for text, index in vocabulary.items() if model.pieces[index][2] == NORMAL}
    unknown = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    return models.BPE(
        vocab=vocabulary,
        merges=_merges(model, mergeable),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(model: SentencePieceModel, mergeable: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs whose union is a piece, best score of the union first, as SentencePiece merges them."""
    merges: list[tuple[str, str]] = []
    for text in sorted(mergeable, key=lambda piece: (-model.pieces[mergeable[piece]][1], mergeable[piece])):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in pairs if pair[0] in mergeable and pair[1] in mergeable]
        merges += sorted(pairs, key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))
    return merges


def _unigram(model: SentencePieceModel) -> models.Unigram:
    unknown = next(index for index, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    return models.Unigram(
        [(text, score) for text, score, _ in model.pieces], unk_id=unknown, byte_fallback=model.byte_fallback
    )


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        require_sound_map(model.character_map)
        steps.append(normalizers.Precompiled(model.character_map))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _add_tokens(inner: tokenizers.Tokenizer, model: SentencePieceModel) -> None:
    special = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
    defined = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    inner.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in defined])


def _spaces_only_lead(model: SentencePieceModel) -> bool:
    return not any(_SPACE in text.lstrip(_SPACE) for text, _, kind in model.pieces if kind == NORMAL)


def _piece(content: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(content):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _integer(value)
    return text, score, kind


def _read_trainer(content: bytes, model: SentencePieceModel) -> None:
    names = {45: "unk", 46: "bos", 47: "eos", 48: "pad"}
    for number, value in _fields(content):
        if number == 3:
            model.model_type = _integer(value)
        elif number == 24:
            model.space_is_suffix = bool(_integer(value))
        elif number == 35:
            model.byte_fallback = bool(_integer(value))
        elif number in names:
            model.special[names[number]] = _bytes(value).decode("utf-8")


def _read_normalizer(content: bytes, model: SentencePieceModel) -> None:
    for number, value in _fields(content):
        if number == 2:
            model.character_map = _bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(_integer(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_integer(value))


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of a protobuf message: varints as int, everything else as its bytes."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            integer, position = _varint(content, position)
            yield number, integer
            continue
        if kind == 2:
            length, position = _varint(content, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + length > len(content):
            raise ValueError(f"a field of {length} bytes where {len(content) - position} are left")
        yield number, content[position : position + length]
        position += length


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number longer than 64 bits")


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where text belongs")
    return value


def _integer(value: bytes | int) -> int:
    if isinstance(value, bytes):
        raise TypeError("text where a number belongs")
    return value
