"""Mutations that know the structure of what they change."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from seeds import YAML_PIECES, field

NUMBERS = [
    *(0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**18, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, 1.5, float("nan"), float("inf"), -float("inf")),
]
TEXTS = [
    *("", " ", "x", "none", "null", "true", "1e999", "9e307T", "nan%", "1" * 400, "a" * 5000, "..", "../../etc/passwd"),
    *("/dev/zero", "\0", "a\nb", "\r", "\u2028", "\ud800", "é" * 200, "🙂", "%s%n", "{x}", "[/red]", "__class__"),
    *(
        "os.system",
        "!!python/name:os.system",
        "model.safetensors",
        "F32",
        "I64",
        "BPE",
        "Unigram",
        "(a+)+$",
        "ByteLevel",
    ),
    *("none: 1", "hf:x/y", "step", "-1", "1:30", "2001-99-99"),
]
SHAPES: list[Any] = [None, True, False, [], {}, [[]], [0], [None], {"a": 1}, {"": {}}, [1, "a", None], {"type": "BPE"}]


def mutated_value(value: Any, draw: random.Random) -> Any:
    """Somewhere in a JSON value: something removed, renamed, copied from elsewhere, or replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return draw.choice(SHAPES)
        parent, key = draw.choice(places)
        action = draw.randrange(8)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[str(draw.choice(TEXTS))] = parent.pop(key)
        elif action == 2:
            other, name = draw.choice(places)
            with suppress(LookupError):
                parent[key] = copy.deepcopy(other[name])
        elif action == 3 and isinstance(parent, list):
            parent.insert(draw.randint(0, len(parent)), draw.choice([*NUMBERS, *TEXTS, *SHAPES]))
        elif action == 4:
            parent[key] = [parent[key]]
        elif action == 5 and isinstance(parent[key], int):
            parent[key] += draw.choice([-1, 1, 255, 2**31, -(2**32)])
        else:
            parent[key] = copy.deepcopy(draw.choice(draw.choice([NUMBERS, TEXTS, SHAPES])))
    return value


def to_text(value: Any, draw: random.Random) -> bytes:
    """JSON of a value, now and then with what no serializer writes."""
    text = json.dumps(value)
    if draw.random() < 0.1:
        number = draw.randrange(6)
        depth = draw.choice([50, 900, 5000, 100_000])
        pieces = ["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, "9" * 5000, "1e99999", '{"a":1,"a":2}']
        place = draw.choice([0, len(text), *[n for n, c in enumerate(text) if c in ":,[{"]])
        text = text[: place + 1] + pieces[number] + text[place + 1 :]
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bits, bytes and ranges changed, removed, put in, repeated, and numbers at the edge of what fits."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        place = draw.randrange(len(changed) + 1)
        end = min(len(changed), place + draw.choice([1, 2, 8, 64, 500]))
        action = draw.randrange(7)
        if action == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif action == 1 and place < len(changed):
            changed[place] = draw.choice([*b'"{}[]:,\\\n -.0\x00\x01\x7f\x80\xff', draw.randrange(256)])
        elif action == 2:
            del changed[place:end]
        elif action == 3:
            changed[place:place] = draw.randbytes(draw.choice([1, 3, 9, 100]))
        elif action == 4:
            changed[place:place] = changed[place:end] * draw.choice([1, 2, 50])
        elif action == 5:
            number = draw.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**64])
            changed[place : place + 8] = struct.pack("<Q", number)
        else:
            del changed[draw.choice([place, 0, len(changed)]) :]
    return bytes(changed)


def mutated_json(content: bytes, draw: random.Random) -> bytes:
    """A JSON file, mostly changed as a value and sometimes as bytes."""
    if draw.random() < 0.25:
        return mutated_bytes(content, draw)
    return to_text(mutated_value(json.loads(content), draw), draw)


def mutated_safetensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header is changed as a value, mostly with a length that fits it."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.3:
        return mutated_bytes(content[: 8 + size + 200], draw) + content[8 + size + 200 :]
    header = mutated_json(content[8 : 8 + size], draw)
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 1, len(header) + 1, 2**32, 2**63 - 1, 2**64 - 1])
    return struct.pack("<Q", length) + header + content[8 + size :]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


def mutated_yaml(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, or a piece of YAML that does more than hold a value."""
    if draw.random() < 0.5:
        return mutated_bytes(content, draw)
    lines = content.split(b"\n")
    lines.insert(draw.randrange(len(lines) + 1), b" " * draw.randrange(4) + draw.choice(YAML_PIECES))
    return b"\n".join(lines)


def mutated_protobuf(content: bytes, draw: random.Random) -> bytes:
    """Fields removed, repeated, swapped, or changed inside with a length that fits."""
    if draw.random() < 0.3:
        return mutated_bytes(content, draw)
    fields = list(fields_of(content))
    for _ in range(draw.choice([1, 1, 3])):
        place = draw.randrange(len(fields))
        number, inner = fields[place]
        action = draw.randrange(5)
        if action == 0:
            del fields[place]
        elif action == 1:
            fields.insert(draw.randrange(len(fields)), (number, inner))
        elif action == 2:
            fields[place] = (draw.choice([1, 2, 3, 4, 15]), inner)
        elif action == 3:
            fields[place] = (number, mutated_bytes(inner, draw))
        else:
            odd = struct.pack("<f", draw.choice([float("nan"), float("inf"), -1e38, 0.0]))
            fields[place] = (number, field(1, draw.choice([b"", b"a", b"\xff", b"\xe2\x96\x81" * 300])) + b"\x15" + odd)
    return b"".join(field(number, inner) for number, inner in fields)


def fields_of(content: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(content):
        number, length, shift = content[place] >> 3, 0, 0
        place += 1
        while True:
            length |= (content[place] & 127) << shift
            shift, place = shift + 7, place + 1
            if content[place - 1] < 128:
                break
        yield number, content[place : place + length]
        place += length
