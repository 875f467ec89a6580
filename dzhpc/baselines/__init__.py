"""What the paper compares with, and what is neither an estimator nor an engine."""
