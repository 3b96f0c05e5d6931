"""Memory of loading, measured on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sfs_triton
from bench.cost import loading
from bench.shapes.geometry import parameters

FOLDER = str(Path(sfs_triton.__file__).parent / "embedded")


@pytest.mark.parametrize(("form", "per_weight"), [("float32", (3.9, 4.1)), ("fp8", (1.0, 1.2))])
def test_weights_are_counted_once(form, per_weight):
    row = loading.measure(FOLDER, form)
    assert per_weight[0] < row["weights"] / parameters(sfs_triton.load("embedded", "cpu").spec) < per_weight[1]
    assert row["seconds"] > 0


def test_a_process_per_format(tmp_path, capsys):
    out = tmp_path / "loading.json"
    assert loading.main([FOLDER, "--formats", "float32", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["format"] == "float32" and f"float32{row['seconds']:11.1f}" in capsys.readouterr().out
    assert 0.3 * row["weights"] < row["peak"] < 10 * row["weights"]
    with pytest.raises(SystemExit):
        loading.main([FOLDER, "--formats", "int3"])
    assert "--formats 'int3' is not one of float32" in capsys.readouterr().err
