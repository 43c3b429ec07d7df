"""Evaluation: the sources of a mixture one by one, and all of them together."""

import pytest

from qlora_jax.cli.eval import Eval
from qlora_jax.cli.output import print_report
from qlora_jax.data.config import DataConfig, Source


@pytest.mark.parametrize("packing", [False, True])
def test_sources_of_a_mixture_are_measured_separately(
    llama_dir, rows_file, tmp_path, packing, capsys
):
    lines = rows_file.read_text().splitlines(keepends=True)
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file, part in zip(files, (lines[:15], lines[15:]), strict=True):
        file.write_text("".join(part))

    def measured(**data):
        data = DataConfig(format="tokens", max_length=64, packing=packing, **data)
        how = {"quantization": "none", "dtype": "float32", "batch_size": 24}
        return Eval(path=str(llama_dir), data=data, **how).run()

    first, second = (measured(path=str(file)) for file in files)
    # Weights are shares of a run; an evaluation reads every row once.
    sources = [
        Source(path=str(f), weight=w) for f, w in zip(files, (3, 1), strict=True)
    ]
    both = measured(sources=tuple(sources))
    for part, file in ((first, files[0]), (second, files[1])):
        assert (part.pop("data"), part.pop("measured")) == (str(file), "as given")
    assert both["data"] == f"{files[0]}, {files[1]}"
    assert both["sources"] == {str(files[0]): first, str(files[1]): second}
    assert both["rows"] == 24 and first["rows"] == 15
    tokens = [part["supervised_tokens"] for part in (first, second)]
    assert both["supervised_tokens"] == sum(tokens)
    weighted = first["loss"] * tokens[0] + second["loss"] * tokens[1]
    assert both["loss"] == pytest.approx(weighted / sum(tokens), rel=1e-12)
    if not packing:  # rows in another order: float32 sums of 24 rows
        assert both["loss"] == pytest.approx(
            measured(path=str(rows_file))["loss"], rel=1e-6
        )
        capsys.readouterr()
        print_report(both)
        printed = capsys.readouterr().out.splitlines()
        at = printed.index("sources")
        assert printed[at + 1] == f"  {files[0]}" and "    loss  " in printed[at + 2]


def test_a_batch_size_of_zero_is_refused(llama_dir, rows_file, cli):
    data = ["--data.path", rows_file, "--data.format", "tokens"]
    status, _, err = cli("eval", llama_dir, *data, "--batch-size", "0")
    assert status == 1
    assert "`batch_size` must be a positive integer" in err
