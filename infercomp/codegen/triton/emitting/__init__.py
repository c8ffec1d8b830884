"""Text of samplers: from a spec to its kernel function."""
