"""How long a side takes to compute: factors slower than this host, or the measured times of a device that is not here."""
