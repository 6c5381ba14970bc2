"""Names from files in what is told: escaped, shortened, ten of them at most."""

import pytest
from cost import cheap  # noqa: F401, all is measured

from cbam_jax import InputError
from cbam_jax.datasets import open_dataset
from cbam_jax.foreign_files import shown_names


def test_many_names_are_ten():
    names = [f"{i}\x1b[2J{'x' * 1_000}" for i in range(10_000)]
    told = shown_names(names)
    assert told.isprintable()
    assert len(told) < 1_000
    assert told.endswith("] and 9990 more")
    assert shown_names(["a"]) == "['a']"


@pytest.mark.parametrize(
    "header", ["path,label,split", "path,label,split," + "c,".join("ab" * 500)]
)
@pytest.mark.parametrize(
    ("mark", "told"), [("", "choose one of"), ("\x1b[2J", "with control characters: write it")]
)
def test_a_manifest_of_many_splits_and_columns_is_told_in_a_short_line(
    header, mark, told, tmp_path, capsys
):
    columns = header.split(",")
    columns = columns[:3] + [f"{i}\x1b" for i, _ in enumerate(columns[3:])]
    cells = ["x"] * (len(columns) - 3)
    rows = [",".join([f"{i}.png", "a", f"split-{mark}{i}", *cells]) for i in range(300)]
    (tmp_path / "x.csv").write_text("\n".join([",".join(columns), *rows]))
    with pytest.raises(InputError, match=told) as caught:
        open_dataset(str(tmp_path / "x.csv"), "train")
    assert len(str(caught.value)) < 1_200
    assert str(caught.value).isprintable()
    assert len(capsys.readouterr().err) < 2_000
