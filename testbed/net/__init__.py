"""The network: profiles, topologies, the fabric of namespaces and links, and how all of it is removed."""
