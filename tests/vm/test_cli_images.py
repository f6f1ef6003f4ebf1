"""``bake``, ``images``, ``rmi``, ``prune`` and ``snapshot`` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trio_supermachine.host import files as hostfiles

pytestmark = pytest.mark.vm

PROGRAM = [sys.executable, "-m", "trio_supermachine.cli"]
QUICK = ["--memory", "128", "--cmd", "[]"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, with the host's kernels."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "kernels").symlink_to(hostfiles.home() / "kernels")
    monkeypatch.setenv("TRIO_SUPERMACHINE_HOME", str(home))
    return home


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def answer(*arguments: str) -> Any:
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_from_bake_to_rmi(home: Path, engine_name: str) -> None:
    done = cli(
        "bake", "builtin:busybox", *QUICK, "--name", "app", "-e", "SECRET", "--warmup-exec",
        "echo warming; echo $SECRET >/tmp/secret", SECRET="s3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fingerprint = done.stdout.strip()
    assert len(fingerprint) == 64
    said = done.stderr.splitlines()
    assert [line for line in said if not line.startswith("warming")] == [
        f"{phase}: builtin:busybox" for phase in ("boot", "wait", "warmup", "capture", "publish")
    ]
    assert "warming" in said

    document = answer("images", "--json")
    (image,) = document["images"]
    assert image["fingerprint"] == fingerprint
    assert image["names"] == ["app"]
    assert (image["reference"], image["memory_mib"], image["engine"]) == (
        "builtin:busybox",
        128,
        engine_name,
    )
    assert document["size"] == image["size"] + image["layers_size"]

    # The same with another warm-up shares the layers.
    other = answer("bake", "builtin:busybox", *QUICK, "--no-progress", "--json")
    assert other["fingerprint"] != fingerprint
    document = answer("images", "--json")
    sizes = [image["size"] for image in document["images"]]
    assert document["size"] == sum(sizes) + image["layers_size"]
    table = cli("images").stdout.splitlines()
    assert len(table) == 4
    assert any(fingerprint[:12] in line and "app" in line for line in table)

    path = image["path"]
    facts = answer("snapshot", "info", path, "--json")
    assert (facts["kind"], facts["fingerprint"]) == ("full", fingerprint)
    assert fingerprint in cli("snapshot", "info", path).stdout
    assert "sound" in cli("snapshot", "verify", f"{path}/restore.snap").stdout

    kept = answer("prune", "--yes", "--json")
    assert (kept["bakes"], kept["layers"]) == ([], [])
    removed = answer("rmi", "app", "--json")
    assert removed["bakes"] == [fingerprint]
    assert not removed["layers"]
    removed = answer("prune", "--all", "--yes", "--json")
    assert removed["bakes"] == [other["fingerprint"]]
    assert len(removed["layers"]) == 1
    assert answer("images", "--json") == {"images": [], "pulled": [], "size": 0}

    damaged = cli("snapshot", "verify", path)
    assert damaged.returncode == 125
    assert path in damaged.stderr


def test_a_damaged_snapshot_is_told_with_its_file_and_remedy(home: Path) -> None:
    baked = answer("bake", "builtin:busybox", *QUICK, "--json", "--name", "x")
    memory = Path(baked["path"], "memory.bin")
    with memory.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    done = cli("snapshot", "verify", baked["path"])
    assert done.returncode == 125
    assert str(memory) in done.stderr
    Path(baked["path"], "metadata.json").write_text("{}")
    assert "damaged" in cli("images").stdout
    (listed,) = answer("images", "--json")["images"]
    assert "problem" in listed
    assert cli("prune", "--yes").returncode == 0
    assert answer("images", "--json")["images"] == []


def test_prune_asks_and_without_a_terminal_wants_yes() -> None:
    done = cli("prune")
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert cli("prune", "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["bake", "builtin:busybox", "--cmd", "sh"], 2, "JSON list"),
        (["bake", "builtin:busybox", "--entrypoint", "[5]"], 2, "JSON list"),
        (["bake", "builtin:busybox", "--memory", "5"], 125, "at least 32"),
        (["bake", "builtin:busybox", "-e", "=x"], 2, "NAME=VALUE"),
        (["bake", "builtin:none"], 125, "builtin"),
        (["rmi", "nothing"], 125, "trio-supermachine images"),
        (["rmi"], 2, "IMAGE"),
        (["snapshot", "info", "/nonexistent"], 125, "/nonexistent"),
        (["snapshot", "verify", "/etc/passwd"], 125, "/etc/passwd"),
    ],
)
def test_mistakes_are_told_on_one_line(arguments: list[str], code: int, text: str) -> None:
    done = cli(*arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
