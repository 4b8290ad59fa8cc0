"""Keys chosen by where they are: the nearest in space."""
