"""Queues of tensors between neighbouring stages, in memory or between processes."""
