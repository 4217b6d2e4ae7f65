"""The paced S3 server of the download benchmarks, and what it serves.

It behaves as S3 does as published: about 90 MB/s for each connection and 25 ms to the first byte.
Client and server share the cores of one machine, so only the ratios of one run count.
"""

from __future__ import annotations

import contextlib
import filecmp
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / ".cache" / "bench-data"
OUTPUT = DATA / "output"
ONE, SHARDS, SMALL = "1 file of 1 GiB", "8 shards of 128 MiB", "2,000 files of 16 KiB"
_FOLDERS = {ONE: "one", SHARDS: "shards", SMALL: "small"}
_MIB = 2**20


def folder(case: str) -> Path:
    return DATA / "bucket" / _FOLDERS[case]


def uri(case: str) -> str:
    return f"s3://anonymous@bucket/{_FOLDERS[case]}"


def make_data() -> None:
    """Write what is served, once: random bytes, and the small files of a model beside them."""
    if (DATA / "done").exists():
        return
    sizes = {ONE: (1, 1024 * _MIB), SHARDS: (8, 128 * _MIB), SMALL: (2000, 16 * 1024)}
    for case, (count, size) in sizes.items():
        folder(case).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            with (folder(case) / f"model-{number:05}.safetensors").open("wb") as file:
                for _ in range(max(1, size // _MIB)):
                    file.write(os.urandom(min(size, _MIB)))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder(SHARDS) / name).write_bytes(os.urandom(100_000))
    (DATA / "done").touch()


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serve the data in a process of its own; give the endpoint."""
    make_data()
    command = [sys.executable, str(ROOT / "tests" / "s3.py"), str(DATA), "--crc64"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        os.environ["AWS_REGION"] = "us-east-1"
        yield endpoint
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(OUTPUT, ignore_errors=True)


def warm_up(case: str) -> None:
    """Read what is served, so that no round waits for the server's disk."""
    files = [str(file) for file in folder(case).iterdir()]
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def warm_memory() -> None:
    """Touch as much memory as one round needs, in a process of its own.

    A virtual machine that gives its free memory back to the host waits long for it later, for up
    to two seconds per GiB where this was measured, and whoever comes first pays.
    """
    touch = f"import mmap; mmap.mmap(-1, {3 * 2**30}, flags={_TOUCHED})"
    subprocess.run([sys.executable, "-S", "-c", touch], check=True)


_TOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE


@contextlib.contextmanager
def target() -> Iterator[Path]:
    """Yield a new folder; its files are emptied after the block, and deleted after the last round.

    Where many files were deleted in the last minutes ext4 searches long for a place for a new
    one, so each round would slow down the next.
    """
    OUTPUT.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=OUTPUT))
    yield folder
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, 0)


def check_equal(case: str, target: Path) -> None:
    """Compare byte for byte, so that no side is fast by being wrong."""
    names = [file.name for file in folder(case).iterdir()]
    _, different, missing = filecmp.cmpfiles(folder(case), target, names, shallow=False)
    if different or missing:
        raise AssertionError(f"{target}: {different} differ, {missing} are missing")
