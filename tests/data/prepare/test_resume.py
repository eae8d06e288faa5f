"""A run that is stopped, at whatever moment, goes on, and ends with the same files."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.formats.prepared import PROGRESS_FILE
from nar_kernels.data.prepare import prepare
from nar_kernels.data.prepare.shards import ShardWriter
from nar_kernels.data.prepare.staging import Staging
from tests.helpers.paths import ROOT
from tests.helpers.prepared import contents
from tests.helpers.texts import HARD, bpe_json, prose, write_chat_tokenizer, write_lines

pytest.importorskip("tokenizers")

SIZES: dict[str, Any] = {"batch_bytes": 3000, "shard_tokens": 2500, "workers": 1, "quiet": True}


class Stopped(BaseException):
    """In place of Ctrl-C."""


def write_inputs(folder: Path) -> list[Path]:
    """Records, conversations among them, a long text, and empty ones: some ten shards."""
    folder.mkdir()
    draw = random.Random(1)
    texts = [*HARD, *(text[:2000] for text in prose()[:12])]
    records: list[Any] = [{"text": draw.choice(texts)} for _ in range(40)]
    records[30] = {"messages": [{"role": "user", "content": "a"}] * 3}
    write_lines(folder / "a.jsonl", records)
    (folder / "b.txt").write_bytes("\n".join(prose()[:3]).encode())
    write_lines(folder / "c.jsonl", [{"text": ""}, {"text": "last"}, {"text": ""}])
    return [folder / "a.jsonl", folder / "b.txt", folder / "c.jsonl"]


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    tokenizer = write_chat_tokenizer(tmp_path / "chat")
    return {"inputs": write_inputs(tmp_path / "in"), "tokenizer": tokenizer, **SIZES}


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: int) -> None:
    """Before or after the call of that number."""
    calls, original = [0], getattr(owner, name)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == when and when % 2:
            raise Stopped
        result = original(*args, **kwargs)
        if calls[0] == when:
            raise Stopped
        return result

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize(
    ("owner", "name"), [(Staging, "add"), (ShardWriter, "add"), (Staging, "finish")]
)
def test_stopped_everywhere(
    tmp_path: Path, arguments: dict[str, Any], owner: Any, name: str
) -> None:
    prepare(out=tmp_path / "whole", **arguments)
    expected = contents(tmp_path / "whole")
    num_shards = len(list((tmp_path / "whole").glob("tokens-*")))
    assert num_shards > 5 and "loss-mask-00000.npy" in expected
    out = tmp_path / "out"
    stops = 0
    for when in range(1, 100):
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_at(monkeypatch, owner, name, when)
            try:
                prepare(out=out, **arguments)
                break
            except Stopped:
                stops += 1
        assert not out.exists()
        with pytest.raises(ValueError, match="is not finished: run the same"):
            Corpus(tmp_path / "out.partial")
    assert stops == 1 if name == "finish" else stops >= 3
    assert contents(out) == expected
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("when", range(1, 12))
def test_each_stop_alone(tmp_path: Path, arguments: dict[str, Any], when: int) -> None:
    prepare(out=tmp_path / "whole", **arguments)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, ShardWriter, "add", when)
        with pytest.raises(Stopped):
            prepare(out=tmp_path / "out", **arguments)
    before = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("tokens-*")
    }
    lines = (tmp_path / "out.partial" / PROGRESS_FILE).read_bytes().count(b"\n")
    prepare(out=tmp_path / "out", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    kept = sorted(before)[: lines - 1]
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == before[n] for n in kept)


def stopped(tmp_path: Path, arguments: dict[str, Any]) -> Path:
    """A folder of a run that was stopped midway."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, Staging, "add", 4)
        with pytest.raises(Stopped):
            prepare(out=tmp_path / "out", **arguments)
    return tmp_path / "out.partial"


def test_what_was_left_out_is_counted_once(
    tmp_path: Path, arguments: dict[str, Any], capsys: Any
) -> None:
    said = []
    for name, stops in (("whole", False), ("out", True)):
        if stops:
            stopped(tmp_path, arguments)
        prepare(out=tmp_path / name, **{**arguments, "quiet": False})
        lines = capsys.readouterr().out.splitlines()
        said += [line for line in lines if line.startswith("empty documents")]
        assert stops == any(line.startswith("going on after 4 finished") for line in lines)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shard_tokens": 999}, "shard_tokens"),
        ({"append_eos": True}, "append_eos"),
        ({"text_column": "body"}, "text_column"),
        ({"tokenizer": "bytes"}, "tokenizer"),
        ({"tokenizer": None, "train_bpe": 300}, "tokenizer and train_bpe"),
        ({"batch_bytes": 999}, "batch_bytes"),
    ],
)
def test_other_options_do_not_go_on(
    tmp_path: Path, arguments: dict[str, Any], change: dict[str, Any], name: str
) -> None:
    partial = stopped(tmp_path, arguments)
    before = contents(partial)
    with pytest.raises(
        FileExistsError, match=f"was begun with other {name}: .*overwrite= to begin anew, or rem"
    ):
        prepare(out=tmp_path / "out", **{**arguments, **change})
    assert contents(partial) == before
    prepare(out=tmp_path / "out", **arguments)


def test_other_inputs_do_not_go_on(tmp_path: Path, arguments: dict[str, Any]) -> None:
    stopped(tmp_path, arguments)
    path = arguments["inputs"][1]
    os.utime(path, ns=(1, 1))
    with pytest.raises(FileExistsError, match="was begun with other inputs"):
        prepare(out=tmp_path / "out", **arguments)
    prepare(out=tmp_path / "out", overwrite=True, **arguments)
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_done_is_nothing_lost(tmp_path: Path) -> None:
    """A bad record is corrected, and the same command works."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        prepare(path, tmp_path / "out", tokenizer="bytes", quiet=True)
    path.write_text('{"text": "a"}\n{"text": "1"}\n')
    prepare(path, tmp_path / "out", tokenizer="bytes", quiet=True)


def test_workers_may_change(tmp_path: Path, arguments: dict[str, Any]) -> None:
    stopped(tmp_path, arguments)
    prepare(out=tmp_path / "out", **{**arguments, "workers": 2, "overwrite": True})
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_line_that_was_cut_off(tmp_path: Path, arguments: dict[str, Any]) -> None:
    partial = stopped(tmp_path, arguments)
    content = (partial / PROGRESS_FILE).read_bytes()
    (partial / PROGRESS_FILE).write_bytes(content[:-9])
    prepare(out=tmp_path / "out", **arguments)
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_trained_tokenizer_is_kept(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in prose()[:9]])
    arguments |= {"tokenizer": None, "train_bpe": 400, "inputs": path, "shard_tokens": 1}
    partial = stopped(tmp_path, arguments)
    before = (partial / "tokenizer.json").read_bytes()
    monkeypatch.setattr("nar_kernels.data.prepare.text.train_bpe", None)
    prepare(out=tmp_path / "out", **arguments)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == before
    manifest = Corpus(tmp_path / "out").manifests[0]
    assert manifest.tokenizer is not None and manifest.tokenizer.name == "BPE of 400 tokens"


def test_overwrite(tmp_path: Path, arguments: dict[str, Any]) -> None:
    out = tmp_path / "out"
    prepare(out=out, **arguments)
    before = contents(out)
    with pytest.raises(
        FileExistsError, match="out exists: name another folder, or pass overwrite="
    ):
        prepare(out=out, **arguments)
    assert contents(out) == before
    more = {**arguments, "overwrite": True}
    # Until the end, the old one stays.
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, Staging, "add", 2)
        with pytest.raises(Stopped):
            prepare(out=out, **{**more, "shard_tokens": 4000})
    assert contents(out) == before
    prepare(out=out, **{**more, "shard_tokens": 4000})
    assert contents(out) != before
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    (tmp_path / "empty").mkdir()
    prepare(out=tmp_path / "empty", **more)
    assert contents(tmp_path / "empty") == before
    assert {path.name for path in tmp_path.iterdir()} == {"chat", "in", "out", "empty"}


@pytest.mark.parametrize("when", range(1, 5))
def test_stopped_as_it_replaces(tmp_path: Path, arguments: dict[str, Any], when: int) -> None:
    """Before and after each rename, the corpus before or the new one is there, or to be had."""
    out = tmp_path / "out"
    prepare(out=out, **{**arguments, "shard_tokens": 4000})
    before = contents(out)
    arguments |= {"overwrite": True}
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at_rename(monkeypatch, when)
        with pytest.raises(Stopped):
            prepare(out=out, **arguments)
    kept = out if when == 1 else tmp_path / "out.partial.old"
    assert contents(kept) == before
    if when == 4:  # it is complete: what is left is removed
        with pytest.raises(FileExistsError, match="out exists"):
            prepare(out=out, **{**arguments, "overwrite": False})
    else:
        prepare(out=out, **arguments)
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"chat", "in", "out", "whole"}


def stop_at_rename(monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    """Before the first, after it, before the second, or after that."""
    calls, rename = [0], Path.rename

    def stopping(self: Path, target: Path) -> Path:
        calls[0] += 1
        if when == 2 * calls[0] - 1:
            raise Stopped
        result = rename(self, target)
        if when == 2 * calls[0]:
            raise Stopped
        return result

    monkeypatch.setattr(Path, "rename", stopping)


def test_through_a_link(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """It stays, and what it leads to is replaced."""
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk/out", target_is_directory=True)
    prepare(out=link, **{**arguments, "shard_tokens": 4000})
    assert link.is_symlink()
    prepare(out=link, overwrite=True, **arguments)
    assert link.is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(link) == contents(tmp_path / "whole")


def test_what_prepare_did_not_write_is_not_removed(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    """However much the folder looks like one of prepare."""
    for name, record in (("mine", "{}"), ("mine2.partial", '{"version": 1}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / PROGRESS_FILE).write_text(record)
        (tmp_path / name / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="mine is no prepared corpus"):
        prepare(out=tmp_path / "mine", overwrite=True, **arguments)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="mine2.partial is not of a run of prepare"):
            prepare(out=tmp_path / "mine2", overwrite=overwrite, **arguments)
    partial = stopped(tmp_path, arguments)
    (partial / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="out.partial holds thesis.txt, which prepare did"):
        prepare(out=tmp_path / "out", overwrite=True, **{**arguments, "shard_tokens": 4000})
    (partial / "thesis.txt").rename(tmp_path / "thesis.txt")
    prepare(out=tmp_path / "out", **arguments)
    (tmp_path / "thesis.txt").rename(tmp_path / "out/thesis.txt")
    with pytest.raises(FileExistsError, match="out holds thesis.txt, which prepare did not write"):
        prepare(out=tmp_path / "out", overwrite=True, **arguments)
    for name in ("mine", "mine2.partial", "out"):
        assert (tmp_path / name / "thesis.txt").read_text() == "x"


def test_an_input_in_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = write_lines(tmp_path / "out/raw.jsonl", [{"text": "a"}])
    with pytest.raises(FileExistsError, match="out exists: name another folder"):
        prepare(path, tmp_path / "out", tokenizer="bytes", quiet=True)


def test_shards_that_are_not_there(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """The run goes on before the first."""
    prepare(out=tmp_path / "whole", **arguments)
    for name, damage in (
        ("tokens-00000.npy", None),
        ("documents-00002.npy", b""),
        ("tokens-00003.npy", b"x"),
        (PROGRESS_FILE, b"damaged"),
    ):
        partial = stopped(tmp_path, arguments)
        path = partial / name
        if damage is None:
            path.unlink()
        elif name == PROGRESS_FILE:
            lines = path.read_bytes().split(b"\n")
            path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
        else:
            path.write_bytes(damage)
        prepare(out=tmp_path / "out", overwrite=False, **arguments)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_a_record_that_is_damaged_at_its_start(tmp_path: Path, arguments: dict[str, Any]) -> None:
    partial = stopped(tmp_path, arguments)
    content = (partial / PROGRESS_FILE).read_bytes()
    (partial / PROGRESS_FILE).write_bytes(content[:40] + b"\n" + content)
    prepare(out=tmp_path / "out", **arguments)
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_is_recorded_when_its_name_is_on_disk(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(folder: Path) -> None:
        assert list(folder.glob("tokens-*"))
        raise Stopped

    monkeypatch.setattr("nar_kernels.data.prepare.staging.sync_folder", stopping)
    with pytest.raises(Stopped):
        prepare(out=tmp_path / "out", **arguments)
    assert (tmp_path / "out.partial" / PROGRESS_FILE).read_bytes().count(b"\n") == 1


def test_temporary_files_of_a_killed_run_are_not_published(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    partial = stopped(tmp_path, arguments)
    for name in ("tokenizer.json.0123456789ab.tmp", "manifest.json.0123456789ab.tmp"):
        (partial / name).write_text("{")
    prepare(out=tmp_path / "out", **arguments)
    prepare(out=tmp_path / "whole", **arguments)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk(tmp_path: Path) -> None:
    """In place of one: a file may not grow beyond some size."""
    resource = pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text("some words " * 50_000)
    options: dict[str, Any] = {"tokenizer": "bytes", "workers": 1, "quiet": True}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large: .*out.partial/tokens-00000.npy'"):
            prepare(tmp_path / "a.txt", tmp_path / "out", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    prepare(tmp_path / "a.txt", tmp_path / "out", **options)


def test_what_is_no_corpus_is_not_overwritten(tmp_path: Path, arguments: dict[str, Any]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/thesis.txt").write_text("x")
    for name, message in (
        ("mine", "mine is no prepared corpus, and not overwritten"),
        ("file", "file is no prepared corpus, and not overwritten"),
        ("other", "other.partial is not of a run of prepare"),
    ):
        with pytest.raises(FileExistsError, match=message):
            prepare(out=tmp_path / name, overwrite=True, **arguments)
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"
    assert (tmp_path / "other.partial/thesis.txt").read_text() == "x"


def test_one_run_at_a_time(tmp_path: Path, arguments: dict[str, Any]) -> None:
    partial = stopped(tmp_path, arguments)
    fcntl = pytest.importorskip("fcntl")
    with (partial / PROGRESS_FILE).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="out.partial is in use by another process"):
            prepare(out=tmp_path / "out", **arguments)
    prepare(out=tmp_path / "out", **arguments)


def test_output_within_the_inputs_is_no_input(tmp_path: Path) -> None:
    """Neither of a run that goes on, nor of one that replaces it."""
    (tmp_path / "bpe.json").write_text(bpe_json())
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(prose()[i])
    arguments = {"inputs": folder, "tokenizer": tmp_path / "bpe.json", **SIZES}
    arguments |= {"shard_tokens": 1}
    prepare(out=tmp_path / "whole", **arguments)
    for overwrite in (False, True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_at(monkeypatch, Staging, "add", 2)
            with pytest.raises(Stopped):
                prepare(out=folder / "out", overwrite=overwrite, **arguments)
        assert (folder / "out.partial").is_dir()
        prepare(out=folder / "out", overwrite=overwrite, **arguments)
        assert contents(folder / "out") == contents(tmp_path / "whole")


RUN = """
import sys
from nar_kernels.data.prepare import prepare
prepare(sys.argv[1:-2], sys.argv[-2], tokenizer=sys.argv[-1], batch_bytes=8000, shard_tokens=20000,
        workers=2)
"""


@pytest.mark.seconds
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_killed(tmp_path: Path, number: int) -> None:
    (tmp_path / "bpe.json").write_text(bpe_json())
    draw = random.Random(number)
    records = [{"text": text} for text in prose() for _ in range(2)]
    write_lines(tmp_path / "a.jsonl", records)
    (tmp_path / "b.txt").write_bytes("\n".join(prose()).encode())
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", RUN, *inputs, str(out), str(tmp_path / "bpe.json")]
    progress = partial / PROGRESS_FILE
    seen, stops = 0, 0
    while stops < 2:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wanted = seen + draw.randrange(1, 5)
        while process.poll() is None and not (
            progress.exists() and progress.read_bytes().count(b"\n") > wanted
        ):
            time.sleep(0.01)
        time.sleep(draw.random() / 10)
        process.send_signal(number)
        process.wait()
        if out.exists():  # it was faster
            break
        stops += 1
        lines = progress.read_bytes().count(b"\n")
        assert lines > seen
        seen = lines
    assert stops
    options: dict[str, Any] = {"batch_bytes": 8000, "shard_tokens": 20000, "quiet": True}
    if not out.exists():
        prepare(inputs, out, tokenizer=tmp_path / "bpe.json", workers=1, **options)
    prepare(inputs, tmp_path / "whole", tokenizer=tmp_path / "bpe.json", **options)
    assert contents(out) == contents(tmp_path / "whole")
