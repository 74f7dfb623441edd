"""How frames move between edge and cloud. `transport.py` is the contract, `wire.py` the frames, `quic_connection.py` one QUIC
connection that is moved; any other file is one transport."""
