"""How long the steps of an initialization may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayserve_hooks.core.masking import shown
from rayserve_hooks.core.validation import adapter, described, problems_of
from rayserve_hooks.errors import CallbackConfigError


def _seconds(of_what: str, default: float | None = None) -> Any:
    description = f"Seconds for {of_what}; null for no limit."
    rules = {"gt": 0, "strict": True, "allow_inf_nan": False}
    return described(description, rules, default=default)


@dataclass(frozen=True)
class TimeLimits:
    """Limits in seconds; None means none. What may download has none by default."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's name for its settings

    on_configure: float | None = _seconds("all on_configure callbacks together", 300.0)
    on_before_init: float | None = _seconds("all on_before_init callbacks together", 1800.0)
    on_before_download: float | None = _seconds(
        "all on_before_download callbacks together, on each node"
    )
    on_after_init: float | None = _seconds("all on_after_init callbacks together", 1800.0)
    on_before_engine_init: float | None = _seconds(
        "all on_before_engine_init callbacks together, in each process", 600.0
    )
    on_engine_ready: float | None = _seconds("all on_engine_ready callbacks together", 1800.0)
    on_shutdown: float | None = _seconds(
        "all on_shutdown callbacks together; Serve's graceful_shutdown_timeout_s ends them, too",
        15.0,
    )
    on_init_failed: float | None = _seconds(
        "all on_init_failed callbacks together, in each process", 60.0
    )
    download: float | None = _seconds("the default download, on each node")
    total: float | None = _seconds(
        "the whole initialization, the wait for the placement group and downloads included"
    )

    @classmethod
    def parse(cls, values: object) -> TimeLimits:
        """Return a config's ``time_limits``: a mapping from some names to seconds or None."""
        from pydantic import ValidationError

        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise CallbackConfigError(
                f"time_limits is {shown(values)}; write a mapping from {', '.join(known)} to "
                "seconds"
            )
        problems = []
        try:
            return adapter(cls).validate_python({_name(key): values[key] for key in values})
        except ValidationError as error:
            for problem in problems_of(error, known):
                text = "write seconds, more than 0, or null for no limit"
                ours = problem if problem.of_key else dataclasses.replace(problem, text=text)
                problems.append(ours.in_config("time_limits"))
        raise CallbackConfigError(*problems)


def _name(key: object) -> str:
    return key if isinstance(key, str) else shown(key)
