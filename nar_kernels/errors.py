"""The errors a user meets. Each message names what came, what is valid and what to do."""


class InvalidTokenError(ValueError):
    """A token id lies outside the vocabulary, or equals ``mask_id``.

    Attributes:
        token_id: the first bad id.
        offset: where it stands: the lowest offset, in tokens, in the corpus or the flattened batch.
        count: how many bad ids the windows in question hold.

    A DataLoader worker passes on the message only; the attributes are None then.
    """

    token_id: int | None = None
    offset: int | None = None
    count: int | None = None

    @classmethod
    def at(
        cls, where: str, *, token_id: int, offset: int, count: int, num_tokens: int, mask_id: int
    ) -> "InvalidTokenError":
        """The error for ``token_id``, found at ``where`` (words such as ``offset 7 of a.bin``)."""
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
    """A net returned NaN where tokens were to be drawn."""


class CorpusFormatError(ValueError):
    """A corpus file or array cannot be read as one stream of integer token ids."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""
