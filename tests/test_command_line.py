import json

import pytest

from cbam_jax import InputError, command_line


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error", [InputError("width=0: give at least 1"), FloatingPointError("loss nan at step 3")]
)
def test_a_mistake_is_one_line_and_status_2(error, capsys, monkeypatch):
    monkeypatch.delenv("CBAM_JAX_TRACEBACK", raising=False)
    assert command_line.run(raising(error)) == 2
    assert capsys.readouterr() == ("", f"error: {error}\n")
    monkeypatch.setenv("CBAM_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        command_line.run(raising(error))


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ValueError, match="a bug"):
        command_line.run(raising(ValueError("a bug")))


def test_status_of_what_went_well():
    assert command_line.run(lambda: None) == 0
    assert command_line.run(lambda: 3) == 3


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    command_line.write_json(path, {"map@10": 0.5})
    with pytest.raises(TypeError):
        command_line.write_json(path, {"map@10": 0.75, "model": object()})
    assert json.loads(path.read_text()) == {"map@10": 0.5}
