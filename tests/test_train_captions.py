"""Captions from text files, from tables, and by a (tiny, random) BLIP-2."""

import pytest
import torch
from comfyui_wplus.train.blip2 import MAX_TOKENS, Blip2
from comfyui_wplus.train.captions import Beside, Table
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from preparing import write_blip2


def test_a_caption_beside_is_the_first_line_with_something_in_it(tmp_path):
    (tmp_path / "a.b.txt").write_text("\n  a man, smiling \nmore\n", encoding="utf-8")
    assert Beside()(tmp_path / "a.b.jpg") == "a man, smiling"
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    for name, problem in (("b", "empty"), ("c", "cannot be read"), ("d", "d.txt beside it cannot be read")):
        with pytest.raises(WPlusError, match=problem):
            Beside()(tmp_path / f"{name}.jpg")


@pytest.mark.parametrize("head", ["file,caption", "caption,file", "\ufefffile_name,text", "image,text,other"])
def test_a_table_finds_pictures_by_the_end_of_their_path(tmp_path, head):
    columns = head.lstrip("\ufeff").split(",")
    rows = {"x/a.jpg": 'a man, "the first"', "a.jpg": "another", "b.jpg": ""}
    lines = [head]
    for file, caption in rows.items():
        quoted = '"' + caption.replace('"', '""') + '"'
        lines.append(",".join({"caption": quoted, "text": quoted, "other": "1"}.get(c, file) for c in columns))
    (tmp_path / "c.csv").write_text("\n".join(lines), encoding="utf-8")
    table = Table(tmp_path / "c.csv")
    assert table(tmp_path / "x" / "a.jpg") == 'a man, "the first"'
    assert table(tmp_path / "y" / "a.jpg") == "another"
    with pytest.raises(WPlusError, match="empty"):
        table(tmp_path / "b.jpg")
    with pytest.raises(WPlusError, match="c.csv has no row for it"):
        table(tmp_path / "ba.jpg")


def test_a_table_knows_a_link_by_its_own_name_and_by_its_files(tmp_path):
    """As in the cache of a hub, where names are links to numbered files."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "9f86").touch()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "9f86")
    (tmp_path / "c.csv").write_text("file,caption\na.jpg,a man\n9f86,somebody\n")
    assert [Table(tmp_path / "c.csv")(tmp_path / name) for name in ("a.jpg", "b.jpg")] == ["a man", "somebody"]


@pytest.mark.parametrize("text, problem", [
    ("picture,words\na,b\n", "columns .'picture', 'words'.*Give a CSV file with columns file,caption"),
    ("", "columns"),
    (b"\xff\xfe\xff", "no readable CSV"),
])  # fmt: skip
def test_a_table_that_is_none_is_refused(tmp_path, text, problem):
    (tmp_path / "c.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match=problem):
        Table(tmp_path / "c.csv")


def test_blip2_describes_pictures_of_any_size_and_says_the_same_again(tmp_path):
    blip = Blip2.load(write_blip2(tmp_path / "blip"))
    torch.manual_seed(0)
    pictures = [torch.rand(3, 40, 60), torch.rand(3, 90, 30)]
    said = blip(pictures)
    assert len(said) == 2 and said[0] != said[1] and any(said)
    assert blip(pictures) == said == [blip([p])[0] for p in pictures]
    assert max(len(x) for x in said) <= 8 * MAX_TOKENS


def test_a_folder_without_blip2_is_refused(tmp_path):
    with pytest.raises(FileError, match="no BLIP-2 here.*Salesforce/blip2-opt-2.7b"):
        Blip2.load(tmp_path)
