"""Engines: the ops a program may ask for, and the machines that carry them out."""
