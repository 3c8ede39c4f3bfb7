"""How long merges take and what they do with the time: python -m benchmarks. No test, and nothing is gated by it."""
