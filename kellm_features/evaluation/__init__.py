"""Evaluation: protocol, arms, statistics and tables; what knowledge is worth, with intervals."""
