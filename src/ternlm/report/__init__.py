"""Reading runs, also while they are written: their status, their history, and how both look on a screen."""
