"""Files and folders that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from px_hf import atomic
from px_hf.atomic import beside, whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "masks.bin"
    with whole(path) as unfinished:
        unfinished.write_text("content")
        assert unfinished.suffix == path.suffix
        assert unfinished.name.startswith(".")
        assert not path.exists()
    assert path.read_text() == "content"
    assert names(path.parent) == ["masks.bin"]


def test_a_file_that_is_there_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    (tmp_path / "elsewhere").mkdir()
    with whole("file") as unfinished:
        unfinished.write_text("new")
        monkeypatch.chdir("elsewhere")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "part").write_text("old")

    def write() -> None:
        with whole(path) as unfinished:
            if kind == "file":
                unfinished.write_text("half")
            else:
                unfinished.mkdir()
                (unfinished / "part").write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        write()
    assert names(tmp_path) == ["out"]
    assert (path if kind == "file" else path / "part").read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("")
    with whole(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "new").write_text("")
    assert names(path) == ["new"]
    assert names(tmp_path) == ["out"]


def test_what_a_link_leads_to_stays(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("")
    path.symlink_to(target)
    with whole(path) as unfinished:
        unfinished.mkdir()
    assert names(target) == ["old"]
    assert not path.is_symlink()


def test_processes_that_write_the_same_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with whole(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(atomic.os, "getpid", lambda: -1)
        with whole(path) as other:
            assert other != mine
            other.write_text("the other's")
        assert path.read_text() == "the other's"
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["file"]


def test_what_an_earlier_run_left_is_not_taken_over(tmp_path: Path) -> None:
    with beside(tmp_path / "out") as place:
        pass
    place.mkdir()
    (place / "left").write_text("")
    with whole(tmp_path / "out") as unfinished:
        assert unfinished == place
        assert not unfinished.exists()
        unfinished.mkdir()
    assert names(tmp_path / "out") == []
