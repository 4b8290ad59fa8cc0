"""Tasks with known answers, their scores, and how sure a score is."""
