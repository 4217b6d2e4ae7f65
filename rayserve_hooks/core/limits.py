"""How long the steps of an initialization may take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayserve_hooks.core.validation import Problem, problems_of
from rayserve_hooks.errors import CallbackConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def _seconds(default: float | None, of_what: str) -> Any:
    description = f"Seconds for {of_what}; null for no limit."
    return dataclasses.field(
        default=default, metadata={"description": description, "gt": 0, "strict": True}
    )


# A dataclass of the standard library, of which pydantic reads the metadata: its schema is then
# built where limits are parsed, and not in each process that imports this file.
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

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's name for its settings

    on_before_init: float | None = _seconds(1800.0, "all on_before_init callbacks together")
    on_before_download: float | None = _seconds(
        None, "all on_before_download callbacks together, on each node"
    )
    on_after_init: float | None = _seconds(1800.0, "all on_after_init callbacks together")
    on_init_failed: float | None = _seconds(
        60.0, "all on_init_failed callbacks together, in each process"
    )
    download: float | None = _seconds(None, "the default download, on each node")
    total: float | None = _seconds(
        None, "the whole initialization, the wait for the placement group and downloads included"
    )

    @classmethod
    def parse(cls, values: object) -> TimeLimits:
        """Read a config's ``time_limits``.

        Args:
            values: A mapping from some of the attributes to seconds or None.

        Raises:
            CallbackConfigError: An unknown name, or a value that is no positive number.
        """
        from pydantic import ValidationError

        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise CallbackConfigError(
                f"time_limits is {values!r}; write a mapping from {', '.join(known)} to seconds"
            )
        values = {str(name): value for name, value in values.items()}
        try:
            return limits_adapter().validate_python(values)
        except ValidationError as error:
            problems = [_message(problem) for problem in problems_of(error, known)]
        raise CallbackConfigError(*problems)


@functools.cache
def limits_adapter() -> TypeAdapter[TimeLimits]:
    """Return pydantic's view of limits that are written as a mapping."""
    from pydantic import TypeAdapter

    return TypeAdapter(TimeLimits)


def _message(problem: Problem) -> str:
    if not problem.of_key:
        text = "write seconds, more than 0, or null for no limit"
        problem = dataclasses.replace(problem, text=text)
    return problem.in_config("time_limits")
