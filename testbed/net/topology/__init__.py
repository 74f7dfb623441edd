"""Nodes and links as descriptions: read from files, unfolded from shapes, given addresses and routes."""
