"""Compiled loops behind the codecs: the same bytes and values, sooner."""
