"""How a callback that is configured as an instance travels to other processes."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

_LOCK = type(threading.Lock())
_RLOCK = type(threading.RLock())
_FILES = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)


def dumps(instance: object) -> bytes:
    """Pickle an instance, with the locks and open files it holds.

    In the other process a lock is a new one, which nobody holds; a file is opened again by its
    path, for reading at the same position, for writing at its end. An object that stands for a
    connection, such as a client, cannot be sent.

    Raises:
        TypeError: It holds something that cannot be sent; names the attribute.
    """
    try:
        return _dumps(instance)
    except Exception as error:  # any class can refuse in its own way
        for name, value in getattr(instance, "__dict__", {}).items():
            try:
                _dumps(value)
            except Exception as reason:  # as above
                raise TypeError(
                    f"its attribute {name!r}, a {type(value).__name__}, cannot: {reason}"
                ) from error
        raise


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
