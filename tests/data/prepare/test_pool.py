"""Worker processes: light, and missed when they die."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nar_kernels.data.prepare import pool, prepare
from nar_kernels.data.prepare.encode import Encoder
from nar_kernels.data.prepare.records import Reader
from nar_kernels.data.tokenizer import open_tokenizer
from tests.helpers.paths import ROOT
from tests.helpers.prepared import documents

pytest.importorskip("fsspec")
pytest.importorskip("tqdm")


def write_text(path: Path) -> dict[str, Any]:
    path.write_text("some words " * 5000)
    return {"tokenizer": "bytes", "quiet": True, "workers": 2, "batch_bytes": 1000}


@pytest.mark.parametrize(
    "script", ["raise SystemExit(3)", "import sys; sys.stdin.buffer.read(10); print('partial')"]
)
def test_a_worker_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (tmp_path / "dies.py").write_text(script)
    monkeypatch.setattr(pool, "_WORKER", tmp_path / "dies.py")
    options = write_text(tmp_path / "a.txt")
    with pytest.raises(ChildProcessError, match="a worker process died with status .*fewer work"):
        prepare(tmp_path / "a.txt", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    prepare(tmp_path / "a.txt", tmp_path / "out", **options)


@pytest.mark.skipif(os.name != "posix", reason="a session is of POSIX")
def test_ctrl_c_does_not_reach_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would print a traceback while they start."""
    script = f"import os; open({str(tmp_path / 'session')!r}, 'w').write(str(os.getsid(0)))"
    (tmp_path / "tells.py").write_text(script)
    monkeypatch.setattr(pool, "_WORKER", tmp_path / "tells.py")
    with pytest.raises(ChildProcessError):
        prepare(tmp_path / "a.txt", tmp_path / "out", **write_text(tmp_path / "a.txt"))
    assert (tmp_path / "session").read_text() not in ("", str(os.getsid(0)))


def test_workers_end_when_nothing_is_sent() -> None:
    """As when their parent was killed."""
    worker = ROOT / "nar_kernels/data/prepare/worker.py"
    tokenizer = open_tokenizer("bytes")
    encoder = Encoder(Reader("text", None, None), tokenizer, "uint8", None, True)
    fields = {name: value for name, value in vars(encoder).items() if name != "tokenizer"}
    start = pickle.dumps(sys.path) + pickle.dumps((tokenizer.to_json(), tokenizer.name, fields))
    subprocess.run([sys.executable, "-I", worker], input=start, check=True, timeout=60)


def test_workers_import_no_pytorch() -> None:
    script = (
        "import io, pickle, runpy, sys\n"
        "worker = runpy.run_path('nar_kernels/data/prepare/worker.py')\n"
        "worker['_load'](io.BytesIO(pickle.dumps(0)))\n"
        "import nar_kernels.data.tokenizer, nar_kernels.data.prepare.encode\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


@pytest.mark.seconds
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Unlike with multiprocessing."""
    options = write_text(tmp_path / "a.txt")
    (tmp_path / "script.py").write_text(
        "from nar_kernels.data.prepare import prepare\n"
        f"prepare({str(tmp_path / 'a.txt')!r}, {str(tmp_path / 'out')!r}, **{options!r})\n"
    )
    run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", run, str(tmp_path / "script.py")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert documents(tmp_path / "out") == [list((tmp_path / "a.txt").read_bytes())]
