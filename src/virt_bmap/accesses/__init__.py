"""Reads and writes as they were logged, by a watch or by other tools; traces, and profiles made of them."""
