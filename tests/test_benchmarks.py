"""Benchmarks of the loss, of training steps and of generation: tiny settings print what they must.

What they measure there says nothing, and is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
LOSSES = ["masked_nll", "naive, all positions", "naive, masked rows"]
PRODUCTS = "products alone"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="no marks of memory here"
    ),
]


def run(script: str, tmp_path: Path, *options: object) -> tuple[dict, str]:
    """The figures and the output of a dry run."""
    out = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / script, "--dry-run", "--json", out, *options]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text()), result.stdout


def test_masked_nll(tmp_path):
    figures, output = run("bench_masked_nll.py", tmp_path)
    assert [s["dtype"] for s in figures["settings"]] == ["float32", "bfloat16"]
    for setting in figures["settings"]:
        size = setting["masked_rows"] * setting["num_tokens"] * setting["dim"]
        assert setting["flops"] == 6 * size > 0
        rows = {row["loss"]: row for row in setting["rows"]}
        assert {*LOSSES, PRODUCTS} <= {*rows}
        for name, row in rows.items():
            assert row["failed"] is None and row["ms"] > 0
            assert f"| {name} |" in output
            if name != PRODUCTS:
                assert row["peak_bytes"] >= 0 and len(row["errors"]) == 3


def test_a_wrong_loss_is_an_error(tmp_path):
    """Loss weights that the gradient ignores, as Liger's did before 0.8.2."""
    script = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import bench_masked_nll as bench\n"
        "class Unweighted(bench.Batch):\n"
        "    def rows(self):\n"
        "        hidden, labels, weights = super().rows()\n"
        "        return hidden, labels, weights.mean().expand_as(weights)\n"
        "batch = bench.make_batch(bench.TINY[0], 'cpu')\n"
        "true = bench.truth(batch)\n"
        "good = bench.errors(bench.naive_rows, batch, true)\n"
        "bad = bench.errors(lambda b: bench.naive_rows(Unweighted(*b)), batch, true)\n"
        "assert max(good) < bench.TOLERANCE['float32'], good\n"
        "assert min(bad[1:]) > max(bench.TOLERANCE.values()), bad"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_train_step(tmp_path):
    pytest.importorskip("x_transformers")
    figures, output = run("bench_train_step.py", tmp_path)
    (setting,) = figures["settings"]
    rows = {f"{row['who']}: {row['what']}": row for row in setting["rows"]}
    assert list(rows) == [
        "trunk: forward + backward",
        "x-transformers: forward + backward",
        "x-transformers: whole step",
        "ours: forward + backward",
        "ours: whole step",
    ]
    for name, row in rows.items():
        assert row["ms"] > 0 and row["peak_bytes"] >= 0 and row["tokens_per_second"] > 0
        assert f"| {name} |" in output
        assert ("times_speed" in row) == name.startswith("ours")
    assert "not fused" not in output


def test_profile_and_quality(tmp_path):
    for package in ("x_transformers", "matplotlib", "sklearn"):
        pytest.importorskip(package)
    picture = tmp_path / "step.png"
    options = ("--profile", picture, "--quality", "digits", "--seeds", 2)
    figures, output = run("bench_train_step.py", tmp_path, *options)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(figures["profile_ms"]) == ["x-transformers", "ours"]
    for step in figures["profile_ms"].values():
        assert len(step) == 7 and min(step.values()) > 0
    assert [row["seed"] for row in figures["quality"]] == [0, 1]
    assert all(abs(row["difference"]) < 1e-3 for row in figures["quality"])  # after two steps
    assert "mean difference" in output


def test_generate(tmp_path):
    pytest.importorskip("x_transformers")
    figures, output = run("bench_generate.py", tmp_path)
    (setting,) = figures["settings"]
    assert [row["who"] for row in setting["rows"]] == ["trunk", "x-transformers", "ours"]
    for row in setting["rows"]:
        assert row["ms"] > 0 and row["peak_bytes"] >= 0 and row["times_speed"] > 0
        assert f"| {row['who']} |" in output
    (product,) = figures["product"]
    assert [row["rows"] for row in product["rows"]] == [1, 24]
    assert all(min(row.values()) > 0 for row in product["rows"])


def test_cache(tmp_path):
    pytest.importorskip("x_transformers")
    figures, output = run("bench_cache.py", tmp_path)
    (setting,) = figures["settings"]
    assert [row["who"] for row in setting["rows"]] == ["whole sequence", "up to the block", "cache"]
    for row in setting["rows"]:
        assert row["ms"] > 0 and row["times_speed"] > 0 and row["equal_ids"] == 1
        assert f"| {row['who']} |" in output


def test_unmask(tmp_path):
    pytest.importorskip("x_transformers")
    pytest.importorskip("transformers")
    figures, output = run("bench_unmask.py", tmp_path)
    (setting,) = figures["settings"]
    rows = setting["rows"]
    peers = ["x-transformers", "transformers", "transformers"]
    assert [row["who"] for row in rows] == [*["unmask"] * 8, *peers]
    for row in rows:
        assert row["ns_per_logit"] > 0 and 0 < row["share_of_copy"] < 1
        assert row["times_peer"] > 0
        assert (row["peer"] == "transformers") == ("p 0.9" in row["filter"])
    assert [row["times_peer"] for row in rows[-3:]] == [1, 1, 1]
    assert "| unmask | auto | bfloat16 | none | 1 |" in output


def test_nll(tmp_path):
    figures, output = run("bench_nll.py", tmp_path)
    assert [row["who"] for row in figures["rows"]] == 2 * ["nll_", "F.cross_entropy"]
    for row in figures["rows"]:
        assert row["ns_per_logit"] > 0 and 0 < row["share_of_copy"] < 1
        assert (row["times_ours"] == 1) == (row["who"] == "nll_")
    assert "| V 33, bfloat16, bias, no gradient | 4 | nll_ |" in output


def test_choose(tmp_path):
    figures, output = run("bench_choose.py", tmp_path)
    (setting,) = figures["settings"]
    assert [row["who"] for row in setting["rows"]] == 3 * ["choose", "PyTorch", "sort alone"]
    assert all(row["us"] > 0 and row["times_eager"] > 0 for row in setting["rows"])
    assert "| confidence with noise | choose |" in output


def test_loader(tmp_path):
    pytest.importorskip("transformers")
    figures, output = run("bench_loader.py", tmp_path)
    peers = {row["beside"] for row in figures["rows"]} - {"Grain"}
    assert peers == {"nanoGPT", "nanoGPT, no targets", "Hugging Face"}
    assert all(row["us"] > 0 and row["times as fast"] > 0 for row in figures["rows"])
    assert len(figures["opening_ms"]) == 3 and "| MaskedLoader |" in output


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="empties the page cache")
def test_cold(tmp_path):
    figures, output = run("bench_cold.py", tmp_path, "--folder", tmp_path, "--net-ms", "1")
    assert [row["batches of"] for row in figures["rows"]] == [
        *("MaskedLoader", "without read-ahead", "nanoGPT")
    ]
    assert all(row["median ms"] > 0 for row in figures["rows"])
    assert "| nanoGPT |" in output


def test_scan(tmp_path):
    figures, output = run("bench_scan.py", tmp_path, "--folder", tmp_path)
    assert [setting["dtype"] for setting in figures["settings"]] == [
        *("uint8", "uint16", "uint32", "int64")
    ]
    for setting in figures["settings"]:
        rows = setting["rows"]
        assert [row["what"] for row in rows][:2] == ["sum of int64", "validate"]
        assert rows[0]["share_of_limit"] == 1
        assert all(row["gb_per_second"] > 0 and row["share_of_limit"] > 0 for row in rows)
    assert "| validate, first touch |" in output
    assert not [*tmp_path.glob("*/corpus.bin")]


def test_packing(tmp_path):
    figures, output = run("bench_packing.py", tmp_path)
    assert [setting["seq_len"] for setting in figures["settings"]] == [1024, 1024, 4096, 4096]
    for setting in figures["settings"]:
        rows = {row["who"]: row for row in setting["rows"]}
        assert {"PackingPlan", "PackingPlan, in order", "pack alone"} <= {*rows}
        assert all(row["documents_per_second"] > 0 for row in rows.values())
        assert 0 < rows["PackingPlan"]["padding"] <= rows["PackingPlan, in order"]["padding"] < 1
    assert "| PackingPlan, in order |" in output


def test_documents(tmp_path):
    figures, output = run("bench_documents.py", tmp_path)
    assert [setting["lengths"] for setting in figures["documents"]] == ["uniform", "log-normal"]
    for setting in figures["documents"]:
        rows = {row["what"]: row["ns_per_token"] for row in setting["rows"]}
        assert {"windows", "documents, flat", "documents, rows", "PackedLoader"} <= {*rows}
        assert min(rows.values()) > 0
    answers = {row["what"]: row["times_ours"] for row in figures["answers"]}
    assert answers["ours"] == 1 and answers["ours, all outputs"] > 0
    assert "| documents, flat |" in output


def test_blocks(tmp_path):
    figures, output = run("bench_blocks.py", tmp_path)
    rows = {row["what"]: row for row in figures["rows"]}
    assert {"rows", "blocks of 32", "bernoulli", "two views", "kernel: rows"} <= {*rows}
    assert min(row["ns_per_token"] for row in rows.values()) > 0
    assert rows["rows"]["times"] == rows["kernel: rows"]["times"] == 1
    assert "| blocks of 32 |" in output


def test_class_accuracy(tmp_path):
    for package in ("x_transformers", "sklearn"):
        pytest.importorskip(package)
    picture = tmp_path / "digits.png"
    figures, output = run("class_accuracy.py", tmp_path, "--picture", picture)
    names = [row["digits"] for row in figures["rows"]]
    assert names[:2] == ["real, held out", "without a class"] and len(names) == 6
    accuracy = [row["accuracy"] for row in figures["rows"]]
    assert accuracy[0] > 0.9 and max(accuracy[1:]) < 0.5  # of a net that has learnt nothing
    assert picture.stat().st_size > 0 and "| guidance scale 3 |" in output


def test_finetune_answers(tmp_path):
    pytest.importorskip("fsspec")
    figures, output = run("finetune_answers.py", tmp_path)
    assert figures["pairs"] == 100 and figures["held_out"] == 20
    rows = [(row["model"], row["given"]) for row in figures["rows"]]
    assert rows == [(m, g) for m in ("text", "tuned") for g in ("prompt", "nothing")]
    assert all(0 < row["bits_per_token"] < 20 for row in figures["rows"])
    assert all(len(answers) == 8 for answers in figures["answers"].values())
    assert output.count("written: ") == 8


def test_block_mask(tmp_path):
    figures, output = run("bench_block_mask.py", tmp_path)
    assert [setting["shape"] for setting in figures["settings"]] == [[2, 300], [600]]
    for setting in figures["settings"]:
        assert 0 < setting["partial"] + setting["full"] <= setting["tiles"]
        names = [row["mask"] for row in setting["rows"]]
        assert names == ["flex_block_mask", "create_block_mask", "create_block_mask, compiled"]
        assert all(row["ms"] > 0 and row["times ours"] > 0 for row in setting["rows"])
    assert "| create_block_mask |" in output


def test_block_attention(tmp_path):
    figures, output = run("bench_block_attention.py", tmp_path)
    peers = ["create_block_mask", "create_block_mask, compiled"]
    names = {False: ["block_mask", "block_mask, again", *peers], True: ["block_mask", *peers]}
    assert [setting["documents"] for setting in figures["settings"]] == [False, True]
    for setting in figures["settings"]:
        assert 0 < setting["partial"] + setting["full"] <= setting["tiles"]
        assert [row["mask"] for row in setting["rows"]] == names[setting["documents"]]
        assert all(row["ms"] > 0 and row["times ours"] > 0 for row in setting["rows"])
    assert "| block_mask, again |" in output


def test_cart(tmp_path):
    figures, output = run("bench_cart.py", tmp_path)
    assert [setting["p"] for setting in figures["settings"]] == [0.8, 0.3]
    for setting in figures["settings"]:
        assert setting["greatest_difference"] < 1e-6
        assert all(row["ms"] > 0 and row["times ours"] > 0 for row in setting["rows"])
    assert "| cart_weights, with documents |" in output


def test_row_counts(tmp_path):
    figures, output = run("bench_row_counts.py", tmp_path)
    assert [row["loss"] for row in figures["rows"]] == [
        "masked_nll",
        "F.cross_entropy, masked rows",
    ]
    assert all(row["us_per_row"] > 0 for row in figures["rows"]) and figures["batches"] == 8
    assert "| masked_nll |" in output


def test_prepare(tmp_path):
    for package in ("tokenizers", "datatrove", "orjson"):
        pytest.importorskip(package)
    figures, output = run("bench_prepare.py", tmp_path)
    rows = figures["rows"]
    assert [row["who"] for row in rows] == ["prepare", "datatrove", "datatrove, one thread each"]
    assert figures["tokens"] > 100_000
    assert all(row["seconds"] > 0 and row["times_datatrove"] > 0 for row in rows)
    assert "| prepare |" in output


def test_drop_ins(tmp_path):
    figures, output = run("bench_drop_ins.py", tmp_path)
    of_formulas = {row["function"] for row in figures["rows"] if "formula" in row["peer"]}
    assert {"amused_mask", "get_mask_code"} <= of_formulas  # these need no peer
    for row in figures["rows"]:
        assert row["ours, us"] > 0 and row["peer, us"] > 0 and row["times as fast"] > 0
    for name, reason in figures["left_out"].items():
        assert f"{name} is left out: {reason}" in output


def test_peers_may_fail_and_ours_may_not(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import peers_may_fail

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore")

    able = peers_may_fail({"ours": list, "peer": fails}, {"peer"})
    assert able == {"ours": list}
    with pytest.raises(torch.OutOfMemoryError):
        peers_may_fail({"ours": fails}, {"peer"})


def test_quality_of_generated_images(tmp_path):
    for package in ("x_transformers", "sklearn"):
        pytest.importorskip(package)
    figures, output = run("bench_generate.py", tmp_path, "--quality", "--folder", tmp_path / "run")
    rows = figures["quality"]
    assert rows[0]["sampler"] == "held-out images" and rows[0]["frechet"] < 1e-6
    assert rows[0]["sure"] > 0.7 and rows[0]["nearest"] < 1e-3
    for row in rows[1:]:  # of a net that has learnt nothing
        assert row["frechet"] > 10 and row["nearest"] > 1
        assert row["share_of_mask_id"] == 0 or row["sampler"].startswith("x-transformers")
    assert "ours, the same arguments" in output
