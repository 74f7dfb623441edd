"""A scenario and its run: what is to be measured, the walk through it, and what is kept of it."""
