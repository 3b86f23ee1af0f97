import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from peft_heads.adapter_folder.weights_file import TensorInfo, find_weights, one_line, read_infos, read_weights


TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.mask": torch.tensor([True, False]), "c": torch.zeros(0).half()}
INFOS = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in TENSORS.items()}


def write(folder, name, **options):
    if name.endswith("bin"):
        torch.save(TENSORS, folder / name, **options)
    else:
        save_file(TENSORS, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_both_forms(tmp_path, name):
    assert find_weights(tmp_path) is None
    path = write(tmp_path, name)
    assert find_weights(str(tmp_path)) == path
    assert read_infos(path) == INFOS
    assert all(torch.equal(value, TENSORS[key]) for key, value in read_weights(path).items())
    assert read_weights(path, {"c"}).keys() == {"c"}


def test_the_form_before_torch_1_6(tmp_path):
    path = write(tmp_path, "adapter_model.bin", _use_new_zipfile_serialization=False)
    assert read_infos(path) == INFOS


def test_safetensors_first_as_peft(tmp_path):
    write(tmp_path, "adapter_model.bin")
    path = write(tmp_path, "adapter_model.safetensors")
    assert find_weights(tmp_path) == path


class Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-file",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        b"PK\x03\x04 no archive",
        pickle.dumps(Code()),
        pickle.dumps({"a": 1}),
    ],
)
def test_a_bin_that_is_none(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="adapter_model.bin is damaged, or holds more than tensors") as caught:
        read_infos(tmp_path / "adapter_model.bin")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made-by-a-file").exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(1)], {1: torch.zeros(1)}])
def test_a_bin_of_other_things(tmp_path, content):
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds no weights"):
        read_infos(tmp_path / "adapter_model.bin")


def test_a_part_of_a_bin(tmp_path):
    path = write(tmp_path, "adapter_model.bin")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="adapter_model.bin is damaged"):
        read_infos(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_no_ordinary_file(tmp_path, make):
    make(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is (a folder|no ordinary file)"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\n"), "a b"),
        (KeyError(), "KeyError"),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
    ],
)
def test_one_line(error, line):
    assert one_line(error) == line
