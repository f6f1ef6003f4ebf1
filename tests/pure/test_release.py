"""``scripts/release`` refuses what would be no release, before it does anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def git(checkout: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org", *arguments]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the script, one commit and the tag of an earlier release."""
    (tmp_path / "scripts").mkdir()
    for name in ("common", "release"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message=first")
    git(tmp_path, "tag", "v0.1.0")
    return tmp_path


def refusal(checkout: Path, *arguments: str) -> str:
    command = [str(checkout / "scripts/release"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert not done.stdout
    return done.stderr


@pytest.mark.parametrize("version", ["", "1", "v1.0.0", "1.0.0.dev0", "1.0.0; true"])
def test_what_is_no_version_of_a_release(checkout: Path, version: str) -> None:
    assert "usage: scripts/release" in refusal(checkout, "--dry-run", version)


def test_a_checkout_with_changes(checkout: Path) -> None:
    (checkout / "new").touch()
    assert "the checkout has changes" in refusal(checkout, "--dry-run", "0.2.0")


def test_a_version_that_was_released(checkout: Path) -> None:
    assert "there is a tag v0.1.0 already" in refusal(checkout, "0.1.0")


def test_a_checkout_of_no_branch(checkout: Path) -> None:
    git(checkout, "checkout", "--quiet", "--detach")
    assert "HEAD is detached" in refusal(checkout, "0.2.0")
