"""A cell, as the relay carries it: links whose packets leave through one medium."""
