from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hub
import pytest
import s3
from plugins_for_tests import run_script

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import node_lock
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.errors import DownloadError

MODEL = "org/tiny"
FILES = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "tokenizer.json": "tokens",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "hello",
    "vocab.txt": "a b c",
    "model-1.safetensors": "weights 1",
    "sub/model-2.safetensors": "weights 2",
    "sub/tokenizer.model": "more tokens",
}
ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def files_in(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and ".rayserve_hooks" not in path.parts
    }


def partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def model_folder(cache: Path) -> Path:
    return cache / "models--org--tiny"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "store", FILES)


def download(source: Path, mode: NodeModelDownloadable = ALL) -> Path:
    path = download_node(MODEL, Mirror(source.as_uri()), mode)
    assert path is not None
    return Path(path)


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("MODEL_AND_TOKENIZER", set(FILES)),
        ("EXCLUDE_SAFETENSORS", {name for name in FILES if not name.endswith(".safetensors")}),
        (
            "TOKENIZER_ONLY",
            {
                "config.json",
                "generation_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "sub/tokenizer.model",
            },
        ),
    ],
)
def test_a_mode_selects_files(mode: str, names: set[str], cache: Path, source: Path) -> None:
    folder = download(source, NodeModelDownloadable[mode])
    assert files_in(folder) == {name: FILES[name] for name in names}


def test_the_folder_has_the_layout_of_the_hugging_face_cache(
    model_folder: Path, source: Path
) -> None:
    folder = download(source)
    assert folder.parent == model_folder / "snapshots"
    assert re.fullmatch(r"[0-9a-f]{40}", folder.name)
    assert (model_folder / "refs" / "main").read_text() == folder.name


def test_the_object_hash_names_the_snapshot(model_folder: Path, source: Path) -> None:
    write(source, {"hash": "abc123\n"})
    folder = download(source)
    assert folder == model_folder / "snapshots" / "abc123"
    assert (model_folder / "refs" / "main").read_text() == "abc123"
    assert files_in(folder) == FILES


def test_a_file_named_hash_deeper_down_is_an_ordinary_one(cache: Path, source: Path) -> None:
    write(source, {"sub/hash": "data"})
    assert files_in(download(source)) == {**FILES, "sub/hash": "data"}


def test_nothing_is_downloaded_in_mode_none(cache: Path, source: Path) -> None:
    mirror = Mirror(source.as_uri())
    assert download_node(MODEL, mirror, NodeModelDownloadable.NONE) is None
    assert not cache.exists()


def test_nothing_is_downloaded_without_a_mirror(cache: Path) -> None:
    assert download_node(MODEL, None, ALL) is None
    assert not cache.exists()


def test_a_second_call_fetches_nothing(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = download(source)
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert download(source) == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == before
    assert f"{len(FILES)} files, 0 to fetch" in caplog.text


def test_a_file_whose_time_has_changed_is_read_and_kept(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = download(source)
    for name in FILES:
        os.utime(folder / name, (1, 1))
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        download(source)
    assert f"{len(FILES)} files, 0 to fetch" in caplog.text
    assert {(folder / name).stat().st_mtime for name in FILES} == {1}


def test_a_wider_mode_fetches_the_rest(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    download(source, NodeModelDownloadable.EXCLUDE_SAFETENSORS)
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        folder = download(source)
    assert files_in(folder) == FILES
    assert f"{len(FILES)} files, 2 to fetch" in caplog.text


@pytest.mark.parametrize("damage", ["", "weigh", "weights 1 and more", "Weights 1"])
def test_a_damaged_file_is_fetched_again(damage: str, cache: Path, source: Path) -> None:
    folder = download(source)
    (folder / "model-1.safetensors").write_text(damage)
    assert files_in(download(source)) == FILES


def test_a_new_revision_gets_its_own_snapshot(model_folder: Path, source: Path) -> None:
    write(source, {"hash": "one"})
    first = download(source)
    write(source, {"hash": "two", "config.json": '{"new": 1}'})
    second = download(source)
    assert (first / "config.json").read_text() == "{}"
    assert (second / "config.json").read_text() == '{"new": 1}'
    assert (model_folder / "refs" / "main").read_text() == "two"


def test_a_name_with_blanks_and_accents_is_kept(cache: Path, source: Path) -> None:
    write(source, {"très gros 100%.bin": "x"})
    assert (download(source) / "très gros 100%.bin").read_text() == "x"


def block(model_folder: Path, name: str, revision: str = "one") -> Path:
    """Put somebody's file into a folder where a file belongs, so that writing it fails."""
    return write(model_folder / "snapshots" / revision / name, {"mine.txt": "mine"})


def test_a_failure_leaves_no_refs_and_no_partial_files(model_folder: Path, source: Path) -> None:
    write(source, {"hash": "one"})
    block(model_folder, "model-1.safetensors")
    with pytest.raises(
        DownloadError, match=r"^cannot write .*model-1\.safetensors': a folder of that"
    ):
        download(source)
    assert not (model_folder / "refs" / "main").exists()
    assert partial_files(model_folder) == []


def test_refs_main_is_written_last(model_folder: Path, source: Path) -> None:
    folder = download(source)
    last_file = max((folder / name).stat().st_mtime_ns for name in FILES)
    assert (model_folder / "refs" / "main").stat().st_mtime_ns >= last_file


def test_a_download_that_failed_can_be_repeated(model_folder: Path, source: Path) -> None:
    write(source, {"hash": "one"})
    blocked = block(model_folder, "model-1.safetensors")
    with pytest.raises(DownloadError):
        download(source)
    (blocked / "mine.txt").unlink()
    assert files_in(download(source)) == FILES
    assert (model_folder / "refs" / "main").read_text() == "one"


def test_a_failed_update_leaves_the_old_revision_in_place(model_folder: Path, source: Path) -> None:
    write(source, {"hash": "one"})
    download(source)
    write(source, {"hash": "two"})
    block(model_folder, "config.json", "two")
    with pytest.raises(DownloadError, match=r"^cannot write "):
        download(source)
    assert (model_folder / "refs" / "main").read_text() == "one"


def test_an_empty_source(model_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    text = f"{empty.as_uri()} holds no object; check bucket and path"
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        download(empty)
    assert not (model_folder / "refs").exists()


def test_a_source_that_cannot_be_opened(cache: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(DownloadError, match=f"^{re.escape(f'cannot open {absent.as_uri()}: ')}"):
        download(absent)


def test_a_source_of_an_unknown_kind(cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"^cannot open nope://bucket/model: "):
        download_node(MODEL, Mirror("nope://bucket/model"), ALL)


def test_no_file_that_the_mode_selects(model_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "store", {"model.safetensors": "w", "README.md": "r"})
    text = (
        f"{source.as_uri()} has 2 objects, none of which TOKENIZER_ONLY selects; "
        "check the path and the download mode"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        download(source, NodeModelDownloadable.TOKENIZER_ONLY)
    assert not (model_folder / "refs").exists()


@pytest.mark.parametrize("revision", ["../evil", "a/b", "/tmp", ".", "..", ""])
def test_a_hash_that_cannot_name_a_folder(revision: str, model_folder: Path, source: Path) -> None:
    write(source, {"hash": revision})
    text = (
        f"the object 'hash' of {source.as_uri()} holds {revision!r}, which cannot name a folder; "
        "store the revision there, or delete it"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        download(source)
    assert not (model_folder / "refs").exists()


def test_a_hash_that_is_no_text(cache: Path, source: Path) -> None:
    (source / "hash").write_bytes(b"\xff\xfe")
    with pytest.raises(DownloadError, match=re.escape("the object 'hash' of ")):
        download(source)


@pytest.mark.parametrize("mode", list(NodeModelDownloadable))
def test_extra_files_are_fetched_in_every_mode(
    mode: NodeModelDownloadable, cache: Path, source: Path, tmp_path: Path
) -> None:
    extra = write(tmp_path / "extra", {"a.txt": "a", "deep/b.txt": "b"})
    mirror = Mirror(source.as_uri(), ((extra.as_uri(), str(tmp_path / "target")),))
    download_node(MODEL, mirror, mode)
    assert files_in(tmp_path / "target") == {"a.txt": "a", "deep/b.txt": "b"}


def test_extra_files_need_no_bucket(cache: Path, tmp_path: Path) -> None:
    extra = write(tmp_path / "extra", {"a.txt": "a"})
    mirror = Mirror(None, ((extra.as_uri(), str(tmp_path / "target")),))
    assert download_node(MODEL, mirror, ALL) is None
    assert files_in(tmp_path / "target") == {"a.txt": "a"}


@pytest.mark.parametrize(
    "destination", ["~/adapters", "$ADAPTERS/adapters", "${ADAPTERS}/adapters"]
)
def test_a_destination_is_expanded(
    destination: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ADAPTERS", str(tmp_path / "home"))
    extra = write(tmp_path / "extra", {"a.txt": "a"})
    download_node(MODEL, Mirror(None, ((extra.as_uri(), destination),)), ALL)
    assert files_in(tmp_path / "home" / "adapters") == {"a.txt": "a"}


def test_a_failing_extra_file_keeps_the_model_from_being_marked_as_complete(
    model_folder: Path, source: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    mirror = Mirror(source.as_uri(), ((empty.as_uri(), str(tmp_path / "target")),))
    with pytest.raises(DownloadError, match="holds no object"):
        download_node(MODEL, mirror, ALL)
    assert not (model_folder / "refs").exists()


def test_a_destination_that_cannot_be_made(tmp_path: Path) -> None:
    extra = write(tmp_path / "extra", {"a.txt": "a"})
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"^cannot write '.*/file': NotADirectoryError: "):
        download_node(MODEL, Mirror(None, ((extra.as_uri(), str(tmp_path / "file")),)), ALL)


def test_extra_files_of_two_sources_may_share_a_folder(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.txt": "a"})
    two = write(tmp_path / "two", {"b.txt": "b", ".rayserve_hooks/x": "uploaded by mistake"})
    target = write(tmp_path / "target", {"mine.txt": "mine"})
    pairs = tuple((source.as_uri(), str(target)) for source in (one, two))
    for _ in range(2):
        download_node(MODEL, Mirror(None, pairs), ALL)
    assert files_in(target) == {"a.txt": "a", "b.txt": "b", "mine.txt": "mine"}


def test_a_change_of_the_source_is_seen(cache: Path, source: Path) -> None:
    download(source)
    write(source, {"config.json": "[]"})
    assert files_in(download(source)) == {**FILES, "config.json": "[]"}


def test_a_file_that_was_never_the_store_s_is_left_alone(cache: Path, source: Path) -> None:
    folder = write(download(source), {"mine.txt": "mine"})
    (source / "vocab.txt").unlink()
    left = {name: text for name, text in FILES.items() if name != "vocab.txt"}
    assert files_in(download(source)) == {**left, "mine.txt": "mine"}
    assert files_in(folder) == {**FILES, "mine.txt": "mine"}


def test_what_one_mode_has_fetched_serves_the_others(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = download(source)
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert download(source, NodeModelDownloadable.TOKENIZER_ONLY) == folder
    assert "6 files, 0 to fetch" in caplog.text
    assert files_in(folder) == FILES


def test_another_source_does_not_trust_the_manifest(
    cache: Path, source: Path, tmp_path: Path
) -> None:
    download(source)
    other = write(tmp_path / "other", {**FILES, "vocab.txt": "C B A"})
    assert files_in(download(other))["vocab.txt"] == "C B A"


@pytest.mark.parametrize(("label", "shown"), [("app/model", "app/model"), ("", MODEL)])
def test_the_lock_names_for_whom_the_model_is(
    label: str, shown: str, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purposes: list[str] = []
    write_owner = node_lock._LockFile.write_owner

    def written(lock: node_lock._LockFile, purpose: str) -> None:
        purposes.append(purpose)
        write_owner(lock, purpose)

    monkeypatch.setattr(node_lock._LockFile, "write_owner", written)
    download_node(MODEL, Mirror(source.as_uri()), ALL, caller=Caller(label=label))
    assert purposes == [
        f"{shown}, MODEL_AND_TOKENIZER of {source.as_uri()}",
        f"files of {source.as_uri()}",
    ]


def test_the_logger_is_the_caller_s(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caller = Caller(logger=logging.getLogger("mine"))
    with caplog.at_level(logging.INFO):
        download_node(MODEL, Mirror(source.as_uri()), ALL, caller=caller)
    assert [record.name for record in caplog.records] == ["mine", "mine"]


class TestOnS3:
    @pytest.fixture
    def server(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> Iterator[s3.Server]:
        write(tmp_path / "buckets" / "bucket" / "model", {**FILES, "hash": "one"})
        with s3.serving(tmp_path / "buckets") as running:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.url)
            yield running

    def get(self) -> Path:
        path = download_node(MODEL, Mirror("s3://bucket/model"), ALL)
        assert path is not None
        return Path(path)

    def test_asking_again_costs_one_listing(self, server: s3.Server, model_folder: Path) -> None:
        self.get()
        server.forget()
        self.get()
        assert server.requests == ["LIST model/"]

    def test_the_manifest_says_what_was_verified(
        self, server: s3.Server, model_folder: Path
    ) -> None:
        folder = self.get()
        state = model_folder / ".rayserve_hooks"
        manifest = json.loads((state / "revisions" / "one.json").read_text())
        files = manifest.pop("files")
        assert manifest == {
            "uri": "s3://bucket/model",
            "source": hashlib.sha256(b"s3://bucket/model").hexdigest()[:32],
            "revision": "one",
            "revision_version": '"f97c5d29941bfb1b2fdab0874906ab82"',
            "verified": "checksum",
        }
        assert {file["path"] for file in files} == set(FILES)
        assert files[2] == {
            "path": "generation_config.json",
            "size": 2,
            "version": '"99914b932bd37a50b983c5e7c90ae93b"',
            "mtime_ns": (folder / "generation_config.json").stat().st_mtime_ns,
            "checksum": "md5:99914b932bd37a50b983c5e7c90ae93b",
            "verified": "checksum",
        }

    @pytest.mark.parametrize("damage", ["weights 2!", "Weights 2", None])
    def test_one_damaged_file_is_fetched_alone(self, damage: str | None, server: s3.Server) -> None:
        folder = self.get()
        if damage is None:
            (folder / "sub" / "model-2.safetensors").unlink()
        else:
            write(folder, {"sub/model-2.safetensors": damage})
        server.forget()
        assert files_in(self.get()) == FILES
        assert server.requests == ["LIST model/", "GET bucket/model/sub/model-2.safetensors"]

    def test_a_new_revision_takes_over_what_has_not_changed(self, server: s3.Server) -> None:
        first = self.get()
        source = server.root / "bucket" / "model"
        write(source, {"hash": "two", "vocab.txt": "new"})
        server.forget()
        second = self.get()
        assert second.name == "two"
        assert files_in(second) == {**FILES, "vocab.txt": "new"}
        assert files_in(first) == FILES
        assert server.requests == [
            "LIST model/",
            "GET bucket/model/hash",
            "GET bucket/model/vocab.txt",
        ]

    def test_files_without_a_manifest_are_kept_if_they_can_be_verified(
        self, server: s3.Server, model_folder: Path
    ) -> None:
        folder = self.get()
        subprocess.run(["rm", "-r", str(model_folder / ".rayserve_hooks")], check=True)
        write(folder, {"vocab.txt": "A B C"})
        server.forget()
        assert files_in(self.get()) == FILES
        assert server.requests[1:] == ["GET bucket/model/hash", "GET bucket/model/vocab.txt"]

    def test_files_without_a_manifest_or_checksum_are_fetched(
        self, server: s3.Server, model_folder: Path
    ) -> None:
        server.etags = "opaque"
        self.get()
        subprocess.run(["rm", "-r", str(model_folder / ".rayserve_hooks")], check=True)
        server.forget()
        self.get()
        assert server.count("GET") == len(FILES) + 1

    def test_the_anonymous_form(self, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        server.etags, server.crc64 = "multipart", True
        path = download_node(MODEL, Mirror("s3://anonymous@bucket/model"), ALL)
        assert path is not None
        assert files_in(Path(path)) == FILES
        assert server.count("HEAD") == len(FILES)


@pytest.mark.slow
class TestHub:
    """In processes of their own: huggingface_hub reads its variables when it is imported."""

    @pytest.fixture
    def server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
        write(tmp_path / "hub" / MODEL, FILES)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_TOKEN", "SECRET")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with hub.serving(tmp_path / "hub") as running:
            monkeypatch.setenv("HF_ENDPOINT", running.url)
            yield running

    @staticmethod
    def fetch(model: str = MODEL, mode: NodeModelDownloadable = ALL) -> str:
        """Return the path of the snapshot, or the text of the error."""
        return run_script(f"""
            from rayserve_hooks.context import NodeModelDownloadable
            from rayserve_hooks.download.model import download_node
            from rayserve_hooks.errors import DownloadError
            try:
                mode = NodeModelDownloadable.{mode.name}
                print(download_node("{model}", None, mode, from_hub=True))
            except DownloadError as error:
                print(error)
        """)

    @pytest.mark.parametrize(
        "mode", [mode for mode in NodeModelDownloadable if mode.name != "NONE"]
    )
    def test_a_mode_selects_the_files_that_it_does_in_a_mirror(
        self, mode: NodeModelDownloadable, server: hub.Hub, source: Path, cache: Path
    ) -> None:
        snapshot = Path(self.fetch(mode=mode))
        assert snapshot.parts[-3:] == ("models--org--tiny", "snapshots", hub.COMMIT)
        assert files_in(snapshot) == files_in(download(source, mode))

    def test_what_is_there_is_not_fetched_again(self, server: hub.Hub) -> None:
        snapshot = self.fetch()
        server.requests.clear()
        assert self.fetch() == snapshot
        assert server.requests
        assert not [request for request in server.requests if "/resolve/" in request]

    def test_it_is_left_to_the_engine_unless_asked_for(
        self, server: hub.Hub, tmp_path: Path
    ) -> None:
        assert download_node(MODEL, None, ALL) is None
        assert self.fetch(mode=NodeModelDownloadable.NONE) == "None"
        assert self.fetch(str(tmp_path)) == "None"
        assert server.requests == []

    def test_what_it_answers_is_told(self, server: hub.Hub) -> None:
        check = "check the id, HF_TOKEN and whether the token may read the model"
        assert self.fetch("org/other") == (
            f"cannot fetch 'org/other' from the Hugging Face Hub: Repository not found; {check}"
        )
        server.token = "another"
        assert self.fetch() == (
            f"cannot fetch 'org/tiny' from the Hugging Face Hub: Invalid username or password; "
            f"{check}"
        )

    def test_the_token_is_sent(self, server: hub.Hub) -> None:
        server.token = "SECRET"
        assert files_in(Path(self.fetch())) == FILES

    def test_a_hub_that_cannot_be_reached(
        self, server: hub.Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pattern = (
            r"cannot fetch 'org/tiny' from the Hugging Face Hub: .*LocalEntryNotFoundError: .*; "
            "check the id, HF_ENDPOINT and the network"
        )
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        assert re.fullmatch(pattern, self.fetch(), re.DOTALL)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert re.fullmatch(pattern, self.fetch(), re.DOTALL)


def test_importing_it_is_light() -> None:
    script = """
        import sys
        import rayserve_hooks.download.model
        heavy = {"awscrt", "boto3", "botocore", "huggingface_hub", "obstore", "ray", "torch"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert run_script(script).strip() == "[]"


def test_a_download_imports_no_ray(source: Path, tmp_path: Path) -> None:
    script = f"""
        import os, sys
        os.environ["HF_HOME"] = {str(tmp_path / "home")!r}
        from rayserve_hooks.context import NodeModelDownloadable
        from rayserve_hooks.download.model import Mirror, download_node
        download_node("org/tiny", Mirror({source.as_uri()!r}), NodeModelDownloadable["{ALL.name}"])
        print("ray" in sys.modules)
    """
    assert run_script(script).strip() == "False"
    assert (tmp_path / "home" / "hub" / "models--org--tiny" / "refs" / "main").exists()
