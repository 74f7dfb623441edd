"""The processes on each side of the link, what they say to each other, and how they are started."""
