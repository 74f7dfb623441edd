"""Other programs' interfaces, in which the testbed's codecs stand. None of these programs is needed to import a bridge."""
