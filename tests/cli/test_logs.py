"""What is shown and kept of the logs when something failed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from baton.cli.logs import kept_if_failed, last_words
from baton.core.errors import SetupError

NEWS = "2026-01-01 10:00:00,000 INFO baton.router decode-0 is ready\nINFO:     Finished server process [1]\n"
ERROR = (
    "2026-01-01 10:00:01,000 ERROR baton.router it fell\nTraceback (most recent call last):\n  File x\nOSError: full\n"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NEWS + ERROR + NEWS, ERROR.strip()),
        (ERROR + NEWS + "baton: no model\n" + NEWS, "baton: no model"),
        (NEWS, "it logged no error (2 lines)"),
        ("", "it logged no error (0 lines)"),
    ],
)
def test_last_words_are_the_last_error_and_not_the_news_after_it(text: str, said: str, tmp_path: Path) -> None:
    log = tmp_path / "router.log"
    log.write_text(text)
    assert last_words(log) == said


def test_logs_of_a_failed_start_are_kept_and_their_place_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, temporary, session = tmp_path / "logs", tmp_path / "tmp", tmp_path / "session"
    for directory in (logs, temporary, session):
        directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (logs / "decode-0.log").write_text("why\n")
    (session / "worker-1.err").write_text("and why\n")
    (logs / "ray").symlink_to(session)
    with pytest.raises(SetupError), kept_if_failed(logs):
        raise SetupError("it did not start.")
    (kept,) = temporary.iterdir()
    assert str(kept) in capsys.readouterr().err
    assert [(kept / name).read_text() for name in ("decode-0.log", "ray/worker-1.err")] == ["why\n", "and why\n"]


def test_a_start_that_succeeds_or_never_logged_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, temporary = tmp_path / "logs", tmp_path / "tmp"
    logs.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(SetupError), kept_if_failed(logs):
        raise SetupError("it did not start.")
    (logs / "router.log").write_text("ready\n")
    with kept_if_failed(logs):
        pass
    assert not list(temporary.iterdir())
