"""Losses kept draw by draw, where (m, m) would not fit."""
