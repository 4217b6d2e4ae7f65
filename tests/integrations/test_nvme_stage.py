from pathlib import Path

import pytest
from nvme_stage import NvmeStage

from rayserve_hooks import CallbackCtx, Handled

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "share" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def run(shared: Path, stage: Path) -> Handled:
    return NvmeStage(str(shared), str(stage)).on_before_download(CallbackCtx(llm_config=None))


def test_the_engine_reads_the_copy(shared: Path, tmp_path: Path) -> None:
    stage = tmp_path / "nvme" / "tiny"
    assert run(shared, stage) == Handled(stage, f"{shared} is staged at {stage}")
    assert (stage / "model.safetensors").read_bytes() == b"weights"


def test_only_what_has_changed_is_copied_again(shared: Path, tmp_path: Path) -> None:
    stage = tmp_path / "nvme" / "tiny"
    run(shared, stage)
    before = (stage / "model.safetensors").stat().st_ino
    (shared / "config.json").write_text('{"changed": true}')
    run(shared, stage)
    assert (stage / "config.json").read_text() == '{"changed": true}'
    assert (stage / "model.safetensors").stat().st_ino == before


def test_without_a_disk_the_share_is_served(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nvme").write_text("no disk")
    assert run(shared, tmp_path / "nvme" / "tiny").model_path == str(shared)
    assert "not staged, the engine reads the share: cannot write" in caplog.text


def test_a_share_that_is_not_mounted(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config.json on node local .*; mount"):
        run(tmp_path / "nothing", tmp_path / "nvme")
