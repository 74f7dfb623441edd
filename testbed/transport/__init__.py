"""How frames move between edge and cloud. One transport, one file."""
