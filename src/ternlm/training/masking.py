"""Texts that may be shown to anybody: what is secret becomes ***.

Hidden are passwords in URLs, values of whatever is named like a secret, what looks like an access token, and the
values that the environment keeps under such a name. Settings of a run hold no secrets and stay readable.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ternlm.errors import SettingsError
from ternlm.training.settings import setting_names

HIDDEN = "***"

_SECRET_WORD = r"(?:token|key|secret|passw|credential)"
_SECRET_NAME = re.compile(_SECRET_WORD, re.IGNORECASE)
_HARMLESS_NAME = re.compile(r"tokeni[sz]er|tokens", re.IGNORECASE)
_PATTERNS = (
    (re.compile(r"(://)(?:[^\s/]*|[^\s/:]+:\S*)@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"([?&;][^=&\s]*(?:{_SECRET_WORD}|sig|auth)[^=&\s]*=)[^&\s]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(bearer|authorization:\s*\w+)\s+\S+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"(\b(?!mask_token)\w*(?:token|key|secret|password)[\"']?\s*[:=]\s*[\"']?)[^\s\"',}]+", re.IGNORECASE),
     rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)\w{16,}"), HIDDEN),
)  # fmt: skip


def masked(words: Sequence[str]) -> list[str]:
    """A command line that may be shown: secrets are replaced by ***, the home folder by ~."""
    shown, hide_next = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        hides = is_secret(name.lstrip("-")) and (bool(equals) or word.startswith("-"))
        if hide_next:
            shown.append(HIDDEN)
        else:
            shown.append(f"{readable(name)}={HIDDEN}" if hides and equals else readable(word))
        hide_next = hides and not equals and not hide_next
    return shown


@cache
def is_secret(name: str) -> bool:
    """Whether something of this name may hold a secret; the settings of a run hold none."""
    if not _SECRET_NAME.search(_HARMLESS_NAME.sub("", name)):
        return False
    try:
        setting_names().canonical(name)
    except SettingsError:
        return True
    return False


def readable(text: str) -> str:
    """A text without credentials, without the secrets of this process's environment, and with ~ for the home folder."""
    secrets = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = without_credentials(text)
    home = (os.environ.get("HOME") or os.environ.get("USERPROFILE") or "").rstrip("/")
    if home:
        text = re.sub(rf"(?<![\w/]){re.escape(home)}(?=/|$)", "~", text)
    return text.encode("utf-8", "replace").decode()


def without_credentials(value: Any) -> Any:
    """JSON with every text freed of what looks like a credential."""
    if isinstance(value, str):
        for pattern, replacement in _PATTERNS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {key: without_credentials(inner) for key, inner in value.items()}
    return [without_credentials(inner) for inner in value] if isinstance(value, list | tuple) else value
