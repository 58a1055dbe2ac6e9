"""Benchmarks of the policy phase: ``rl-exit bench sampling``."""
