"""How long the steps of an initialization may take."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from rayserve_hooks.errors import CallbackConfigError, Problems


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds; None means none. Downloads have none by default.

    Attributes:
        on_before_init: All callbacks of that hook together.
        on_before_download: All callbacks of that hook together, on each node. They may download.
        on_after_init: All callbacks of that hook together.
        on_init_failed: All callbacks of that hook together, in each process.
        download: The default download, on each node.
        total: The whole initialization, the wait for the placement group and downloads included.
    """

    on_before_init: float | None = 1800.0
    on_before_download: float | None = None
    on_after_init: float | None = 1800.0
    on_init_failed: float | None = 60.0
    download: float | None = None
    total: float | None = None

    @classmethod
    def parse(cls, values: object) -> TimeLimits:
        """Read a config's ``time_limits``.

        Args:
            values: A mapping from some of the attributes to seconds or None.

        Raises:
            CallbackConfigError: An unknown name, or a value that is no positive number.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise CallbackConfigError(
                f"time_limits is {values!r}; write a mapping from {', '.join(known)} to seconds"
            )
        problems = Problems()
        for name, value in values.items():
            with problems.collected():
                _check(str(name), value, known)
        problems.raise_all()
        return cls(**values)


def _check(name: str, value: object, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
        raise CallbackConfigError(f"time_limits has unknown key {name!r}; {hint}")
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CallbackConfigError(
            f"time_limits: {name} is {value!r}; write seconds, more than 0, or null for no limit"
        )
