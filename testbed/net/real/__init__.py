"""Links between machines of their own."""
