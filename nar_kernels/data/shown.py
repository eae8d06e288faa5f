"""Values of JSON in error messages: :func:`shown`."""

import json


def shown(value: object) -> str:
    """As JSON, cut off where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else f"{text[:80]}..."
