import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rayserve_hooks.download import partials
from rayserve_hooks.download.stores import RemoteFile
from rayserve_hooks.errors import DownloadError

RANGE = 64
CONTENT = bytes(range(1, 151))


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
    assert list(partial.missing(RANGE)) == [(0, 64), (64, 128), (128, 150)]
    assert partial.target == str(tmp_path / "snapshot" / "sub" / "weights")
    assert Path(partial.path).parent == tmp_path / "state"


@pytest.mark.parametrize(
    ("todo", "length"), [(0, 8), (64, 8), (256, 16), (257, 17), (512, 32), (10**6, 32)]
)
def test_ranges_are_long_but_keep_all_streams_busy(
    todo: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partials, "RANGE_BYTES", 32)
    monkeypatch.setattr(partials, "_LEAST_RANGE_BYTES", 8)
    assert partials.range_length(todo, streams=16) == length


def test_an_empty_file_has_no_range(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote(size=0))
    assert list(partial.missing(RANGE)) == []


def test_the_ranges_of_an_absurd_size_are_no_list(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote(size=10**15))
    assert next(partial.missing(RANGE)) == (0, 64)


def test_the_smallest_file_comes_first(tmp_path: Path) -> None:
    found = planned(tmp_path, remote("large", 9), remote("small", 1))
    assert [partial.file.path for partial in found] == ["small", "large"]


def written(tmp_path: Path, *offsets: int, length: int = 10) -> partials.PartialFile:
    """Write some segments of a file, as a run does that is killed then."""
    (partial,) = planned(tmp_path, remote())
    partial.open()
    for offset in offsets:
        partial.write(offset, memoryview(CONTENT)[offset : offset + length])
    partial.close()
    return partial


def test_what_is_written_is_not_missing_later(tmp_path: Path) -> None:
    written(tmp_path, 64, 74, 140)
    (again,) = planned(tmp_path, remote())
    assert list(again.missing(RANGE)) == [(0, 64), (84, 140)]
    assert again.done_bytes == 30
    assert Path(again.path).read_bytes()[64:84] == CONTENT[64:84]


def test_of_many_segments_few_are_remembered(tmp_path: Path) -> None:
    partial = written(tmp_path, 0, 10, 20, 30, 100, 40)
    crc = partials.segment_crc()[1]
    assert partial.done == [
        (0, 50, crc(memoryview(CONTENT)[:50], 0)),
        (100, 110, crc(memoryview(CONTENT)[100:110], 0)),
    ]
    (again,) = planned(tmp_path, remote())
    assert again.done == partial.done


def test_a_third_run_knows_what_two_have_written(tmp_path: Path) -> None:
    written(tmp_path, 30)
    (second,) = planned(tmp_path, remote())
    second.open()
    second.write(0, memoryview(CONTENT)[:30])
    second.close()
    (third,) = planned(tmp_path, remote())
    assert list(third.missing(RANGE)) == [(40, 104), (104, 150)]


@pytest.mark.parametrize("other", [remote(version="2"), remote(size=151)])
def test_another_version_starts_anew_and_removes_the_old(other: RemoteFile, tmp_path: Path) -> None:
    written(tmp_path, 0)
    (partial,) = planned(tmp_path, other)
    assert len(list(partial.missing(RANGE))) == 3
    assert list((tmp_path / "state").iterdir()) == []


def test_what_no_listing_has_any_more_is_removed(tmp_path: Path) -> None:
    written(tmp_path, 0)
    (tmp_path / "state" / "not-ours.partial").touch()
    partials.remove_stale([remote()], tmp_path / "state")
    assert len(list((tmp_path / "state").iterdir())) == 3
    partials.remove_stale([remote(version="2")], tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["not-ours.partial"]


def test_a_discarded_file_leaves_nothing(tmp_path: Path) -> None:
    partial = written(tmp_path, 0)
    partial.discard()
    assert len(list(partial.missing(RANGE))) == 3
    assert list((tmp_path / "state").iterdir()) == []


def truncate(path: Path) -> None:
    os.truncate(path, 64)


def zero(path: Path) -> None:
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def punch(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[70] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (truncate, [(10, 74), (74, 138), (138, 150)]),
        (zero, [(0, 64), (64, 128), (128, 150)]),
        (punch, [(0, 64), (64, 128), (128, 150)]),
        (flip, [(10, 74), (74, 138), (138, 140)]),
        (Path.unlink, [(0, 64), (64, 128), (128, 150)]),
    ],
)
def test_what_the_disk_has_lost_is_fetched_again(
    damage: Callable[[Path], None], missing: list[partials.Span], tmp_path: Path
) -> None:
    damage(Path(written(tmp_path, 0, 64, 140).path))
    (again,) = planned(tmp_path, remote())
    assert list(again.missing(RANGE)) == missing
    again.open()
    again.close()


def test_a_file_that_is_too_long_is_cut(tmp_path: Path) -> None:
    partial = written(tmp_path, 0)
    with Path(partial.path).open("ab") as file:
        file.write(b"x" * 500)
    planned(tmp_path, remote())
    assert Path(partial.path).stat().st_size == 150


LINE = b"0 10 %x\n" % partials.segment_crc()[1](memoryview(CONTENT)[:10], 0)


@pytest.mark.parametrize(
    ("journal", "done"),
    [
        (LINE + LINE, 10),
        (b"\xff\xfe\n" + LINE + b"64 74 1", 10),
        (LINE.rstrip(), 10),
        (b"0 10 ffffffffffffffff\n" + LINE, 10),
        (LINE + b"-5 3 1\n5 3 0\n0 0 0\n", 10),
        (LINE + b"10 99999999999999999999 1\n10 9999999999999999999 1\n", 10),
        (b"0 10\n", 0),
        (b"[" * 1000, 0),
        (b"", 0),
    ],
)
def test_a_damaged_journal_costs_what_it_does_not_prove(
    journal: bytes, done: int, tmp_path: Path
) -> None:
    partial = written(tmp_path, 0)
    Path(partial.journal).write_bytes(journal)
    (again,) = planned(tmp_path, remote())
    assert again.done_bytes == done
    again.open()
    again.close()


@pytest.mark.parametrize("which", ["path", "journal"])
@pytest.mark.parametrize("kind", ["folder", "full folder", "fifo", "link", "hard link"])
def test_what_is_in_the_place_of_a_file_is_moved_away_and_never_written(
    which: str, kind: str, tmp_path: Path
) -> None:
    partial = written(tmp_path, 0)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = Path(getattr(partial, which))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, path)
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "file").touch()
    (again,) = planned(tmp_path, remote())
    again.open()
    again.write(0, memoryview(CONTENT)[:10])
    again.close()
    assert Path(again.path).read_bytes() == CONTENT[:10]
    assert victim.read_text() == "precious"
    assert victim.stat().st_nlink == 1


def test_a_link_that_is_planted_later_is_an_error_in_words(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    Path(partial.path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DownloadError, match="a symbolic link"):
        partial.write_whole(bytearray(b"x"))
    with pytest.raises(FileExistsError):
        partial.open()
    assert not (tmp_path / "elsewhere").exists()


def test_a_small_file_is_written_whole(tmp_path: Path) -> None:
    (partial,) = planned(tmp_path, remote())
    Path(partial.path).write_bytes(b"what a killed run has left")
    partial.write_whole(memoryview(b"new"))
    assert Path(partial.path).read_bytes() == b"new"
