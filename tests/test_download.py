import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugins_for_tests import hook_log

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import Mirror, _replace, download_node
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
DEFAULT_REVISION = "0" * 40
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
        if path.is_file()
    }


def partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


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
    assert folder == model_folder / "snapshots" / DEFAULT_REVISION
    assert (model_folder / "refs" / "main").read_text() == DEFAULT_REVISION


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
    for name in FILES:
        os.utime(folder / name, (1, 1))
    with hook_log(caplog):
        assert download(source) == folder
    assert {(folder / name).stat().st_mtime for name in FILES} == {1}
    assert f"{len(FILES)} files, 0 to fetch" in caplog.text


def test_a_wider_mode_fetches_the_rest(
    cache: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    download(source, NodeModelDownloadable.EXCLUDE_SAFETENSORS)
    with hook_log(caplog):
        folder = download(source)
    assert files_in(folder) == FILES
    assert f"{len(FILES)} files, 2 to fetch" in caplog.text


@pytest.mark.parametrize("damage", ["", "weigh", "weights 1 and more"])
def test_a_file_of_another_size_is_fetched_again(damage: str, cache: Path, source: Path) -> None:
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


def block(model_folder: Path, name: str, revision: str = DEFAULT_REVISION) -> None:
    """Put a folder where a file belongs, so that writing it fails."""
    (model_folder / "snapshots" / revision / name).mkdir(parents=True)


def test_a_failure_leaves_no_refs_and_no_partial_files(model_folder: Path, source: Path) -> None:
    block(model_folder, "model-1.safetensors")
    with pytest.raises(DownloadError, match=r"^cannot write .*model-1\.safetensors: IsADirectory"):
        download(source)
    assert not (model_folder / "refs" / "main").exists()
    assert partial_files(model_folder) == []


def test_refs_main_is_written_last(model_folder: Path, source: Path) -> None:
    folder = download(source)
    last_file = max((folder / name).stat().st_mtime_ns for name in FILES)
    assert (model_folder / "refs" / "main").stat().st_mtime_ns >= last_file


def test_a_download_that_failed_can_be_repeated(model_folder: Path, source: Path) -> None:
    block(model_folder, "model-1.safetensors")
    with pytest.raises(DownloadError):
        download(source)
    (model_folder / "snapshots" / DEFAULT_REVISION / "model-1.safetensors").rmdir()
    assert files_in(download(source)) == FILES
    assert (model_folder / "refs" / "main").read_text() == DEFAULT_REVISION


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
    with pytest.raises(DownloadError, match=r"^cannot make the folder .*file: FileExistsError: "):
        download_node(MODEL, Mirror(None, ((extra.as_uri(), str(tmp_path / "file")),)), ALL)


def test_a_file_that_ends_early_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    text = "'model.bin' ended after 2 of 3 bytes; the store or the network cut it off, try again"
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        _replace(tmp_path / "model.bin", [b"ab"], 3)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_ends_early_keeps_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    with pytest.raises(DownloadError, match="ended after 2 of 3 bytes"):
        _replace(target, [b"ab"], 3)
    assert target.read_bytes() == b"old"


def test_two_replicas_that_write_one_file_at_once_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "extra.bin"

    def chunks() -> Iterator[bytes]:
        yield b"first "
        _replace(target, [b"second second"], 13)
        yield b"writer!"

    _replace(target, chunks(), 13)
    assert target.read_bytes() == b"first writer!"
    assert partial_files(tmp_path) == []
