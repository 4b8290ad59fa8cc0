"""Measuring what attention does, and showing it: captures, plots, reports, run folders."""
