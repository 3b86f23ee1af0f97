"""Files of others and devices that are not there are refused with one line."""

import pytest

from peft_heads.inference.onnx_file import CPU, open_session, read_metadata


pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture
def foreign(tmp_path):
    """A file that doubles its input."""
    from onnx import TensorProto, helper

    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", sides[:1], sides[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "foreign.onnx")
    return tmp_path / "foreign.onnx"


def test_a_file_of_others(foreign):
    session = open_session(foreign, "cpu")
    assert session.get_providers() == [CPU]
    with pytest.raises(
        ValueError, match=r"foreign.onnx was not written by .*: its input is x \(expected pixel_values\)"
    ):
        read_metadata(session, foreign)


@pytest.mark.parametrize("device", ["tpu", "cpu:x", "TensorrtExecutionProvider"])
def test_the_error_lists_the_providers(foreign, device):
    with pytest.raises(ValueError, match=f"--device {device}: .*there is .*cpu"):
        open_session(foreign, device)


def test_what_is_no_file(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no onnx")
    with pytest.raises(ValueError, match="ONNX Runtime cannot open .*a.onnx"):
        open_session(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match="there is no file .*b.onnx"):
        open_session(tmp_path / "b.onnx")
