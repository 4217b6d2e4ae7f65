"""Keep vLLM's compile cache from one replica to the next, also to one on another machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.core.known_secrets import secrets_among
from rayserve_hooks.core.masking import is_secret, redact, shown
from rayserve_hooks.errors import CallbackConfigError, DownloadError
from rayserve_hooks.hookspecs import hookimpl
from rayserve_hooks.impls._archive import ArchiveError, pack, units_of, unpack
from rayserve_hooks.impls._startup import this_replica

if TYPE_CHECKING:
    from rayserve_hooks.download.objects import ObjectFolder

VARIABLE = "VLLM_CACHE_ROOT"
STARTS = "rayserve_hooks_compile_cache_starts_total"
_DATA = "compile_cache"  # in custom_data
_OWN = ".rayserve_hooks"  # in the folder that vLLM is given
_ARCHIVE, _FACTORS = ".archive", ".json"
_MOST_ARCHIVES = 8  # of one key that are restored: what vLLM's own key tells apart
_KEY_BYTES = 16
_FACTORS_BYTES = 2**20
_MOST_SHOWN = 5
_MOST_COMPARED = 32
_MOST_STARTS = 32  # at one time on one node
# Neither in vLLM's own key nor in what is compiled.
_HARMLESS = {
    "disable_log_stats",
    "download_dir",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "load_format",
    "served_model_name",
}


def _store(uri: str) -> str:
    if uri.startswith("/"):
        return f"file://{uri.rstrip('/')}"
    if uri.partition("://")[0] not in ("s3", "gs", "azure", "abfss", "file"):
        raise ValueError("write an absolute folder, or s3://, gs://, azure:// or abfss://")
    return uri.rstrip("/")


def _root(folder: str) -> str:
    if not folder.startswith(("/", "~/")):
        raise ValueError("give an absolute path, or one that starts with '~/'")
    return folder.rstrip("/")


class CompileCache:
    """Restore vLLM's compile cache before the engine starts, and save it after one that compiled.

    The cache is code that the engine runs. So an archive is used only if it was signed with the
    operator's key, or ``store`` is a place that only the operator can write, which
    ``trusted_store`` says. One of ``key_variable``, ``key_file`` and ``trusted_store`` is needed.

    A start without its cache is only slower: what goes wrong here is a warning.

    Args:
        store: Where the archives are: an absolute path of a folder that all nodes share, or
            ``s3://``, ``gs://``, ``azure://`` or ``abfss://`` with a folder. It must exist.
            Required.
        key_variable: The environment variable, set on every node, that holds the key archives are
            signed with, of at least 16 bytes. Default: None.
        key_file: The file with that key, the same path on every node. Default: None.
        trusted_store: Whether only the operator can write ``store``, so that archives need no
            signature. A shared folder is checked for that. Default: False.
        folder: The folder on each node below which vLLM keeps the cache. Default:
            ``"~/.cache/rayserve_hooks/compile_cache"``.
        save: Whether to save the cache after a start that has compiled. Default: True.
        limit_mb: The largest archive, in megabytes; it is held in memory. Default: 1024.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        store: Annotated[str, AfterValidator(_store)],
        *,
        key_variable: Annotated[str, Field(pattern=r"^\w+$")] | None = None,
        key_file: Annotated[str, AfterValidator(_root)] | None = None,
        trusted_store: bool = False,
        folder: Annotated[str, AfterValidator(_root)] = "~/.cache/rayserve_hooks/compile_cache",
        save: bool = True,
        limit_mb: Annotated[int, Field(gt=0, le=4096)] = 1024,
    ) -> None:
        if (key_variable is not None) + (key_file is not None) + trusted_store != 1:
            raise CallbackConfigError(
                "CompileCache takes exactly one of key_variable, key_file and trusted_store=True; "
                "say how an archive is known to be yours"
            )
        self.store = store
        self.key_variable = key_variable
        self.key_file = key_file
        self.folder = folder
        self.save = save
        self.limit_bytes = limit_mb * 10**6
        self._before: set[str] = set()  # what the cache held before the engine started
        self._restored = ""  # why nothing was; empty if the node has the archives of the key
        self._saving: threading.Thread | None = None

    def on_configure(self, ctx: CallbackCtx) -> None:
        self._own_root(ctx)

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self._own_root(ctx)  # Ray's builders call no on_configure

    @hookimpl(trylast=True)
    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data[_DATA] = {
            "root": self._own_root(ctx),
            "factors": factors_of(ctx),
            "start": os.urandom(8).hex(),
        }

    @hookimpl(tryfirst=True)
    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        """Restore, in the process of each node that comes first."""
        try:
            root = _cache_folder(ctx.custom_data[_DATA]["root"])
            key = _key_of(ctx.custom_data[_DATA]["factors"])
            with _locked(root):
                if not _is_first(root, ctx.custom_data[_DATA]["start"]):
                    return
                self._restored = self._restore(ctx, root, key)
                self._before = _compiled(root)
                _mark_unread(root, self._before)
        except Exception as error:
            self._restored = f"{type(error).__name__}: {redact(str(error), ctx.runtime_env)}"
            ctx.log.warning("the compile cache was not restored: %s", self._restored)

    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        try:
            root = _cache_folder(ctx.custom_data[_DATA]["root"])
            after = _compiled(root)
            new = after - self._before
            made = _Made(root, ctx.custom_data[_DATA]["factors"], vllm_factors(root, new))
            self._report(ctx, made, new, after)
            if new and self.save:
                # A thread of our own: the replica is ready only when those of the context ended.
                arguments = (made, new, dict(ctx.runtime_env), ctx.log)
                self._saving = threading.Thread(
                    target=self._save, args=arguments, name="compile_cache", daemon=True
                )
                self._saving.start()
        except Exception as error:
            text = f"{type(error).__name__}: {redact(str(error), ctx.runtime_env)}"
            ctx.log.warning("the compile cache was not looked at: %s", text)

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        if self._saving is not None:  # an archive appears whole or not at all
            self._saving.join(10.0)

    def _own_root(self, ctx: CallbackCtx) -> str:
        """Return the deployment's folder, as the environment of all its processes has it."""
        env_vars = {**(ctx.runtime_env.get("env_vars") or {})}
        found = env_vars.get(VARIABLE)
        if found is None:
            config: Any = ctx.llm_config
            identity = f"{config.model_id} {sorted(map(repr, config.engine_kwargs.items()))}"
            name = re.sub(r"[^\w.-]", "-", config.model_id)[:60]
            found = f"{self.folder}/{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
            env_vars[VARIABLE] = found
            ctx.runtime_env = {**ctx.runtime_env, "env_vars": env_vars}
        elif not found.startswith(f"{self.folder}/"):
            raise ValueError(
                f"runtime_env sets {VARIABLE} to {found!r}, which this callback owns; drop it, or "
                f"give folder={str(Path(found).parent)!r}"
            )
        return str(found)

    def _restore(self, ctx: CallbackCtx, root: Path, key: str) -> str:
        """Return why there is nothing of this key; empty if there is."""
        from rayserve_hooks.download.objects import ObjectFolder

        marker = root / _OWN / key
        if marker.exists():  # of an earlier process or replica on this node
            return ""
        started = time.perf_counter()
        secret = self._key()
        with ObjectFolder(self.store) as store:
            names = store.names()
            archives = [n for n in names if n.startswith(f"{key}-") and n.endswith(_ARCHIVE)]
            units, refused = 0, []
            for name in archives[:_MOST_ARCHIVES]:
                data = store.read(name, self.limit_bytes + 2**20)
                try:
                    units += len(unpack(data, root, name, secret, self.limit_bytes))
                    described = name.removesuffix(_ARCHIVE) + _FACTORS
                    (root / _OWN / described).write_text(
                        json.dumps(_factors(store, described)["vllm"])
                    )
                except ArchiveError as error:
                    refused.append(str(error))
            if not archives:
                return _nearest(store, names, ctx.custom_data[_DATA]["factors"])
        for text in refused:
            ctx.log.warning("the compile cache was not restored: %s", text)
        if len(refused) == len(archives[:_MOST_ARCHIVES]):
            return "no archive is ours"
        marker.touch()
        seconds = time.perf_counter() - started
        text = "restored the compile cache: %d folders of %d archives in %.2f s"
        ctx.log.info(text, units, len(archives), seconds, extra={"seconds": seconds})
        return ""

    def _key(self) -> bytes:
        if self.key_variable is not None:
            key = os.environ.get(self.key_variable, "").encode()
            where = f"the variable {self.key_variable!r}"
        elif self.key_file is not None:
            key = Path(self.key_file).expanduser().read_bytes().strip()
            where = f"the file {self.key_file!r}"
        else:
            self._check_trust()
            return b""
        if len(key) < _KEY_BYTES:
            raise ValueError(
                f"{where} holds no key of at least {_KEY_BYTES} bytes on this node; set it where "
                "Ray is started"
            )
        return key

    def _check_trust(self) -> None:
        folder = self.store.removeprefix("file://")
        if folder == self.store:
            return  # of a bucket the operator knows
        status = os.stat(folder)  # noqa: PTH116 - of a string
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise PermissionError(
                f"others can write {folder!r}, so it is no trusted store; take that away from "
                "them, or sign the archives with key_variable or key_file"
            )

    def _report(self, ctx: CallbackCtx, made: _Made, new: set[str], after: set[str]) -> None:
        """Log and count what the cache did for this start, and why it did not do more."""
        result, why = self._explain(made, new, after)
        # Without a cache there is nothing to hit; with one that was not, it is of no use.
        idle = result == "inert" or (result == "miss" and self._before)
        texts = list(why.values())
        more = [f"and {len(texts) - _MOST_SHOWN} more"] if len(texts) > _MOST_SHOWN else []
        ctx.log.log(
            logging.WARNING if idle else logging.INFO,
            "compile cache: %s",
            "; ".join([result, *texts[:_MOST_SHOWN], *more]),
        )
        _count(ctx, result, why)

    def _explain(self, made: _Made, new: set[str], after: set[str]) -> tuple[str, dict[str, str]]:
        """Return the result, and for each factor that differs a text that says so."""
        if not after:
            return "inert", {
                "inert": "vLLM has written no compile cache, so there is nothing to keep; drop "
                "enforce_eager, or VLLM_DISABLE_COMPILE_CACHE, or this callback"
            }
        if not new and not _was_read(made.root, after):
            return "inert", {
                "inert": f"the engine has read none of the {len(after)} files that were there; "
                "drop VLLM_DISABLE_COMPILE_CACHE, or this callback"
            }
        if not new:
            return "hit", {}
        if self._restored:
            return "miss", {_factor(self._restored): self._restored}
        kept = _known(made.root / _OWN)
        if not kept:
            return "miss", {"vLLM": "vLLM's own key is another than that of the archive"}
        same = {"vLLM": "all that vLLM says of its key is the same as of the archive"}
        return "miss", min((_differences(old, made.vllm) for old in kept), key=len) or same

    def _save(self, made: _Made, new: set[str], runtime_env: Mapping[str, Any], log: Any) -> None:
        from rayserve_hooks.download.objects import ObjectFolder

        started = time.perf_counter()
        try:
            secret = self._key()
            units = units_of([*new, *_files(made.root, "modelinfos")])
            _check_secrets(made.root, units, runtime_env, secret)
            content = hashlib.sha256("\n".join(units).encode()).hexdigest()[:16]
            name = f"{_key_of(made.factors)}-{content}"
            data = pack(made.root, units, name + _ARCHIVE, secret)
            if len(data) > self.limit_bytes:
                raise ValueError(f"it has {len(data):,} bytes; raise limit_mb")
            with ObjectFolder(self.store) as store:
                ours = store.create(name + _ARCHIVE, data)
                if ours:
                    store.create(name + _FACTORS, made.described().encode())
            (made.root / _OWN / f"{name}{_FACTORS}").write_text(json.dumps(dict(made.vllm)))
        except Exception as error:
            text = redact(f"{type(error).__name__}: {error}", runtime_env)
            log.warning("the compile cache was not saved: %s", text)
            return
        seconds = time.perf_counter() - started
        text = "saved the compile cache: %.1f MB in %.2f s"
        if not ours:
            text = "the compile cache of %.1f MB was saved by another replica before, %.2f s"
        log.info(text, len(data) / 1e6, seconds, extra={"seconds": seconds})


@dataclass(frozen=True)
class _Made:
    """What an engine has made, or found: where, and of which factors, ours and vLLM's own."""

    root: Path
    factors: Mapping[str, str]
    vllm: Mapping[str, str]

    def described(self) -> str:
        return json.dumps({"ours": dict(self.factors), "vllm": dict(self.vllm)}, indent=1)


def factors_of(ctx: CallbackCtx) -> dict[str, str]:
    """Return what makes a cache another one, by name, with masked values."""
    config: Any = ctx.llm_config
    arguments = {**config.engine_kwargs, **ctx.extra_init_kwargs}
    device = getattr(config, "accelerator_type", None) or _cpu()
    return {
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "device": str(device),
        "model": str(config.model_id),
        "model path": str(config.get_engine_config().hf_model_id),
        **{
            f"engine argument {name}": shown(value, is_secret(name))
            for name, value in sorted(arguments.items())
            if name not in _HARMLESS
        },
    }


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return "none"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return f"{platform.machine()} {found[1]}"
    return platform.machine()


def _key_of(factors: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()[:32]


def _cache_folder(root: str) -> Path:
    """Return the folder that vLLM runs code from, which is made this user's alone."""
    from rayserve_hooks.download.safe_files import private_folder

    path = Path(root).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (path, path / _OWN):
        os.close(private_folder(folder, way_out="give another folder"))
    return path


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / _OWN / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_first(root: Path, start: str) -> bool:
    """Return whether no other process of this start has been here, on this node."""
    visits = root / _OWN / "starts"
    visits.mkdir(exist_ok=True, mode=0o700)
    try:
        (visits / start).touch(exist_ok=False)
    except FileExistsError:
        return False
    for old in sorted(visits.iterdir(), key=lambda path: path.stat().st_mtime)[:-_MOST_STARTS]:
        old.unlink()
    return True


def _files(root: Path, folder: str = "torch_compile_cache") -> Iterator[str]:
    for path in sorted((root / folder).rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(root).as_posix()


def _compiled(root: Path) -> set[str]:
    """Return the files that vLLM writes once it has compiled: those of each rank."""
    return {path for path in _files(root) if re.search(r"/rank_\d+_\d+/", path)}


def _mark_unread(root: Path, paths: Iterable[str]) -> None:
    """Set the times of access back: then the next one counts on a mount with ``relatime``, too."""
    probe = root / _OWN / "read"
    probe.write_text("x")
    for path in (*(root / path for path in paths), probe):
        os.utime(path, ns=(0, path.stat().st_mtime_ns))


def _was_read(root: Path, paths: Iterable[str]) -> bool:
    """Return whether any of the files was read since; True on a mount that does not tell."""
    probe = root / _OWN / "read"
    with contextlib.suppress(OSError):
        probe.read_text()
        if probe.stat().st_atime_ns == 0:
            return True
    return any((root / path).stat().st_atime_ns for path in paths)


def vllm_factors(root: Path, new: Iterable[str]) -> dict[str, str]:
    """Return what vLLM's own key is made of, as far as vLLM says so.

    Its variables are; the rest is in a file that some versions write beside what they compile.
    """
    from rayserve_hooks.cluster._vllm import compile_variables

    env = compile_variables()
    hashes: dict[str, str] = {}
    for path in new:
        if path.endswith("/cache_key_factors.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                content = json.loads((root / path).read_text())
                env = {**content.pop("env", {}), **env}
                hashes |= {name: shown(value) for name, value in content.items()}
    return {**{f"variable {key}": shown(env[key], is_secret(key)) for key in sorted(env)}, **hashes}


def _known(folder: Path) -> list[dict[str, str]]:
    """Return the factors of each archive that was restored or made on this node."""
    found = []
    for path in folder.glob(f"*{_FACTORS}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(
                {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
            )
    return found


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    return {
        name: f"{name} was {old.get(name, 'absent')} and is {new.get(name, 'absent')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _nearest(store: ObjectFolder, names: list[str], factors: Mapping[str, str]) -> str:
    """Return why the store has no archive of these factors, compared with the one most alike."""
    described = [name for name in names if name.endswith(_FACTORS)][:_MOST_COMPARED]
    others = [_differences(_factors(store, name)["ours"], factors) for name in described]
    if not others:
        return "the store holds no archive yet"
    texts = list(min(others, key=len).values())
    more = f"; and {len(texts) - _MOST_SHOWN} more" if len(texts) > _MOST_SHOWN else ""
    return f"the store holds no archive of this: {'; '.join(texts[:_MOST_SHOWN])}{more}"


def _factors(store: ObjectFolder, name: str) -> dict[str, dict[str, str]]:
    """Return what an archive is of; nobody has signed that, so it is only shown, in one line."""
    found: Any = {}
    with contextlib.suppress(DownloadError, ValueError):
        found = json.loads(store.read(name, _FACTORS_BYTES))
    parts = found if isinstance(found, dict) else {}
    return {
        part: {
            " ".join(redact(str(key)).split())[:100]: " ".join(redact(str(value)).split())[:200]
            for key, value in (parts[part] if isinstance(parts.get(part), dict) else {}).items()
        }
        for part in ("ours", "vllm")
    }


def _factor(text: str) -> str:
    """Return what a miss is due to, as one of a few words for a metric's label."""
    found = re.search(r"(vllm|torch|python|device|model path|model|engine argument) ?\S* was", text)
    if found:
        return found[1]
    return "first start" if "no archive yet" in text else "not restored"


def _count(ctx: CallbackCtx, result: str, why: Mapping[str, str]) -> None:
    with contextlib.suppress(ImportError):
        from ray.util.metrics import Counter

        replica = this_replica()
        keys = ("model_id", "deployment", "replica", "result", "factor")
        factor = next(iter(why), "")
        # Names of variables are vLLM's, of which there are some hundreds at most.
        tags = (ctx.llm_config.model_id, replica.deployment, replica.rank, result, factor)
        Counter(STARTS, "Starts by what the compile cache did for them.", keys).inc(
            tags=dict(zip(keys, tags, strict=True))
        )


def _check_secrets(
    root: Path, units: list[str], runtime_env: Mapping[str, Any], key: bytes
) -> None:
    known = {*secrets_among([dict(os.environ), dict(runtime_env)]), key.decode(errors="replace")}
    secrets = [secret.encode() for secret in known if len(secret) >= 6]
    for unit in units:
        for path in (root / unit).rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                if any(secret in data for secret in secrets):
                    raise ValueError(
                        f"{path.relative_to(root).as_posix()!r} holds a secret of this process's "
                        "environment; keep it out of the replica's variables"
                    )
