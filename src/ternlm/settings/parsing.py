"""YAML and JSON as data and nothing else: no tags that build objects, no aliases, no key twice, nothing endless."""

from typing import Any

import yaml

from ternlm.files import from_json

LARGEST = 2**20
"""Bytes of a settings file; a megabyte of settings is a mistake."""


def parse_settings(content: bytes, is_json: bool = False) -> Any:
    """The value that a settings file holds.

    Raises:
        ValueError: It is malformed; the message is one line.
    """
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST:,} bytes")
    try:
        return from_json(content) if is_json else parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: It is malformed, repeats a key, holds an alias, or is nested too deeply.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_repetitions(node, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (LookupError, TypeError, AttributeError, OverflowError):  # PyYAML's builders for tags trip over other texts
        raise ValueError("a value does not fit its tag") from None


def _refuse_repetitions(node: yaml.Node, seen: set[int]) -> None:
    """An alias makes a file of kilobytes gigabytes when written out; a repeated key hides what stood there before."""
    if id(node) in seen:
        raise ValueError("aliases (*name) are not supported; write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repetitions(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise ValueError(f"the key '{key.value}' occurs twice in one section")
                keys.add(key.value)
            _refuse_repetitions(key, seen)
            _refuse_repetitions(value, seen)
