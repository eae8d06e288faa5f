"""NeMo Automodel (``nemo_automodel.components``): masks, loss and collator of diffusion LMs."""

from nar_kernels.integrations.nemo.collator import DLLMCollator
from nar_kernels.integrations.nemo.corruption import (
    corrupt_all_masked,
    corrupt_blockwise,
    corrupt_uniform,
)
from nar_kernels.integrations.nemo.loss import DLLMLossOutput, MDLMCrossEntropyLoss

__all__ = [
    "DLLMCollator",
    "DLLMLossOutput",
    "MDLMCrossEntropyLoss",
    "corrupt_all_masked",
    "corrupt_blockwise",
    "corrupt_uniform",
]
