"""Who chooses a chunk's level. `policy.py` is the contract, `prediction.py` what most share, any other file one policy."""
