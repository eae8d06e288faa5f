"""From text, conversations and image codes to a corpus of tokens: :func:`prepare`."""

from nar_kernels.data.prepare.pipeline import prepare

__all__ = ["prepare"]
