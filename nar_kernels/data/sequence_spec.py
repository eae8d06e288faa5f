"""What a net and the rendering of samples need to know of the data: :class:`SequenceSpec`."""

from typing import Literal, NamedTuple

Render = Literal["image", "bytes", "text", "ids"]


class SequenceSpec(NamedTuple):
    """What a sequence of ids is.

    Attributes:
        num_tokens: V, the mask token included.
        seq_len: L.
        render: what a sequence is: an image of ``image_shape``, bytes of text, text of
            ``tokenizer``, or plain ids.
        image_shape: (height, width) of an image, whose ids rise from background to ink; else None.
        own_mask_id: the mask token, if that is not the last id.
        tokenizer: of text, as :func:`~nar_kernels.data.tokenizer.tokenizer_from_json` takes it.
        num_classes: C, if each sequence has a class in [0, C); else None.
    """

    num_tokens: int
    seq_len: int
    render: Render
    image_shape: tuple[int, int] | None
    own_mask_id: int | None = None
    tokenizer: str | None = None
    num_classes: int | None = None

    @property
    def mask_id(self) -> int:
        return self.num_tokens - 1 if self.own_mask_id is None else self.own_mask_id
