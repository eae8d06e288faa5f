"""Nets of transformers that are small enough for tests."""


def tiny_sizes(num_tokens: int, length: int) -> dict[str, int]:
    """Arguments of a configuration."""
    return {
        "vocab_size": num_tokens,
        "max_position_embeddings": length,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
