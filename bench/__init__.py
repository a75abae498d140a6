"""Measurements: every figure of this project is printed by a file of this folder, with its hardware and its command."""
