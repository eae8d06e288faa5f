"""Public exceptions. Each message says what was received, what is valid and what to do."""


class InvalidTokenError(ValueError):
    """A token id lies outside the vocabulary, or equals ``mask_id``.

    Attributes:
        token_id: the first bad id.
        offset: its offset, the lowest, in tokens, in the corpus or the flattened batch.
        count: number of bad ids in the windows that were checked.

    The attributes are None if it comes from a DataLoader worker, which passes on the message only.
    """

    token_id: int | None = None
    offset: int | None = None
    count: int | None = None

    @classmethod
    def at(
        cls, where: str, *, token_id: int, offset: int, count: int, num_tokens: int, mask_id: int
    ) -> "InvalidTokenError":
        """The error for ``token_id`` at ``where``, such as ``"offset 7 of a.bin"``."""
        if token_id == mask_id:
            fault = "equals mask_id, which clean data must not contain; give the mask its own id"
        else:
            fault = (
                f"is outside [0, {num_tokens}); num_tokens must be the number of embedding rows, "
                "and the data must come from the same tokenizer"
            )
        more = f" ({count} bad ids in all)" if count > 1 else ""
        error = cls(f"token id {token_id} at {where} {fault}{more}")
        error.token_id, error.offset, error.count = token_id, offset, count
        return error


class InvalidLogitsError(ValueError):
    """A net returned NaN logits where tokens were to be sampled."""


class CorpusFormatError(ValueError):
    """A corpus file or array cannot be read as one stream of integer token ids."""


class CorpusChangedError(RuntimeError):
    """A file of a corpus was changed, replaced or removed while the corpus was in use."""


class BackendUnavailableError(RuntimeError):
    """A backend that was requested by name cannot run here."""


class PinnedMemoryError(RuntimeError):
    """A corpus cannot be put into pinned host memory."""
