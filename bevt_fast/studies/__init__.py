"""Studies: many runs of the other programs, told by one file, and the tables that come of them. No torch in here."""
