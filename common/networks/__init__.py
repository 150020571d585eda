"""Encoders, fusion heads, blocks between stages: what the scripts' networks are put together of."""
