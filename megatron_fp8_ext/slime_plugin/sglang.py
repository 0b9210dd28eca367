"""Which versions of SGLang a slime can use.

slime pins none, and the newest, which pip brings, is too new for both tested commits.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp8_ext.megatron_plugin import compat


@dataclass(frozen=True)
class Versions:
    """The SGLang versions of one slime.

    Attributes:
        oldest: first one that is known to fit.
        too_new: first one that does not.
        why: what `too_new` changed.
        released_with: the one in slime's own image (its docker/README.md), with slime's patches.
    """

    oldest: tuple[int, ...]
    too_new: tuple[int, ...]
    why: str
    released_with: str

    def problem(self, version: str) -> str | None:
        """Say why `version` cannot be used; None if it can."""
        found = compat.parse_version(version)
        if found >= self.too_new:
            return self.why
        if found < self.oldest:
            return f"older than {'.'.join(map(str, self.oldest))}, which this slime needs"
        return None


# Tried: slime's engine and weight push imported and its SGLang flags parsed and checked, with 0.5.6, 0.5.9,
# 0.5.15.post1, 0.5.19 (they fit), 0.5.20, 0.5.21, 0.5.22 (they do not).
V03 = Versions(
    (0, 5, 6),
    (0, 5, 20),
    "slime lists the fields of SGLang's ServerArgs, which is no dataclass since 0.5.20",
    "0.5.15.post1",
)
# Its flags parsed and checked with 0.5.1, 0.5.6, 0.5.9, 0.5.12, 0.5.13 (they fit), 0.5.14, 0.5.15.post1.
REFERENCE = Versions(
    (0, 5, 0),
    (0, 5, 14),
    "slime 8359c9a reads sglang_data_parallel_size, which SGLang calls sglang_dp_size since 0.5.14",
    "0.5.0rc0",
)


def of(per_step_batch: bool) -> Versions:
    """Return the versions of v0.3 (`per_step_batch`, see `checkout`) or of 8359c9a."""
    return V03 if per_step_batch else REFERENCE
