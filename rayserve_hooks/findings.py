"""`Finding`: one line of ``rayserve-hooks doctor``, of this package or of a callback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

State = Literal["ok", "warning", "problem"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Finding:
    """What ``rayserve-hooks doctor`` has looked at, what it found, and what to do about it.

    A callback adds lines of its own by a plain method, which is optional::

        def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Finding]:
            ...

    It is called on an instance of its own, on this machine and with ``--cluster`` on every node,
    before anything is deployed. ``llm_config`` is the deployment's part of the file, as it is
    written there, without Ray. The method changes nothing, returns soon, and needs no hook to have
    run; what it raises becomes a problem.

    Args:
        subject: What was looked at, in a few words.
        state: ``"ok"``, ``"warning"`` or ``"problem"``; with a problem ``doctor`` fails.
        detail: What was found, without secrets.
        advice: What to do; required unless the state is ``"ok"``.

    Raises:
        ValueError: The state is none of these, or there is no advice.
    """

    subject: str
    state: State
    detail: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state is {self.state!r}; use one of {', '.join(STATES)}")
        if self.state != "ok" and not self.advice:
            raise ValueError(
                f"the finding about {self.subject!r} is a {self.state} without advice; say what "
                "to do"
            )
