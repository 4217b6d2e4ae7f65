import logging

import pytest

from rayserve_hooks.download import caller
from rayserve_hooks.download.caller import STANDALONE, Progress


def test_the_log_hears_of_it_every_few_seconds_only(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Progress(
        "s3://bucket/model", total=4_000_000_000, reused=1_000_000_000, caller=STANDALONE
    )
    running.add(1_000_000_000)
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        running.report()
        assert caplog.records == []
        monkeypatch.setattr(caller, "REPORT_S", 0.0)
        running.report()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("s3://bucket/model: 2.00 of 4.00 GB (50%), ")


def test_what_is_fetched_again_counts_once() -> None:
    running = Progress("s3://bucket/model", total=10, reused=0, caller=STANDALONE)
    running.add(10)
    running.add(-10)
    running.add(10)
    assert running.done == 10


def test_a_download_of_nothing_is_no_division_by_zero(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "REPORT_S", 0.0)
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        Progress("s3://bucket/model", total=0, reused=0, caller=STANDALONE).report()
    assert "0.00 of 0.00 GB (0%)" in caplog.text
