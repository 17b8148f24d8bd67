"""How a row is run, watched, recorded and shown; what the rows compute is not known here."""
