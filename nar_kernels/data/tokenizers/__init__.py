"""The kinds of tokenizers, one a file; :mod:`nar_kernels.data.tokenizer` opens them."""
