"""Files that are written whole, and what is said of those that are not."""

import pytest
import torch

from shoestring.errors import SettingError
from shoestring.whole_files import check_names, read_tensors, write_tensors, write_whole


def test_tensors_and_what_is_said_of_them_come_back(tmp_path):
    strided = torch.arange(6.0).view(2, 3).T.requires_grad_()
    write_tensors(tmp_path / "new" / "some.safetensors", {"a.b": strided}, stage="pruned")
    tensors, about = read_tensors(tmp_path / "new" / "some.safetensors")
    assert torch.equal(tensors["a.b"], strided)
    assert about["stage"] == "pruned"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["some.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")

    def fails(beside):
        beside.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_whole(file, fails)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    file = tmp_path / "some.safetensors"
    with pytest.raises(SettingError, match=r"holds no some\.safetensors: it was not saved with this recipe\.$"):
        read_tensors(file)
    for content in (b"", b"nothing", b"\x08\0\0\0\0\0\0\0{}"):
        file.write_bytes(content)
        with pytest.raises(SettingError, match=r"some\.safetensors cannot be read: "):
            read_tensors(file)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a"}, r"^here lacks b \(1 in all\) for lora\.$"),
        ({"a", "b", "d", "c"}, r"^here holds the foreign c \(2 in all\) for lora\.$"),
    ],
)
def test_names_that_are_others_are_told(saved, message):
    check_names("here", {"a", "b"}, {"b", "a"})
    with pytest.raises(SettingError, match=message):
        check_names("here", saved, {"a", "b"}, "lora")
