"""Conditions of links as descriptions: what is read, printed, compared and scheduled. Nothing here imposes them."""
