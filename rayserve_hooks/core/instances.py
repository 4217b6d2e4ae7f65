"""How a callback that is configured as an instance travels to other processes."""

from __future__ import annotations

import inspect
import io
import threading
from pathlib import Path
from typing import Any

_LOCK = type(threading.Lock())
_RLOCK = type(threading.RLock())
_FILES = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)


def dumps(instance: object) -> bytes:
    """Pickle an instance, with the locks, open files and clients it holds.

    In the other process a lock is a new one, which nobody holds; a file is opened again by its
    path, for reading at the same position, for writing at its end. What cannot be pickled, such as
    a client, is made there as it was made here: the class is called again, with the arguments it
    has kept in attributes of their names. All other attributes travel.

    Raises:
        TypeError: It holds something that can be neither pickled nor made again; names the
            attribute.
    """
    try:
        return _dumps(instance)
    except Exception as error:  # any class can refuse in its own way
        refused = _refused(instance)
        if not refused:
            raise
        try:
            return _dumps(_MadeAgain(instance, refused))
        except _CannotMakeError as problem:
            name, reason = next(iter(refused.items()))
            kind = type(vars(instance)[name]).__name__
            raise TypeError(
                f"its attribute {name!r}, a {kind}, cannot: {reason}; and it cannot be made again "
                f"there: {problem}"
            ) from error


def _refused(instance: object) -> dict[str, Exception]:
    """Name the attributes that cannot be pickled, and why."""
    refused = {}
    for name, value in getattr(instance, "__dict__", {}).items():
        try:
            _dumps(value)
        except Exception as reason:  # any class can refuse in its own way
            refused[name] = reason
    return refused


class _CannotMakeError(Exception):
    """Says why an instance cannot be made again by calling its class."""


class _MadeAgain:
    """Pickles as a call of an instance's class, and the attributes that travel.

    Args:
        instance: The instance.
        refused: Its attributes that the class has to make.

    Raises:
        _CannotMakeError: The class would not make them.
    """

    def __init__(self, instance: object, refused: dict[str, Exception]) -> None:
        self._class = type(instance)
        self._state = {k: value for k, value in vars(instance).items() if k not in refused}
        self._arguments = self._kept_arguments()
        # Tried here, where the config is made, and not on another node an hour later.
        try:
            made = vars(_make_again(self._class, self._arguments, {}))
        except Exception as error:  # a constructor may refuse with any exception
            raise _CannotMakeError(
                f"{self._class.__name__}() raised {type(error).__name__}"
            ) from error
        for name in refused:
            # By name: boto3 makes a new class for each client.
            if _class_name(made.get(name)) != _class_name(vars(instance)[name]):
                raise _CannotMakeError(f"{self._class.__name__}() does not make it")

    def _kept_arguments(self) -> dict[str, Any]:
        arguments = {}
        for parameter in inspect.signature(self._class).parameters.values():
            name = parameter.name
            kept = next((key for key in (name, f"_{name}") if key in self._state), None)
            if kept is None or parameter.kind in _NOT_BY_NAME:
                raise _CannotMakeError(
                    f"argument {name!r} of {self._class.__name__}() is not kept in an attribute "
                    "of that name that can travel"
                )
            arguments[name] = self._state[kept]
        return arguments

    def __reduce__(self) -> tuple[object, ...]:
        return _make_again, (self._class, self._arguments, self._state)


def _class_name(value: object) -> tuple[str, str]:
    return type(value).__module__, type(value).__qualname__


_NOT_BY_NAME = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
)


def _make_again(cls: type, arguments: dict[str, Any], state: dict[str, Any]) -> object:
    instance = cls(**arguments)
    vars(instance).update(state)
    return instance


def _dumps(value: object) -> bytes:
    from ray import cloudpickle

    class Pickler(cloudpickle.CloudPickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, _LOCK):
                return threading.Lock, ()
            if isinstance(value, _RLOCK):
                return threading.RLock, ()
            if isinstance(value, _FILES) and _has_path(value):
                return _open_again, _opened_with(value)
            return super().reducer_override(value)  # type: ignore[no-untyped-call]

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _has_path(file: Any) -> bool:
    # Not so sys.stdout, whose name is "<stdout>" and which cloudpickle sends by itself.
    return isinstance(getattr(file, "name", None), str) and Path(file.name).is_file()


def _opened_with(file: Any) -> tuple[str, str, str | None, int]:
    return str(Path(file.name).absolute()), file.mode, getattr(file, "encoding", None), file.tell()


def _open_again(name: str, mode: str, encoding: str | None, position: int) -> Any:
    # "w" would empty the file for all other processes.
    mode = mode.replace("w", "a").replace("x", "a")
    file = Path(name).open(mode, encoding=encoding)  # noqa: SIM115 - the callback closes it
    if "a" not in mode:
        file.seek(position)
    return file
