"""Conditions imposed by the kernel: netem and the queueing disciplines beside it."""
