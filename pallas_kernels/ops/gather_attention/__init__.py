"""Every query row attends to the keys it is given by index."""
