"""Text of token ids, and of each of them: :class:`Pieces`."""

from collections.abc import Sequence
from functools import cache

from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.tokenizer import tokenizer_from_json

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """The text that the ids of a tokenizer stand for.

    Args:
        tokenizer: as in ``SequenceSpec``.
    """

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = tokenizer_from_json(tokenizer)
        self.piece = cache(self._piece)

    def text(self, ids: Sequence[int]) -> str:
        """Of ids one after the other, some of which a net may have made up."""
        try:
            return self._tokenizer.decode(ids)
        except ValueError:
            return "".join(map(self.piece, ids))

    def _piece(self, id_: int) -> str:
        """Of one id; U+FFFD for one that is none of the tokenizer, or not whole characters."""
        try:
            return self._tokenizer.decode([id_])
        except ValueError:
            return _UNKNOWN

    def ids(self, text: str) -> list[int]:
        """Of text, without special tokens around it."""
        return list(self._tokenizer.encode_batch([text])[0])


@cache
def pieces_of(spec: SequenceSpec) -> Pieces:
    """Of sequences that are text.

    Raises:
        ImportError: the package of the tokenizer is not installed; the message gives the command.
    """
    assert spec.tokenizer is not None
    return Pieces(spec.tokenizer)
