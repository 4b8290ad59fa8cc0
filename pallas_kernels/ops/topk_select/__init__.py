"""The k largest of each row, as a threshold and a tie cut, with an index list where asked."""
