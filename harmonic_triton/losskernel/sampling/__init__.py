"""Localised SGLD around trained weights."""
