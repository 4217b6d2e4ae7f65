"""The transfer of a model's files from a paced S3 server to disk, by what can do it.

Ours verifies the store's checksums, writes markers and can be resumed; the others only copy. The
imports are made before the clock starts. Every output is compared byte for byte. A copy from local
disk shows the machine's limit.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import store
from report import Benchmark, arguments

CASES = (store.ONE, store.SHARDS, store.SMALL)
SIDES = (
    "Ray's boto3 path",
    "pyarrow.fs",
    "fsspec",
    "local disk",
    "ours",
)
WANTED = {store.ONE: 2.1, store.SHARDS: 2.3, store.SMALL: 10}
MOST_MIB = 256
FSSPEC_VENV = store.ROOT / ".cache" / "bench-fsspec"


def ray_boto3(case: str, target: Path) -> Callable[[], object]:
    from ray.llm._internal.common.utils.cloud_filesystem import s3_filesystem

    fetch = s3_filesystem.S3FileSystem.download_files
    return lambda: fetch(str(target), store.uri(case))


def pyarrow_fs(case: str, target: Path) -> Callable[[], object]:
    from pyarrow import fs

    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    remote = fs.S3FileSystem(anonymous=True, endpoint_override=endpoint, scheme="http")
    path = store.uri(case).removeprefix("s3://anonymous@")
    return lambda: fs.copy_files(
        path, str(target), source_filesystem=remote, chunk_size=16 * 2**20, use_threads=True
    )


def fsspec(case: str, target: Path) -> Callable[[], object]:
    import s3fs

    remote = s3fs.S3FileSystem(anon=True, endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    path = store.uri(case).removeprefix("s3://anonymous@")
    return lambda: remote.get(f"{path}/", f"{target}/", recursive=True)


def local_disk(case: str, target: Path) -> Callable[[], object]:
    return lambda: shutil.copytree(store.folder(case), target, dirs_exist_ok=True)


def ours(case: str, target: Path) -> Callable[[], object]:
    os.environ["HF_HUB_CACHE"] = str(target)
    for name in ("awscrt.checksums", "botocore.session", "http.client", "obstore.store"):
        importlib.import_module(name)

    from rayserve_hooks.context import NodeModelDownloadable
    from rayserve_hooks.download.model import Mirror, download_node

    everything = NodeModelDownloadable.MODEL_AND_TOKENIZER
    return lambda: download_node("model", Mirror(store.uri(case)), everything)


SOURCES = (ray_boto3, pyarrow_fs, fsspec, local_disk, ours)
PREPARE = dict(zip(SIDES, SOURCES, strict=True))


def one(case: str, side: str) -> dict[str, float]:
    with store.target() as target:
        fetch = PREPARE[side](case, target)
        store.warm_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        fetch()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = next(target.rglob("model-00000.safetensors")).parent
        store.check_equal(case, found)
    return {"seconds": seconds, "mib": (peak - before) / 1024}


def python_of(side: str) -> str:
    """Return the interpreter: s3fs pins another boto3, so it has an environment of its own."""
    if side != "fsspec":
        return sys.executable
    python = FSSPEC_VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FSSPEC_VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "s3fs"], check=True)
    return str(python)


def main() -> int:
    options = arguments(__doc__)
    if options.one:
        print(json.dumps(one(*options.one)))
        return 0
    benchmark = Benchmark("transfer", "From an S3 server to disk", wanted=WANTED)
    memory: dict[str, dict[str, list[float]]] = {}

    def measure(case: str, side: str) -> float:
        store.warm_up(case)
        command = [python_of(side), __file__, "--one", case, side]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        memory.setdefault(case, {}).setdefault(side, []).append(result["mib"])
        return float(result["seconds"])

    with store.serving():
        benchmark.run(CASES, SIDES, options.rounds, measure)
    peaks = {
        f"peak MiB, {case}, {side}": round(statistics.median(values))
        for case, sides in memory.items()
        for side, values in sides.items()
    }
    highest = max(max(sides["ours"]) for sides in memory.values())
    peaks[f"highest peak MiB, ours (at most {MOST_MIB} is wanted)"] = round(highest)
    return benchmark.finish(peaks) or int(highest > MOST_MIB)


if __name__ == "__main__":
    sys.exit(main())
