"""Batches of documents as token ids: :class:`Encoder`, which runs in workers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nar_kernels.data.prepare.batches import Batch
from nar_kernels.data.prepare.records import Document, Reader
from nar_kernels.data.tokenizers.base import Tokenizer
from nar_kernels.errors import CorpusFormatError


@dataclass(frozen=True, eq=False)
class Encoded:
    """The tokens of a batch.

    Attributes:
        ids: ``[L]``, of the corpus's dtype.
        ends: int64 ``[D]``: how many of them precede the end of each document. Those after the last
            end are of a document that goes on in the next batch.
        loss_mask: uint8 ``[L]``, or None: all count.
        num_empty: documents without tokens, which are left out.
        num_plain: mask tokens that the text names, taken for text.
    """

    ids: np.ndarray
    ends: np.ndarray
    loss_mask: np.ndarray | None
    num_empty: int = 0
    num_plain: int = 0

    def split(self, num_documents: int) -> tuple["Encoded", "Encoded"]:
        """Its first documents, and the rest."""
        cut = int(self.ends[num_documents - 1]) if num_documents else 0
        mask = self.loss_mask
        masks = (None, None) if mask is None else (mask[:cut], mask[cut:])
        first = Encoded(self.ids[:cut], self.ends[:num_documents], masks[0])
        return first, Encoded(self.ids[cut:], self.ends[num_documents:] - cut, masks[1])


@dataclass
class Encoder:
    """Reads and encodes batches.

    Attributes:
        reader: of their documents.
        tokenizer: of the corpus.
        dtype: of the ids, which holds all of the tokenizer's.
        append_eos: whether a document ends with ``eos_id``; None: if its text does not itself say
            where it ends.
        parse_special: see :meth:`Tokenizer.encode_batch`.
    """

    reader: Reader
    tokenizer: Tokenizer
    dtype: str
    append_eos: bool | None
    parse_special: bool

    def encode(self, batch: Batch) -> Encoded:
        """
        Raises:
            CorpusFormatError: a document cannot be encoded; the message names file and line.
        """
        documents = list(self.reader.documents(batch))
        # The rest of a document that began in the batch before.
        continues = batch.kind == "text" and self.reader.separator is None and batch.at.offset > 0
        arrays: list[np.ndarray] = []
        masks: list[np.ndarray | None] = []
        num_plain = 0
        for document, (ids, mask, num_masks) in zip(documents, self._ids(documents), strict=True):
            num_plain += num_masks
            if len(ids) or continues:
                eos_id = None if batch.goes_on else self._missing_eos(document, ids)
                if eos_id is not None:
                    ids = np.append(ids, eos_id)
                    # It counts if what it ends does.
                    mask = None if mask is None else np.append(mask, mask[-1:])
                arrays.append(ids)
                masks.append(mask)
        ends = np.cumsum([len(ids) for ids in arrays], dtype=np.int64)
        loss_mask = None
        if any(mask is not None for mask in masks):
            loss_mask = np.ones(ends[-1], np.uint8)
            for mask, end in zip(masks, ends, strict=True):
                if mask is not None:
                    loss_mask[end - len(mask) : end] = mask
        return Encoded(
            ids=self._checked(np.concatenate(arrays) if arrays else np.empty(0, np.int64)),
            ends=ends[:0] if batch.goes_on else ends,
            loss_mask=loss_mask,
            num_empty=len(documents) - len(arrays),
            num_plain=num_plain,
        )

    def _ids(
        self, documents: list[Document]
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
        """Ids and loss mask of each document, and how often it had the text of the mask token."""
        try:
            texts = [document.text for document in documents if document.counts is None]
            of_texts = iter(self.tokenizer.encode_arrays(texts, parse_special=self.parse_special))
            for document in documents:
                if document.counts is None:
                    ids, mask = next(of_texts), None
                else:
                    ids, mask = self._encode(document, self.tokenizer)
                num_masks = self._count_masks(ids)
                if num_masks and not document.ends_itself:
                    ids, mask = self._encode(document, self.tokenizer.without_mask)
                if num_masks and self._count_masks(ids):
                    raise CorpusFormatError(
                        f"{document.where}: it has the text of the mask token, "
                        f"{self.tokenizer.special_tokens['mask_token']!r}, which data must not "
                        "contain: write it otherwise, or remove the record"
                    )
                yield ids, mask, num_masks
        except CorpusFormatError:
            raise
        except ValueError:
            for document in documents:
                self._check(document)
            raise

    def _check(self, document: Document) -> None:
        """Raises for a document that cannot be encoded."""
        try:
            self._encode(document, self.tokenizer)
        except UnicodeEncodeError as error:
            raise CorpusFormatError(
                f"{document.where}: {document.text[error.start]!r} is half of a surrogate pair, "
                "and no character: correct or remove the record"
            ) from error
        except ValueError as error:
            raise CorpusFormatError(
                f"{document.where}: the tokenizer fails ({error}): split or remove the document"
            ) from error

    def _encode(
        self, document: Document, tokenizer: Tokenizer
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids of a document, and uint8 that say which of them count; None: all."""
        text = document.text
        # What a template writes are its special tokens, whatever the text's are.
        parse = document.ends_itself or self.parse_special
        if document.counts is None:
            (ids,) = tokenizer.encode_arrays([text], parse_special=parse)
            return ids, None
        found, spans = tokenizer.encode_with_spans(text, parse_special=parse)
        # How many characters that count precede each.
        counted = np.zeros(len(text) + 1, np.int64)
        for start, stop in document.counts:
            counted[start + 1 : stop + 1] = 1
        before = np.cumsum(counted)
        mask = before[spans[:, 1]] > before[spans[:, 0]]
        return np.asarray(found, np.int64), mask.astype(np.uint8)

    def _count_masks(self, ids: np.ndarray) -> int:
        mask_id = self.tokenizer.mask_id
        return 0 if mask_id is None else int(np.count_nonzero(ids == mask_id))

    def _missing_eos(self, document: Document, ids: np.ndarray) -> int | None:
        wanted = not document.ends_itself if self.append_eos is None else self.append_eos
        has_one = len(ids) and ids[-1] == self.tokenizer.eos_id
        return self.tokenizer.eos_id if wanted and not has_one else None

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """In the corpus's dtype."""
        if len(ids):
            least, most = int(ids.min()), int(ids.max())
            if least < 0 or most >= self.tokenizer.vocab_size:
                raise CorpusFormatError(
                    f"the tokenizer {self.tokenizer.name} gave id {most if least >= 0 else least}, "
                    f"outside its vocabulary [0, {self.tokenizer.vocab_size}): it is damaged"
                )
        return ids.astype(self.dtype)
