"""Botocore's descriptions of services, read in a third of the time.

They are most of what making a client costs: botocore looks twice through the folders of all
services to see whether one is there, and makes an ``OrderedDict`` of each of tens of thousands of
objects, as it had to when a ``dict`` had no order. Imports botocore, so it is imported only where
an S3 URI is at hand.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from typing import Any

from botocore.loaders import Loader

_READERS: dict[str, Callable[..., Any]] = {".json": open, ".json.gz": gzip.open}


class _DataFiles:
    """What `botocore.loaders.Loader` takes as its ``file_loader``."""

    def exists(self, path: str) -> bool:
        """Return whether there is a file of that name, which has no suffix here."""
        return any(os.path.isfile(path + suffix) for suffix in _READERS)

    def load_file(self, path: str) -> Any:
        """Return what is in it; None if there is none."""
        for suffix, open_file in _READERS.items():
            if os.path.isfile(path + suffix):
                with open_file(path + suffix, "rb") as file:
                    return json.loads(file.read())
        return None


class _Data(Loader):  # type: ignore[misc] # botocore has no types
    def list_available_services(self, type_name: str) -> list[str]:
        """Return what may be a service; whether it is one is seen when it is read."""
        folders = filter(os.path.isdir, self.search_paths)
        found = (entry for folder in folders for entry in os.scandir(folder))
        return sorted({entry.name for entry in found if entry.is_dir()})


def data_loader(search_path: str | None) -> Loader:
    """Return what reads the descriptions and keeps them, for one session.

    Each has its own, as botocore writes into what it has read: of a region's endpoint, all that
    its partition says (`botocore.regions.EndpointResolver`).

    Args:
        search_path: Of botocore's setting ``data_path``: more folders, as in ``PATH``.
    """
    more = [os.path.expanduser(os.path.expandvars(path)) for path in (search_path or "").split(":")]
    return _Data([path for path in more if path], file_loader=_DataFiles())
