"""How frames move between edge and cloud. `transport.py` is the contract, `wire.py` the frames, any other file one transport."""
