"""What the relay process is made of, one impairment a file. The standard library alone: it has to be there in milliseconds."""
