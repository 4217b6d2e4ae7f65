from pathlib import Path

import pytest

from rayserve_hooks.download import partials
from rayserve_hooks.download.stores import RemoteFile

RANGE = 64


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "RANGE_BYTES", RANGE)


def remote(path: str = "sub/weights", size: int = 150, version: str = "1") -> RemoteFile:
    return RemoteFile(path, size, None, version)


def planned(tmp_path: Path, *files: RemoteFile) -> list[partials.PartialFile]:
    (tmp_path / "state").mkdir(exist_ok=True)
    return partials.plan(list(files), tmp_path / "snapshot", tmp_path / "state")


def test_a_file_is_planned_in_ranges(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    assert partial.missing == [(0, 64), (64, 128), (128, 150)]
    assert partial.target == str(tmp_path / "snapshot" / "sub" / "weights")
    assert Path(partial.path).parent == tmp_path / "state"


def test_an_empty_file_has_one_range(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote(size=0))
    assert partial.missing == [(0, 0)]


def test_the_smallest_file_comes_first(tmp_path: Path) -> None:
    found = planned(tmp_path, remote("large", 9), remote("small", 1))
    assert [partial.file.path for partial in found] == ["small", "large"]


def test_what_is_written_is_not_missing_later(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    partial.open()
    partial.write(64, memoryview(b"x" * 64))
    partial.finish_span((64, 128))
    partial.close()
    (again,) = planned(tmp_path, remote())
    assert again.missing == [(0, 64), (128, 150)]
    assert Path(again.path).read_bytes()[64:] == b"x" * 64


def test_another_version_starts_anew_and_removes_the_old(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    partial.open()
    partial.finish_span((0, 64))
    partial.close()
    (other,) = planned(tmp_path, remote(version="2"))
    assert len(other.missing) == 3
    assert list((tmp_path / "state").iterdir()) == []


def test_a_discarded_file_leaves_nothing(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    partial.open()
    partial.finish_span((0, 64))
    partial.discard()
    assert len(partial.missing) == 3
    assert list((tmp_path / "state").iterdir()) == []


def test_a_small_file_is_written_whole(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    Path(partial.path).write_bytes(b"what a killed run has left")
    partial.write_whole(memoryview(b"new"))
    assert Path(partial.path).read_bytes() == b"new"


def test_a_journal_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.write_text("0 64\n64 128\n128 19")
    assert partials.read_journal(journal) == {(0, 64), (64, 128)}
