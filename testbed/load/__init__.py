"""Who asks when: arrivals of requests, one kind a file."""
