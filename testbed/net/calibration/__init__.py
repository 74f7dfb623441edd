"""Is the link what was asked for? Probes sent across it, and the checks that judge what arrived."""
