"""A topology, built: namespaces, wires, addresses, and the record from which all of it can be taken away again."""
