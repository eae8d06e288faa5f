"""Operations on tensors: checks, backends, kernels."""
