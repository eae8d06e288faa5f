"""The recipe of docs/data.md for several machines: datatrove's executors."""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.texts import bpe_json, prose, write_lines

tokenizers = pytest.importorskip("tokenizers")


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datatrove", "orjson"):
        pytest.importorskip(package)
    from datatrove.utils.logging import logger

    logger.remove()
    (tmp_path / "jsonl").mkdir()
    texts = [prose()[i : i + 4] for i in (0, 4)]
    for i in range(2):
        write_lines(tmp_path / f"jsonl/{i}.jsonl", [{"text": text} for text in texts[i]])
    (tmp_path / "tokenizer.json").write_text(bpe_json())
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(from datatrove.*?)```", page, re.DOTALL)
    recipe = recipe.replace("tasks=64", "tasks=2").replace("workers=8", "workers=1")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(recipe, "docs/data.md", "exec"), names)
    theirs = tokenizers.Tokenizer.from_str(bpe_json())
    files = sorted((tmp_path / "tokens").glob("*.ds"))
    assert len(files) == 2
    for file, group in zip(files, texts, strict=True):
        expected = [theirs.encode(text).ids + [0] for text in group]
        ids = np.memmap(file, "uint16", "r")
        assert ids.tolist() == [id_ for document in expected for id_ in document]
        ends = struct.unpack("<4Q", file.with_name(file.name + ".index").read_bytes())
        assert list(ends) == np.cumsum([len(document) for document in expected]).tolist()
