"""What is never printed and never written into a file: tokens, keys and passwords. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

HIDDEN = "***"
_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
# Not every `-key`: slime's --input-key and --label-key name fields of the data.
_FLAG = re.compile(
    r"[-_]((api|wandb|access|secret|private|auth)[-_]?key|token|secret|password|passwd|credentials?)$",
    re.I,
)
_NAMES = (
    r"[A-Za-z0-9_]*(?:API_?KEY|ACCESS_?KEY|SECRET_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)"
)
# `"NAME": "value"` of JSON, `NAME=value` of a variable, the shapes of well-known tokens, a URL's password.
_INSIDE = (
    re.compile(rf'("{_NAMES}"\s*:\s*")[^"]*(?=")', re.I),
    re.compile(rf"(\b{_NAMES}=)[^\s,;&\"']+", re.I),
    re.compile(r"()\b(?:hf_|sk-|gh[pousr]_|glpat-|xox[abp]-)[\w-]{10,}"),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
)
_SHORTEST = 6  # characters; a shorter value may stand in a command by chance


def is_secret(name: str) -> bool:
    """Whether a variable's or flag's value must not be shown."""
    return bool((_FLAG if name.startswith("-") else _VARIABLE).search(name))


def values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secret values of an environment, the longest first."""
    found = {value for name, value in environ.items() if is_secret(name)}
    return tuple(sorted((v for v in found if len(v) >= _SHORTEST), key=len, reverse=True))


def mask(text: str, known: Sequence[str] = ()) -> str:
    """Return `text` with what looks like a secret, and all `known` values, blotted out."""
    for value in known:
        text = text.replace(value, HIDDEN)
    for pattern in _INSIDE:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def masked(argv: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Return a command with the values of secret flags, and all other secrets, blotted out."""
    out: list[str] = []
    for token in argv:
        flag, equals, _ = token.partition("=")
        if token.startswith("--") and equals and is_secret(flag):
            out.append(f"{flag}={HIDDEN}")
        elif out and out[-1].startswith("--") and is_secret(out[-1]) and not token.startswith("--"):
            out.append(HIDDEN)
        else:
            out.append(mask(token, known))
    return out
