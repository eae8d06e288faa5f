"""How long documents are."""

from pathlib import Path

import numpy as np
import pytest

from nar_kernels.data.corpus import Corpus
from nar_kernels.data.inspect.document_lengths import DocumentLengths, document_lengths


def lengths_of(corpus: Corpus) -> tuple[list[int], list[int], int]:
    found = document_lengths(corpus)
    assert found is not None
    return found.lengths.tolist(), found.counts.tolist(), found.num_empty


@pytest.mark.filterwarnings("ignore:eos_id")
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 5, 0, 5, 0, 0, 7, 0], ([1, 2, 3], [1, 2, 1], 1)),
        ([5, 0, 5], ([1, 2], [1, 1], 0)),  # the last one has no end
        ([0], ([1], [1], 1)),
        ([5], ([1], [1], 0)),
    ],
)
def test_by_the_id_that_ends_them(
    tmp_path: Path, ids: list[int], expected: tuple[list[int], list[int], int]
) -> None:
    np.save(tmp_path / "a.npy", np.array(ids, "uint16"))
    assert lengths_of(Corpus(np.array(ids), eos_id=0)) == expected
    for _ in range(2):  # the second time it is remembered
        assert lengths_of(Corpus(tmp_path / "a.npy", eos_id=0)) == expected
    assert lengths_of(Corpus(tmp_path / "a.npy", eos_id=9)) == ([len(ids)], [1], 0)
    assert document_lengths(Corpus(tmp_path / "a.npy")) is None


def test_by_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(np.arange(9))
    monkeypatch.setattr(Corpus, "document_ends", np.array([0, 4, 4, 5, 9]))
    assert lengths_of(corpus) == ([0, 1, 4], [2, 1, 2], 2)


def test_statistics() -> None:
    lengths = np.repeat([1, 3, 8, 100], [4, 10, 5, 1])
    found = DocumentLengths(*np.unique(lengths, return_counts=True), 0)
    assert found.num_documents == 20 and found.mean == lengths.mean()
    for percent in range(101):
        expected = np.percentile(lengths, percent, method="inverted_cdf")
        assert found.quantile(percent / 100) == expected
    assert [found.at_least(n) for n in (1, 2, 8, 9, 101)] == [20, 16, 6, 1, 0]
