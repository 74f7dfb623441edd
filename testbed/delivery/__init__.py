"""How a context crosses a link. `delivery.py` is the contract, any other file one delivery."""
