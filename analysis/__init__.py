"""From a run's directory to figures and tables: `run.load` reads it, `summary`, `figures` and `report` write what is asked of it.

Reads a run directory and nothing else; needs neither root nor torch.
"""
