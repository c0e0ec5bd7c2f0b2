"""ATen only, on any device: the fallback everywhere, and the fast path on a CPU."""
