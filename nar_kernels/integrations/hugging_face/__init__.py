"""Collators for Hugging Face, whose masks do not depend on workers, ranks or a resume."""

from nar_kernels.integrations.hugging_face.diffusion import MaskedDiffusionCollator
from nar_kernels.integrations.hugging_face.ids import SAMPLE_ID, SampleIds, SetEpoch
from nar_kernels.integrations.hugging_face.mlm import DataCollatorForLanguageModeling

__all__ = [
    "SAMPLE_ID",
    "DataCollatorForLanguageModeling",
    "MaskedDiffusionCollator",
    "SampleIds",
    "SetEpoch",
]
