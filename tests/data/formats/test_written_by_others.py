"""Files of the libraries whose formats these are (those of MosaicML are in fixtures/)."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from nar_kernels.data.corpus import Corpus
from tests.helpers.corpora import ends_of, ids_of, refused

pytestmark = pytest.mark.seconds

TEXTS = [f"{'once upon a time ' * (i % 4 + 1)}in {i} lands" for i in range(9)]


def library(name: str) -> ModuleType:
    """A module of a library that warns of its own dependencies when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


def documents(dtype: str, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    high = min(np.iinfo(dtype).max, 100_000)
    return [rng.integers(0, high, length).astype(dtype) for length in (5, 1, 300, 17, 64)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Of one id a word, the last one ending documents."""
    tokenizers = library("tokenizers")
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate([*words, "[EOS]"])}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[EOS]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def encoded(tokenizer: Path) -> list[list[int]]:
    built = library("tokenizers").Tokenizer.from_file(str(tokenizer))
    return [[*built.encode(text).ids, built.token_to_id("[EOS]")] for text in TEXTS]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_datatrove_tokenized_files(tmp_path: Path, dtype: str) -> None:
    parts = documents(dtype)
    writer = library("datatrove.pipeline.tokens.tokenizer").TokenizedFile(
        str(tmp_path),
        "a.ds",
        save_loss_metadata=True,
        save_final_metadata=True,
        token_size=np.dtype(dtype).itemsize,
    )
    for part in parts:
        writer.write(part.tolist(), part % 2 == 0)
    writer.close()
    assert {path.suffix for path in tmp_path.glob("a.ds.*")} == {".index", ".loss", ".metadata"}
    corpus = Corpus(tmp_path)
    assert ids_of(corpus) == np.concatenate(parts).tolist()
    assert corpus.stream.layouts[0].dtype == dtype
    assert corpus.document_ends.tolist() == ends_of(parts)
    mask = corpus.loss_mask.read(0, len(corpus))
    assert mask.tolist() == (np.concatenate(parts) % 2 == 0).tolist()


def test_datatrove_document_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    """The pipeline, its shuffle and its merger."""
    tokens = library("datatrove.pipeline.tokens")
    document = library("datatrove.data").Document
    texts = [document(text=text, id=str(i)) for i, text in enumerate(TEXTS)]
    for rank in range(2):
        step = tokens.DocumentTokenizer(
            str(tmp_path / "out"),
            str(tokenizer),
            eos_token="[EOS]",
            shuffle_documents=bool(rank),
            seed=1,
        )
        step.run(iter(texts), rank, 2)
    merger = tokens.DocumentTokenizerMerger(
        str(tmp_path / "out"), str(tmp_path / "merged"), "all", shuffle=False, progress=False
    )
    merger.run()
    expected = encoded(tokenizer)
    corpus = Corpus(tmp_path / "out")
    assert len(corpus.stream.layouts) == 2
    assert ids_of(corpus)[: len(corpus) // 2] == sum(expected, [])
    for source in (tmp_path / "out", tmp_path / "merged", str(tmp_path / "merged" / "*")):
        corpus = Corpus(source)
        starts = [0, *corpus.document_ends[:-1]]
        pieces = [
            corpus.read(int(start), int(end)).tolist()
            for start, end in zip(starts, corpus.document_ends, strict=True)
        ]
        assert sorted(pieces) == sorted(expected * 2)
        by_eos = Corpus(source, eos_id=expected[0][-1])
        assert by_eos.document_ends.tolist() == corpus.document_ends.tolist()


@pytest.mark.parametrize(("token_size", "dtype"), [(2, "uint16"), (4, "int32")])
def test_datatrove_megatron_files(tmp_path: Path, token_size: int, dtype: str) -> None:
    parts = documents(dtype)
    writer = library("datatrove.pipeline.tokens.megatron_tokenizer").MegatronTokenizedFile(
        str(tmp_path), "a", token_size=token_size
    )
    for part in parts:
        writer.write(part.tolist())
    writer.close()
    corpus = Corpus(tmp_path / "a")
    assert ids_of(corpus) == corpus.tokens.tolist() == np.concatenate(parts).tolist()
    assert corpus.stream.layouts[0].dtype == dtype
    assert corpus.document_ends.tolist() == ends_of(parts)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
@pytest.mark.parametrize("multimodal", [False, True])
def test_megatron_core(tmp_path: Path, dtype: str, multimodal: bool) -> None:
    module = library("megatron.core.datasets.indexed_dataset")
    prefix, parts = tmp_path / "a_text_document", documents(dtype)
    builder = module.IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=getattr(np, dtype), multimodal=multimodal
    )
    builder.add_document(np.concatenate(parts[:2]), [5, 1], *([[0, 1]] if multimodal else []))
    for part in parts[2:]:
        builder.add_item(torch.from_numpy(part), *([1] if multimodal else []))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    corpus = Corpus(prefix)
    assert ids_of(corpus) == np.concatenate(parts).tolist()
    assert corpus.stream.layouts[0].dtype == dtype
    assert corpus.document_ends.tolist() == ends_of(parts)[1:]
    # As megatron-core reads it itself.
    theirs = module.IndexedDataset(str(prefix), multimodal=multimodal)
    items = [theirs[i][0] if multimodal else theirs[i] for i in range(len(theirs))]
    assert ids_of(corpus) == np.concatenate(items).tolist()


def test_merged_corpora_of_megatron_core(tmp_path: Path) -> None:
    module = library("megatron.core.datasets.indexed_dataset")
    parts = documents("uint16") + documents("uint16", seed=1)
    for i in range(2):
        builder = module.IndexedDatasetBuilder(str(tmp_path / f"{i}.bin"), dtype=np.uint16)
        for part in parts[5 * i : 5 * i + 5]:
            builder.add_document(part, [len(part)])
        builder.finalize(str(tmp_path / f"{i}.idx"))
    merged = module.IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype=np.uint16)
    for i in range(2):
        merged.add_index(str(tmp_path / str(i)))
    merged.finalize(str(tmp_path / "all.idx"))
    both, one = Corpus(str(tmp_path / "[01].*")), Corpus(tmp_path / "all")
    assert ids_of(both) == ids_of(one) == np.concatenate(parts).tolist()
    assert both.document_ends.tolist() == one.document_ends.tolist() == ends_of(parts)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_datasets_save_to_disk(tmp_path: Path, dtype: str, cache: Path) -> None:
    datasets = library("datasets")
    parts = documents(dtype)
    feature = datasets.List(datasets.Value(dtype))
    features = datasets.Features({"input_ids": feature, "text": datasets.Value("string")})
    rows = {"input_ids": [part.tolist() for part in parts], "text": list("abcde")}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "a", num_shards=3)
    corpus = Corpus(tmp_path / "a")
    assert ids_of(corpus) == np.concatenate(parts).tolist()
    assert corpus.document_ends.tolist() == ends_of(parts)
    assert corpus.stream.layouts[0].dtype == dtype
    # Mapped where it is: nothing was decoded.
    assert not list(cache.iterdir())
    # What was selected is written out.
    dataset.select([3, 0]).save_to_disk(tmp_path / "b")
    assert ids_of(Corpus(tmp_path / "b")) == np.concatenate([parts[3], parts[0]]).tolist()
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "c")
    refused(tmp_path / "c", r"splits \['train', 'test'\]: name the folder of one of them")
    assert ids_of(Corpus(tmp_path / "c" / "train")) == ids_of(corpus)
    for name in ("a.parquet", "b.parquet"):
        dataset.to_parquet(tmp_path / "p" / name)
    corpus = Corpus(tmp_path / "p")
    assert ids_of(corpus) == np.concatenate(parts * 2).tolist()
    assert corpus.document_ends.tolist() == ends_of(parts * 2)


def test_datasets_of_fixed_lengths(tmp_path: Path) -> None:
    """As after packing: rows of as many ids each."""
    datasets = library("datasets")
    rows = np.random.default_rng(0).integers(0, 50257, (40, 128))
    feature = datasets.List(datasets.Value("int32"), length=128)
    dataset = datasets.Dataset.from_dict(
        {"input_ids": rows}, features=datasets.Features({"input_ids": feature})
    )
    dataset.save_to_disk(tmp_path / "a")
    corpus = Corpus(tmp_path / "a")
    assert ids_of(corpus) == rows.reshape(-1).tolist()
    assert corpus.document_ends.tolist() == list(range(128, 41 * 128, 128))
    tokens = datasets.Dataset.from_dict({"tokens": rows.tolist()})
    tokens.to_parquet(tmp_path / "a.parquet")
    assert ids_of(Corpus(tmp_path / "a.parquet")) == rows.reshape(-1).tolist()


def test_generated_datasets(tmp_path: Path) -> None:
    """In batches of a few rows, through the files of its own cache."""
    datasets = library("datasets")
    parts = documents("int64")

    def rows():
        yield from ({"input_ids": part.tolist()} for part in parts * 5)

    dataset = datasets.Dataset.from_generator(
        rows, cache_dir=str(tmp_path / "hf"), writer_batch_size=2
    )
    (file,) = {entry["filename"] for entry in dataset.cache_files}
    corpus = Corpus(file)
    assert len(corpus.stream.layouts[0].lengths) > 5
    assert ids_of(corpus) == np.concatenate(parts * 5).tolist()
    assert corpus.document_ends.tolist() == ends_of(parts * 5)
