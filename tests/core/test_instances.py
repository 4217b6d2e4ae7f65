import gzip
import io
import pickle
import re
import socket
import threading
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from obstore.store import S3Store
from plugins_for_tests import run_script

from rayserve_hooks.core import instances


class Holds:
    """A callback's instance with one attribute."""

    def __init__(self, held: Any) -> None:
        self.held = held


def sent(held: Any) -> Any:
    copy = pickle.loads(instances.dumps(Holds(held)))
    assert isinstance(copy, Holds)
    return copy.held


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.txt"
    path.write_text("first\nsecond\n")
    return path


def test_plain_data_travels() -> None:
    assert sent({"a": [1, 2]}) == {"a": [1, 2]}


def test_a_class_of_this_process_alone_travels() -> None:
    class Local:
        size = 3

    assert sent(Local()).size == 3


@pytest.mark.parametrize("make", [threading.Lock, threading.RLock])
def test_a_lock_arrives_as_a_new_one_that_nobody_holds(make: Any) -> None:
    lock = make()
    with lock:
        copy = sent(lock)
    assert type(copy) is type(lock)
    assert copy.acquire(blocking=False)


def test_a_lock_travels_below_an_attribute() -> None:
    copy = sent({"locks": [threading.Lock()]})
    assert copy["locks"][0].acquire(blocking=False)


def test_a_condition_travels_with_its_lock() -> None:
    copy = sent(threading.Condition())
    with copy:
        copy.notify_all()


def test_a_file_is_read_on_from_the_same_position(file: Path) -> None:
    with file.open() as opened:
        opened.readline()
        with sent(opened) as copy:
            assert copy.read() == "second\n"
        assert opened.read() == "second\n"


def test_a_file_is_found_again_from_another_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(file.parent)
    with Path(file.name).open() as opened:
        data = instances.dumps(Holds(opened))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pickle.loads(data).held as copy:
        assert copy.readline() == "first\n"


def test_a_binary_file_is_read_on(file: Path) -> None:
    with file.open("rb") as opened:
        opened.seek(6)
        with sent(opened) as copy:
            assert copy.read() == b"second\n"


def test_a_file_keeps_its_encoding(tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes("é".encode("latin-1"))
    with path.open(encoding="latin-1") as opened, sent(opened) as copy:
        assert copy.read() == "é"


@pytest.mark.parametrize("mode", ["w", "a", "wb", "w+"])
def test_a_file_for_writing_is_not_emptied_and_goes_on_at_its_end(file: Path, mode: str) -> None:
    with file.open(mode) as opened:
        opened.write(b"mine\n" if "b" in mode else "mine\n")
        opened.flush()
        written = file.read_text()
        with sent(opened) as copy:
            copy.write(b"other\n" if "b" in mode else "other\n")
    assert file.read_text() == f"{written}other\n"


def test_a_file_that_was_made_new_is_there_already(tmp_path: Path) -> None:
    with (tmp_path / "new").open("x") as opened, sent(opened) as copy:
        copy.write("other")
    assert (tmp_path / "new").read_text() == "other"


def test_the_output_stream_is_that_of_the_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # In a process of its own: pytest replaces this one's stream.
    script = """
        import pickle, sys
        from rayserve_hooks.core import instances

        print(pickle.loads(instances.dumps([sys.stdout]))[0] is sys.stdout)
    """
    assert run_script(script) == "True"
    assert not list(tmp_path.iterdir())


def test_text_in_memory_travels_as_it_is() -> None:
    assert sent(io.StringIO("text")).getvalue() == "text"


def refused(attribute: str, kind: str) -> Any:
    return pytest.raises(
        TypeError, match=f"^its attribute {re.escape(repr(attribute))}, a {kind}, cannot: "
    )


def test_a_client_that_was_passed_in_cannot_travel_and_the_attribute_is_named() -> None:
    with socket.socket() as client, refused("held", "socket") as caught:
        instances.dumps(Holds(client))
    assert str(caught.value).endswith(
        "cannot: cannot pickle 'socket' object; and it cannot be made again there: argument "
        "'held' of Holds() is not kept in an attribute of that name that can travel"
    )
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_client_below_an_attribute_is_found() -> None:
    with socket.socket() as client, refused("held", "dict"):
        instances.dumps(Holds({"clients": [client]}))


class HasClient:
    """A callback's instance that opens a client in its constructor."""

    def __init__(self, bucket: str, *, timeout_s: int = 5) -> None:
        self.bucket = bucket
        self._timeout_s = timeout_s
        self.lock = threading.Lock()
        self.seen: list[str] = []
        self.client = httpx.Client(base_url=f"http://{bucket}.test", timeout=timeout_s)


def test_a_client_that_the_constructor_opened_is_opened_again() -> None:
    instance = HasClient("weights", timeout_s=30)
    with pytest.raises(TypeError, match=r"^cannot pickle"):
        pickle.dumps(instance.client)
    copy = pickle.loads(instances.dumps(instance))
    assert isinstance(copy.client, httpx.Client)
    assert copy.client.base_url == "http://weights.test"
    assert copy.client.timeout == httpx.Timeout(30)


def test_what_the_instance_holds_beside_its_client_travels() -> None:
    instance = HasClient("weights")
    instance.seen.append("a")
    copy = pickle.loads(instances.dumps(instance))
    assert copy.seen == ["a"]
    assert copy.lock.acquire(blocking=False)


def test_a_boto3_client_is_opened_again() -> None:
    class Mirror:
        def __init__(self) -> None:
            self.s3 = boto3.client("s3", region_name="eu-central-1")

    copy = pickle.loads(instances.dumps(Mirror()))
    assert copy.s3.meta.region_name == "eu-central-1"


def test_a_client_that_travels_by_itself_is_not_opened_again() -> None:
    store = S3Store("bucket", region="us-east-1", skip_signature=True)
    assert sent(store) == store


def not_made_again(why: str) -> Any:
    return pytest.raises(TypeError, match=f"; and it cannot be made again there: {re.escape(why)}$")


def test_an_argument_that_was_not_kept_is_named_even_with_a_default() -> None:
    class Forgets:
        def __init__(self, timeout_s: int = 5) -> None:
            self.client = httpx.Client(timeout=timeout_s)

    with not_made_again(
        "argument 'timeout_s' of Forgets() is not kept in an attribute of that name that can travel"
    ):
        instances.dumps(Forgets(30))


def test_arguments_of_any_name_cannot_be_made_again() -> None:
    class Takes:
        def __init__(self, **options: int) -> None:
            self.options = options
            self.client = httpx.Client()

    with not_made_again(
        "argument 'options' of Takes() is not kept in an attribute of that name that can travel"
    ):
        instances.dumps(Takes(a=1))


def test_a_client_that_came_later_cannot_be_made_again() -> None:
    class Later:
        client: object = None

    instance = Later()
    instance.client = httpx.Client()
    with not_made_again("Later() does not make it"):
        instances.dumps(instance)


def test_a_constructor_that_works_only_once_is_found_out_here() -> None:
    class Once:
        made = 0

        def __init__(self) -> None:
            if Once.made:
                raise OSError("password=hunter2")
            Once.made += 1
            self.client = httpx.Client()

    with not_made_again("Once() raised OSError") as caught:
        instances.dumps(Once())
    assert "hunter2" not in str(caught.value)


def test_a_compressed_file_cannot_travel(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.gz", "wb") as opened, refused("held", "GzipFile"):
        instances.dumps(Holds(opened))


def test_a_closed_file_cannot_travel(file: Path) -> None:
    with file.open() as opened:
        pass
    with refused("held", "TextIOWrapper"):
        instances.dumps(Holds(opened))


def test_an_object_that_refuses_by_itself_keeps_its_own_error() -> None:
    class Refuses:
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    with pytest.raises(RuntimeError, match=r"^not me$"):
        instances.dumps(Refuses())
