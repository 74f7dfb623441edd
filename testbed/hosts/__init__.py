"""Where processes of ours run, and how they are started, called and ended."""
