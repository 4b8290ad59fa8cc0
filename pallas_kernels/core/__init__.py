"""What every op shares: dispatch, interpretation, selection as integers, checks and block sizes."""
