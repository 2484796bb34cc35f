"""Settings as plain values."""

from __future__ import annotations

from pipeline.config.values import masked_values


def test_text_is_masked_but_otherwise_kept() -> None:
    values = {"uri": "s3://key:word@bucket/x", "list": ["a@b", 1], "plain": "sqlite:////a/b.db"}
    masked = {"uri": "s3://***@bucket/x", "list": ["a@b", 1], "plain": "sqlite:////a/b.db"}
    assert masked_values(values) == masked
