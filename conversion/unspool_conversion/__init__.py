"""Unspool's conversion side: checkpoint in, checkpoint out."""
