"""What is written down must be so: generated pages are fresh, commands in the README exist, no path of one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from typer.main import get_command

from baton.cli.config import docs_page
from baton.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def tracked_files() -> list[Path]:
    """Of a checkout; an unpacked archive has no list, and nothing to complain about."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [p for name in done.stdout.split("\0") if name and (p := ROOT / name).is_file() and not p.is_symlink()]


def shell_blocks(text: str) -> str:
    return "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.DOTALL))


def test_the_settings_page_is_what_make_docs_would_write() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == docs_page(), "run `make docs` and commit the result"


def test_make_commands_in_the_readme_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"run", "test"} <= named
    assert named <= MAKE_TARGETS, f"the Makefile has no {named - MAKE_TARGETS}"


def test_baton_commands_in_the_readme_exist() -> None:
    command = get_command(app)
    assert hasattr(command, "commands")
    named = set(re.findall(r"\bbaton ([a-z]+)", shell_blocks(README)))
    assert named, "the README shows no baton command"
    assert named <= set(command.commands), f"there is no command {named - set(command.commands)}"


def test_local_links_in_the_pages_lead_somewhere() -> None:
    wrong = []
    for page in [p for p in tracked_files() if p.suffix == ".md"] or [ROOT / "README.md"]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
            if not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong, wrong


def test_ci_runs_the_readmes_own_test_command() -> None:
    assert re.search(r"^exec make .*\btest$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert "make test" in README
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_no_file_names_a_path_of_one_machine() -> None:
    # Written in pieces, so that this file does not find itself.
    private = re.compile("|".join(("/wor" + "k/", "/far" + "m/", "/tmp/" + "w/", "/roo" + "t/", r"/home/[a-z]+/")))
    wrong = [
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in tracked_files()
        if path.stat().st_size < 1_000_000 and (found := private.search(path.read_text(errors="ignore")))
    ]
    assert not wrong, wrong
